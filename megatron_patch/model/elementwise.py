"""What stands between the products of a layer without Transformer Engine, in few passes over memory.

A CPU spends a quarter of a step on these, since each of torch's operators reads and writes whole activations, and
autograd keeps what lies between them.  Each function here is one node of the graph, keeps its input alone, and computes
its gradient by hand; the formulas are those of torch's own operators, the rounding differs in the last digit.  Where
there is a C++ compiler each is one compiled pass (megatron_patch/kernels); torch's operators do the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_patch import kernels
from megatron_patch.model.recomputation import recomputable


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> the same shape; on a GPU by torch's own kernel."""
        return recomputable(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        found, scales = kernels.rms_norm(x, weight, eps) or _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return found

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        asked = *ctx.saved_tensors, gradient, *ctx.needs_input_grad[:2]
        return *(kernels.rms_norm_backward(*asked) or _norm_backward(*asked)), None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As kernels.rms_norm()."""
    rows = x.reshape(-1, x.shape[-1]).float()
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    scale = norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()  # [rows, 1]
    return (rows * scale).mul_(weight).view_as(x).to(x.dtype), scale.view(-1)


def _norm_backward(
    x: Tensor, weight: Tensor, scales: Tensor, gradient: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As kernels.rms_norm_backward()."""
    rows, gradient_rows = (states.reshape(-1, x.shape[-1]).float() for states in (x, gradient))
    scale, for_x, for_weight = scales[:, None], None, None
    if of_weight:
        for_weight = torch.mv((gradient_rows * rows).t(), scales).to(weight.dtype)
    if of_x:
        # d x_i = s g_i w_i - s^3 x_i / H * sum_j g_j w_j x_j, with s the row's scale
        weighted = gradient_rows * weight
        along = (weighted * rows).sum(-1, keepdim=True)
        along.mul_(scale.pow(3)).div_(-rows.shape[-1])
        for_x = weighted.mul_(scale).addcmul_(rows, along).view_as(x).to(x.dtype)
    return for_x, for_weight


class SwiGLU(torch.nn.Module):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2 F], gate then up -> [..., F]."""
        return recomputable(_SwiGLU.apply, gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        found = kernels.swiglu(gate_and_up)
        if found is None:
            gate, up = gate_and_up.chunk(2, -1)
            found = F.silu(gate).mul_(up)
        return found

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        found = kernels.swiglu_backward(gate_and_up, gradient)
        if found is None:
            gate, up = gate_and_up.chunk(2, -1)
            found = torch.empty_like(gate_and_up)
            of_gate, of_up = found.chunk(2, -1)
            torch.mul(F.silu(gate), gradient, out=of_up)
            torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return found
