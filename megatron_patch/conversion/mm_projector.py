"""mm_projector.bin: the projector alone, as stage 1 of the original LLaVA leaves it and stage 2 starts from it.

A torch.save of {"model.mm_projector.0.weight": [h, t], ...}; a linear projector has no number in its names.
"""

import os
import re
from pathlib import Path

import torch

from megatron_patch.conversion.hub_weights import Stored, hub_name, open_weight_file
from megatron_patch.conversion.original_layout import original_name
from megatron_patch.conversion.output import check_disk
from megatron_patch.conversion.table import Row
from megatron_patch.conversion.torch_dist import CheckpointReader
from megatron_patch.errors import UserError


def read_projector(path: Path) -> tuple[str, dict[str, Stored]]:
    """Kind of the projector, told by its names, and raw name -> tensor; nothing in the file is executed.

    Raises:
        UserError: no such file, no weight file, or none of its names is a projector's.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; wanted an mm_projector.bin")
    tensors = open_weight_file(path)
    if not any(hub_name("projector", name) for name in tensors):
        shown = ", ".join(list(tensors)[:8]) or "nothing"
        raise UserError(f"{path} holds no projector but {shown}; wanted model.mm_projector.0.weight and the like")
    numbered = any(re.search(r"(?:^|\.)(?:[0-9]+|linear_[0-9]+)\.(?:weight|bias)$", name) for name in tensors)
    return "mlp2x_gelu" if numbered else "linear", tensors


def write_projector(
    reader: CheckpointReader, rows: list[Row], kind: str, target: Path, dtype: torch.dtype | None
) -> int:
    """Write the projector of a checkpoint; only its tensors are read.

    Args:
        rows: those of the projector.
        dtype: of the file; None: as stored.
    Returns:
        Bytes of weights.
    Raises:
        UserError: the checkpoint has no such projector; the target exists; nothing was written.
    """
    problems = []
    for row in rows:
        entry = reader.tensors.get(row.key)
        if entry is None:
            problems.append(f"{row.key} is missing")
        elif tuple(entry.size) != row.shape:
            problems.append(f"{row.key} is {list(entry.size)}, config.json says {list(row.shape)}")
    if problems:
        raise UserError(f"the checkpoint does not hold the projector its config.json tells of: {'; '.join(problems)}")
    tensors = {}
    for row in rows:
        (part,) = row.parts  # a projector's layouts are Same: one hub tensor each
        whole = reader.read(row.key, tuple(0 for _ in row.shape), row.shape)
        tensors[original_name(part.name, kind)] = whole if dtype is None else whole.to(dtype)
    return save_file(tensors, target)


def save_file(tensors: dict[str, torch.Tensor], target: Path) -> int:
    """torch.save beside the target, then renamed; returns the bytes of the weights."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; remove it or choose another file")
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    check_disk(target.parent, nbytes)
    beside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, target)  # unlike a rename it fails when the target appeared meanwhile
    except (OSError, RuntimeError) as error:
        raise UserError(f"writing {target} failed: {error}; nothing was left behind") from error
    finally:
        beside.unlink(missing_ok=True)
    return nbytes
