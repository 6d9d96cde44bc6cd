"""megatron-core 0.19.2, core/dist_checkpointing/strategies/torch.py:924, core/transformer/utils.py:80: loads copy.

torch's reader takes every tensor into memory of its own and copies it to where it belongs, and Megatron joins the
halves of each gated MLP, and of its optimizer state, in further memory.  A CPU's memory can be read into directly, and
halves that were read into one tensor lie beside each other already.  What is left to torch's reader: tensors on other
devices, of another dtype than saved, and columns of a matrix.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor

WHO = "patches.loaded_in_place"


def first_of_run(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> int | None:
    """The first element, counted in order, of a box of a tensor whose elements follow each other; None: they do not."""
    inside = False  # of an axis with more than one index: further axes must be whole
    for size, length in zip(shape, lengths, strict=True):
        if inside and length != size:
            return None
        inside |= length > 1
    return sum(offset * math.prod(shape[axis + 1 :]) for axis, offset in enumerate(offsets))


def beside_each_other(parts: Sequence["Tensor"]) -> "Tensor | None":
    """Tensors joined along their first axis, where their memory is one run in this order; else None."""
    first = parts[0]
    end = first.storage_offset()
    for part in parts:
        same = (part.dtype, part.shape[1:]) == (first.dtype, first.shape[1:]) and part.is_contiguous()
        begins = part.untyped_storage().data_ptr(), part.storage_offset()
        if not same or begins != (first.untyped_storage().data_ptr(), end):
            return None
        end += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def joined(parts: Sequence["Tensor"]) -> "Tensor":
    """Tensors joined along their first axis, without a copy where they were read into one."""
    import torch

    whole = beside_each_other(parts)
    return torch.cat(list(parts)) if whole is None else whole


def apply() -> None:
    """Read to where the tensors are, and join nothing that is joined."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    from megatron_patch.checkpoint_files import STRANGE, TensorArchive, fill

    class Reader(FileSystemReader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            with ExitStack() as opened, ThreadPoolExecutor(torch.get_num_threads()) as threads:
                paths = {self.storage_data[item.storage_index].relative_path for item in plan.items}
                files = {path: opened.enter_context(open(self.path / path, "rb")).fileno() for path in sorted(paths)}
                done = list(threads.map(partial(self._read, files, planner), plan.items))
            left = [item for item, is_done in zip(plan.items, done, strict=True) if not is_done]
            return super().read_data(replace(plan, items=left), planner)

        def _read(self, files: dict[str, int], planner: Any, item: Any) -> bool:
            """False: nothing has been read, and torch's reader knows how, or what is wrong."""
            where = self.storage_data[item.storage_index]
            if item.type == LoadItemType.BYTE_IO or where.transform_descriptors:
                return False
            target = planner.resolve_tensor(item).detach()
            if type(target) is not torch.Tensor or not target.is_cpu or not target.is_contiguous():
                return False
            file = files[where.relative_path]
            try:
                archive = TensorArchive(file, where.offset, where.length)
                saved = archive.place(archive.saved)
            except STRANGE:
                return False
            if saved is None or saved.dtype != target.dtype or target.shape != item.lengths:
                return False
            first = first_of_run(saved.shape, item.storage_offsets, item.lengths)
            if first is None:
                return False
            fill(target, file, saved.position + first * saved.dtype.itemsize)
            planner.commit_tensor(item, target)
            return True

    def of_this_kind(reader_of: Callable[..., Any]) -> Callable[..., Any]:
        def reader(*args: Any, **kwargs: Any) -> Any:
            found = reader_of(*args, **kwargs)
            return Reader(found.path) if type(found) is FileSystemReader else found

        return reader

    touch_points.wrap("megatron.core.dist_checkpointing.strategies.torch", "_get_filesystem_reader", WHO, of_this_kind)
    touch_points.replace("megatron.core.transformer.mlp", "cat_with_oom_fallback", WHO, torch.no_grad()(joined))
