"""Megatron's linear layers, without what costs memory or time and is not needed.

Column and Row keep no input for the backward pass that one pass over memory gives again.  Where no ranks share what
they multiply they add a weight's gradient to Megatron's buffer and hand torch none, as large as the weight, beside it.

Those of multiply_alone() multiply and nothing else, where one tensor-parallel rank holds them whole.  Megatron's look
for process groups, autocast and gradients in every call, and add three nodes to the graph: for a single token, of a
small model on a CPU, that takes as long as a third of the products.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_patch import kernels
from megatron_patch.model.recomputation import not_keeping


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times the transpose of weight [O, I] -> [..., O], without a record for the backward pass."""
    found = kernels.product(x, weight)
    return F.linear(x, weight) if found is None else found


class _Product(torch.autograd.Function):
    """x [..., I], weight [O, I] -> [..., O]; a trained weight's gradient is added to Megatron's buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        if weight.requires_grad:
            ctx.save_for_backward(x)
        return product(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None]:
        weight = ctx.weight
        of_x = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        if weight.requires_grad:
            (x,) = ctx.saved_tensors
            rows = x.flatten(0, -2), gradient.flatten(0, -2)
            layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(*rows, weight.main_grad)
        return of_x, None  # the hook of the weight runs all the same, and finds nothing to add


class _WithRecomputedInput:
    """Mixed into Megatron's linear layers."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        # The weight goes through the same hooks and comes back without its attributes, so that Megatron, which has
        # added its gradient to the buffer, hands none on.  Activation offload works by such hooks, too, of which only
        # the innermost are asked.
        without = getattr(self.weight, "hook_needs_no_gradient", False) and not self.config.cpu_offloading
        with not_keeping(x) if without else nullcontext():
            return super().forward(x, *args, **kwargs)

    def _forward_impl(self, input: Tensor, weight: Tensor, **asked: object) -> Tensor:  # Megatron's names
        """Megatron's product of x and weight; its own way where several ranks or a deferred gradient are asked for."""
        several = asked["allreduce_dgrad"] or asked["sequence_parallel"] or asked["gtp_remat_size"] > 1
        by_megatron = several or asked["grad_output_buffer"] is not None or asked["bias"] is not None
        in_buffer = asked["gradient_accumulation_fusion"] and getattr(weight, "hook_needs_no_gradient", False)
        if by_megatron or not in_buffer:
            return super()._forward_impl(input, weight, **asked)
        return _Product.apply(input, weight)


class Column(_WithRecomputedInput, ColumnParallelLinear):
    """ColumnParallelLinear that keeps no norm's output."""


class Row(_WithRecomputedInput, RowParallelLinear):
    """RowParallelLinear that keeps no output of SwiGLU."""


def multiply_alone(model: torch.nn.Module, trained: bool) -> None:
    """Have the linear layers of local layers do so, if there is one tensor-parallel rank.

    Args:
        model: any part of a model, built.
        trained: those with trained weights, too; their gradients would not get to Megatron's buffers.
    """
    if mpu.get_tensor_model_parallel_world_size() > 1:
        return
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        frozen = module.weight is not None and not module.weight.requires_grad
        if trained or (frozen and not module.config.cpu_offloading):
            module.forward = partial(_alone, module)


def _alone(
    layer: torch.nn.Module, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [..., I] -> [..., O] and the bias that is the caller's to add, to the last bit as Megatron's layers.

    So the bias is added to what is rounded: cached features are a tower's of either kind.
    """
    added, left = (None, layer.bias) if layer.skip_bias_add else (layer.bias, None)
    weight = layer.weight if weight is None else weight
    multiply = F.linear if weight.requires_grad and torch.is_grad_enabled() else _Product.apply
    found = multiply(x, weight)
    return found if added is None else found + added, left
