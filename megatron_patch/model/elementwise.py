"""What stands between the products of a layer without Transformer Engine, in few passes over memory.

A CPU spends a quarter of a step on these, since each of torch's operators reads and writes whole activations, and
autograd keeps what lies between them.  Each function here is one node of the graph, keeps its input alone, and computes
its gradient by hand; the formulas are those of torch's own operators, the rounding differs in the last digit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> the same shape; on a GPU by torch's own kernel."""
        if x.device.type != "cpu":
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale = norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()  # [rows, 1]
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).mul_(weight).view_as(x).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        rows, gradient_rows = (states.reshape(-1, x.shape[-1]).float() for states in (x, gradient))
        of_weight = of_x = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.mv((gradient_rows * rows).t(), scale.view(-1)).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # d x_i = s g_i w_i - s^3 x_i / H * sum_j g_j w_j x_j, with s the row's scale
            weighted = gradient_rows * weight
            along = (weighted * rows).sum(-1, keepdim=True)
            along.mul_(scale.pow(3)).div_(-rows.shape[-1])
            of_x = weighted.mul_(scale).addcmul_(rows, along).view_as(x).to(x.dtype)
        return of_x, of_weight, None


class SwiGLU(torch.nn.Module):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2 F], gate then up -> [..., F]."""
        return _SwiGLU.apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        found = torch.empty_like(gate_and_up)
        of_gate, of_up = found.chunk(2, -1)
        torch.mul(F.silu(gate), gradient, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return found
