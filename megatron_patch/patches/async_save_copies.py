"""megatron-core 0.19.2, core/dist_checkpointing/strategies/filesystem_async.py:243: `.to("cpu")` is all that it copies.

The process that writes an asynchronous save gets the trainer's own tensors when these are on a CPU: the queue moves
them to shared memory, training goes on in it, and the checkpoint mixes iterations.  The writer gets copies instead, all
in one file that lies in memory: training waits for one pass over the bytes, one descriptor serves all tensors, and
/dev/shm, which containers keep small, has no part in it.
"""

import functools
import math
import mmap
import os
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor

ASYNC = "megatron.core.dist_checkpointing.strategies.async_utils"
ALIGNMENT = 64  # bytes: a cache line, and more than any dtype asks for


def with_copies(schedule: Callable[..., None]) -> Callable[..., None]:
    """Wrap PersistentAsyncCaller.schedule_async_call(request): the writer's buckets hold copies of the tensors."""

    @functools.wraps(schedule)
    def schedule_copies(self: Any, request: Any) -> None:
        if request.preload_fn is not None:
            rank, buckets, queue = request.async_fn_args
            # the writer puts what preload_fn returns in the place of the buckets
            request = request._replace(async_fn_args=(rank, None, queue), preload_fn=_copied(buckets))
        schedule(self, request)

    return schedule_copies


class _Memory:
    """Bytes that another process sees as well, once they were sent to it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._file = os.fdopen(descriptor, "r+b")  # closes it with this object
        self.size, self.bytes = size, mmap.mmap(descriptor, size)

    def __reduce__(self) -> tuple[Callable[..., "_Memory"], tuple[DupFd, int]]:
        return _received, (DupFd(self._file.fileno()), self.size)


def _new_memory(size: int) -> _Memory:
    descriptor = os.memfd_create("checkpoint")
    os.ftruncate(descriptor, size)
    return _Memory(descriptor, size)


def _received(descriptor: Any, size: int) -> _Memory:
    return _Memory(descriptor.detach(), size)


def _copied(buckets: list) -> Callable[[], list]:
    """Buckets (file, key, (contents, [(item, tensor)])) -> a function for another process that gives the same anew."""
    places, end = [], 0
    for file, key, (contents, tensors) in buckets:
        found = []
        for item, tensor in tensors:
            found.append((item, (end, tensor.dtype, tensor.shape)))
            end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        places.append((file, key, (contents, found)))
    restore = functools.partial(_restored, _new_memory(max(end, 1)), places)  # nothing cannot be mapped
    for (*_, (_, copies)), (*_, (_, tensors)) in zip(restore(), buckets, strict=True):
        for (_, copy), (_, tensor) in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
    return restore


def _restored(memory: _Memory, places: list) -> list:
    return [
        (file, key, (contents, [(item, _tensor(memory, *place)) for item, place in found]))
        for file, key, (contents, found) in places
    ]


def _tensor(memory: _Memory, begin: int, dtype: Any, shape: tuple[int, ...]) -> "Tensor":
    """Of a storage of its own, for torch.save() writes the whole storage of what it is given."""
    import torch

    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory.bytes, dtype=dtype, count=count, offset=begin).view(shape)


def apply() -> None:
    """Copy between the request for a save and the queue to its writer."""
    touch_points.wrap(ASYNC, "PersistentAsyncCaller.schedule_async_call", "patches.async_save_copies", with_copies)
