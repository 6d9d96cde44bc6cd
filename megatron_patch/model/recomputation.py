"""Activations of one pass over memory, computed again for the backward pass (Chen et al. 2016, arXiv:1604.06174).

What a norm or SwiGLU returns is kept by the linear layer that multiplies it, although its input is kept as well: a
third of what a decoder layer holds for its backward pass.  The same formula over the same input gives the same bits.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor


def recomputable(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """compute(x), marked with how it came about if there will be a backward pass."""
    found = compute(x)
    if found.requires_grad:
        found.recompute = partial(compute, x.detach())
    return found


def not_keeping(state: Tensor) -> AbstractContextManager[object]:
    """A context whose operators keep for their backward pass, in place of `state`, how it is computed.

    state: contiguous; one that recomputable() did not mark is kept as ever.
    """
    recompute = getattr(state, "recompute", None)
    if recompute is None:
        return nullcontext()
    place, count = state.data_ptr(), state.numel()

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        if saved.data_ptr() != place or saved.numel() != count or not saved.is_contiguous():
            return saved
        shape = saved.shape  # not `saved` itself, which would be kept by the function
        return lambda: recompute().view(shape)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
