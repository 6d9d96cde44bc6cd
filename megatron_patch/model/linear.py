"""Megatron's linear layers, without what costs memory or time and is not needed.

Column and Row keep no input for the backward pass that one pass over memory gives again.

Those of multiply_alone() multiply and nothing else, where one tensor-parallel rank holds them whole.  Megatron's look
for process groups, autocast and gradients in every call, and add three nodes to the graph: for a single token, of a
small model on a CPU, that takes as long as a third of the products.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_patch.model.recomputation import not_keeping


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
            module.forward = partial(_product, module)


def _product(
    layer: torch.nn.Module, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [..., I] -> [..., O] and the bias that is the caller's to add, to the last bit as Megatron's layers.

    So the bias is added to what is rounded: cached features are a tower's of either kind.
    """
    added, left = (None, layer.bias) if layer.skip_bias_add else (layer.bias, None)
    found = F.linear(x, layer.weight if weight is None else weight)
    return found if added is None else found + added, left
