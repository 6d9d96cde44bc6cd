"""Megatron's buffers of gradients on a CPU: the first gradient of a step is written, those after it are added.

Megatron fills its buffers with zeros first and adds every gradient: another pass over memory as large as the fp32
weights.  A buffer of which `is_empty` is true holds whatever the last step left, and whoever reads it fills it first.
"""

from torch import Tensor

from megatron_patch import kernels

PART = 1 << 20  # elements: 4 MiB as fp32; with an eighth of that the calls take as long as the additions


def empty(buffer: Tensor) -> None:
    """Forget what it holds."""
    buffer.is_empty = True


def begin(buffer: Tensor) -> bool:
    """Whether it is empty; it no longer is, and the caller writes to all of it."""
    was_empty = getattr(buffer, "is_empty", False)
    if was_empty:
        buffer.is_empty = False
    return was_empty


def fill(buffer: Tensor) -> Tensor:
    """The buffer, which holds zeros if it was empty."""
    if begin(buffer):
        buffer.zero_()
    return buffer


def add(total: Tensor, addend: Tensor, first: bool) -> None:
    """total += addend, or total = addend if it is the first; of one shape, and `total` in one piece."""
    if first:
        total.copy_(addend)
    elif total.dtype == addend.dtype:
        total.add_(addend)
    elif not kernels.add(total, addend):
        # torch adds two dtypes by way of a copy; part by part it is small and stays in the cache
        for part, of_addend in zip(total.view(-1).split(PART), addend.reshape(-1).split(PART), strict=True):
            part.add_(of_addend)


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [M, N] += left [M, K] @ right [K, N], or = if it is the first; torch multiplies into one dtype only."""
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    else:
        add(total, left @ right, first)
