"""megatron-core 0.19.2, core/dist_checkpointing/strategies/filesystem_async.py:243: `.to("cpu")` is all that it copies.

The process that writes an asynchronous save gets the trainer's own tensors when these are on a CPU: the queue moves
them to shared memory, training goes on in it, and the checkpoint mixes iterations.  The writer gets copies instead, in
few files that lie in memory: training waits for one pass over the bytes, made while Megatron plans the save; one
descriptor serves many tensors, and /dev/shm, which containers keep small, has no part in it.
"""

import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor

WHO = "patches.async_save_copies"
STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
CALLER = "megatron.core.dist_checkpointing.strategies.async_utils"
ALIGNMENT = 64  # bytes: a cache line, and more than any dtype asks for
BUFFERS = 1024  # that Linux takes in one call
THREADS = 8  # at most: more do not copy faster, and each takes descriptors
PARTS = 4  # for each thread: the one whose processor Megatron plans on copies fewer


class _Memory:
    """Bytes in memory that another process maps, once this was sent to it.

    They are written as a file is: beside other work on the machine, pages that a mapping asks for one by one took five
    times as long; on an idle one they take the same time.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint"), "wb", buffering=0)  # closes it with this object
        self._end = self._file.write(bytes(ALIGNMENT))  # a file of none cannot be mapped

    def append(self, tensors: Sequence["Tensor"]) -> list[int]:
        """Where a copy of each begins, in bytes.  Raises OSError where there is no memory for it.

        One call writes many: after each the thread waits for the interpreter, in which Megatron plans meanwhile.
        """
        import torch

        begins, buffers = [], []
        begin = self._end
        for tensor in tensors:
            begins.append(begin)
            as_bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            buffers += [memoryview(as_bytes.numpy()), memoryview(bytes(-len(as_bytes) % ALIGNMENT))]
            begin += sum(map(len, buffers[-2:]))
        while self._end < begin:
            done = os.pwritev(self._file.fileno(), buffers[:BUFFERS], self._end)
            self._end += done
            while buffers and done >= len(buffers[0]):
                done -= len(buffers.pop(0))
            if done:  # 2 GiB are all that a call writes
                buffers[0] = buffers[0][done:]
        return begins

    def __reduce__(self) -> tuple[Callable[..., mmap.mmap], tuple[DupFd]]:
        return _received, (DupFd(self._file.fileno()),)


def _received(descriptor: Any) -> mmap.mmap:
    number = descriptor.detach()
    try:
        return mmap.mmap(number, 0)
    finally:
        os.close(number)


class _Place(NamedTuple):
    memory: Any  # _Memory, or the mapping of it in the process that it was sent to
    begin: int
    dtype: Any
    shape: tuple[int, ...]


class _Copies:
    """Copies of tensors, which threads begin to make at once; these must not change until `of` returns."""

    def __init__(self, tensors: Sequence["Tensor"]) -> None:
        import torch

        count = min(torch.get_num_threads(), THREADS)
        share = sum(tensor.nbytes for tensor in tensors) / (PARTS * count) + 1
        # one thread after the other may write into a file, so each part is one of its own
        parts: list[list[Tensor]] = [[] for _ in range(PARTS * count)]
        begun = 0
        for tensor in tensors:
            parts[int(begun / share)].append(tensor)
            begun += tensor.nbytes
        threads = ThreadPoolExecutor(count)
        # holds the tensors: nothing else may get the memory that stands for them
        self._parts = [(part, threads.submit(_copied, part)) for part in parts]
        threads.shutdown(wait=False)

    def of(self, tensors: Sequence["Tensor"]) -> list[_Place]:
        """Where the copies are; what is not among the tensors of before is copied now.  Raises OSError: no memory."""
        places = {}
        for part, copied in self._parts:
            places.update(zip(map(_key, part), copied.result(), strict=True))
        others = [tensor for tensor in tensors if _key(tensor) not in places]
        if others:
            places.update(
                (_key(tensor), place[:2]) for tensor, place in zip(others, _Copies(others).of(others), strict=True)
            )
        return [_Place(*places[_key(tensor)], tensor.dtype, tuple(tensor.shape)) for tensor in tensors]


def _key(tensor: "Tensor") -> tuple:
    return tensor.data_ptr(), tensor.nbytes, None if tensor.is_contiguous() else tensor.stride()


def _copied(tensors: Sequence["Tensor"]) -> list[tuple[_Memory, int]]:
    memory = _Memory()
    return [(memory, begin) for begin in memory.append(tensors)]


class _Buckets:
    """Megatron's buckets (file, key, (contents, [(item, tensor)])) with places of copies; the writer gets tensors."""

    def __init__(self, buckets: list, copies: _Copies) -> None:
        places = iter(copies.of([tensor for *_, (_, found) in buckets for _, tensor in found]))
        self.buckets = [
            (file, key, (contents, [(item, next(places)) for item, _ in found]))
            for file, key, (contents, found) in buckets
        ]

    def __reduce__(self) -> tuple[Callable[..., list], tuple[list]]:
        return _restored, (self.buckets,)


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
    """Begin to copy when Megatron begins to plan, and send the copies to its writer."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    ahead: list[_Copies] = []  # of the save that is being planned

    def own_tensors(state: dict) -> list[torch.Tensor]:
        mine = (
            entry.data
            for entry in nested_values(state)
            if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id)
        )
        plain = (torch.Tensor, torch.nn.Parameter)
        return [tensor for tensor in mine if type(tensor) in plain and tensor.is_cpu and tensor.is_contiguous()]

    def copying(async_save: Callable[..., Any]) -> Callable[..., Any]:
        def copy_and_plan(self: Any, state: dict, *args: Any, **kwargs: Any) -> Any:
            if PersistentAsyncCaller._persistent_process is not None:  # else this is a synchronous save's
                ahead[:] = [_Copies(own_tensors(state))]
            return async_save(self, state, *args, **kwargs)

        return copy_and_plan

    def sending(schedule: Callable[..., None]) -> Callable[..., None]:
        def send(self: Any, request: Any) -> None:
            if request.preload_fn is not None:
                rank, buckets, queue = request.async_fn_args
                buckets = _Buckets(buckets, ahead.pop() if ahead else _Copies([]))
                request = request._replace(async_fn_args=(rank, buckets, queue), preload_fn=None)
            schedule(self, request)

        return send

    touch_points.wrap(STRATEGY, "TorchDistSaveShardedStrategy.async_save", WHO, copying)
    touch_points.wrap(CALLER, "PersistentAsyncCaller.schedule_async_call", WHO, sending)
