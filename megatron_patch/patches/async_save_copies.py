"""megatron-core 0.19.2, core/dist_checkpointing/strategies/filesystem_async.py:243: `.to("cpu")` is all that it copies.

The process that writes an asynchronous save gets the trainer's own tensors when these are on a CPU: the queue moves
them to shared memory, training goes on in it, and the checkpoint mixes iterations.  The writer gets copies instead, in
few files that lie in memory: training waits for one pass over the bytes, one descriptor serves many tensors, and
/dev/shm, which containers keep small, has no part in it.
"""

import functools
import itertools
import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points
from megatron_patch.patches.written_in_pieces import Pieces

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
    """Bytes in memory that another process maps, once this was sent to it.

    They are written as a file is: beside other work on the machine, pages that a mapping asks for one by one took five
    times as long; on an idle one they take the same time.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint"), "wb")  # closes it with this object
        self._file.write(bytes(1))  # a file of none cannot be mapped

    def append(self, tensor: "Tensor") -> int:
        """Where a copy of it begins, in bytes.  Raises OSError where there is no memory for it."""
        import torch

        begin = math.ceil(self._file.tell() / ALIGNMENT) * ALIGNMENT
        if tensor.numel():  # Python makes no bytes of nothing
            self._file.seek(begin)
            Pieces(self._file).write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return begin

    def __reduce__(self) -> tuple[Callable[..., mmap.mmap], tuple[DupFd]]:
        self._file.flush()
        return _received, (DupFd(self._file.fileno()),)


def _received(descriptor: Any) -> mmap.mmap:
    number = descriptor.detach()
    try:
        return mmap.mmap(number, 0)
    finally:
        os.close(number)


def _copied(buckets: list) -> Callable[[], list]:
    """Buckets (file, key, (contents, [(item, tensor)])) -> a function for another process that gives the same anew.

    One thread after the other may write into a file, so each of them fills one of its own.
    """
    import torch

    tensors = [tensor for *_, (_, found) in buckets for _, tensor in found]
    count = torch.get_num_threads()
    share = sum(tensor.nbytes for tensor in tensors) / count + 1
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    begun = 0
    for tensor in tensors:
        parts[int(begun / share)].append(tensor)
        begun += tensor.nbytes
    with ThreadPoolExecutor(count) as threads:
        places = itertools.chain.from_iterable(threads.map(_copied_part, parts))
        return functools.partial(
            _restored,
            [
                (file, key, (contents, [(item, next(places)) for item, _ in found]))
                for file, key, (contents, found) in buckets
            ],
        )


def _copied_part(tensors: list["Tensor"]) -> list[tuple]:
    memory = _Memory()
    return [(memory, memory.append(tensor), tensor.dtype, tensor.shape) for tensor in tensors]


def _restored(buckets: list) -> list:
    return [
        (file, key, (contents, [(item, _tensor(*place)) for item, place in found]))
        for file, key, (contents, found) in buckets
    ]


def _tensor(memory: mmap.mmap, begin: int, dtype: Any, shape: tuple[int, ...]) -> "Tensor":
    """Of a storage of its own, for torch.save() writes the whole storage of what it is given."""
    import torch

    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)


def apply() -> None:
    """Copy between the request for a save and the queue to its writer."""
    touch_points.wrap(ASYNC, "PersistentAsyncCaller.schedule_async_call", "patches.async_save_copies", with_copies)
