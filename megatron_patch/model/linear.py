"""Linear layers without Transformer Engine: what they keep, and what they leave out.

A layer that trains its weight keeps its input for the weight's gradient.  Where that input is a norm's or SwiGLU's
output, whose own input is kept as well, it is not kept but computed again: 4.8 of 15 MB that a layer of SmolLM2-135M
holds of 448 tokens in fp32, for less than 1% of a step.

A layer of one tensor-parallel rank whose weight is frozen multiplies and nothing else.  Megatron's look for process
groups, autocast and gradients in every call, and add three nodes to the graph: for a single token, of a small model on
a CPU, that takes as long as a third of the products.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

AGAIN = "computed_again"  # an attribute of a tensor: a function that gives its values once more


def computed_again(found: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """`found`, of which a linear layer keeps `again` in its place."""
    if torch.is_grad_enabled():
        setattr(found, AGAIN, again)
    return found


class _KeepsLess:
    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        again = getattr(x, AGAIN, None)
        if again is None or self.weight is None or not self.weight.requires_grad:
            return super().forward(x, *arguments, **named)

        def keep(state: Tensor) -> Tensor | Callable[[], Tensor]:
            same = state.data_ptr() == x.data_ptr() and state.shape == x.shape  # Megatron keeps an alias
            return again if same else state

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept() if callable(kept) else kept):
            return super().forward(x, *arguments, **named)


class LocalColumnLinear(_KeepsLess, ColumnParallelLinear):
    """Megatron's, cut along its output."""


class LocalRowLinear(_KeepsLess, RowParallelLinear):
    """Megatron's, cut along its input."""


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
    """x [..., I] -> [..., O] and the bias that is the caller's to add, as Megatron's layers return it."""
    added, left = (None, layer.bias) if layer.skip_bias_add else (layer.bias, None)
    return F.linear(x, layer.weight if weight is None else weight, added), left
