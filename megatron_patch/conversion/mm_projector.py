"""mm_projector.bin: the projector alone, as stage 1 of the original LLaVA leaves it and stage 2 starts from it.

A torch.save of {"model.mm_projector.0.weight": [h, t], ...}; a linear projector has no number in its names.
"""

import re
from pathlib import Path

import torch

from megatron_patch.atomic_files import atomic_file
from megatron_patch.checkpoint_files import newest_iteration
from megatron_patch.conversion.adapters import open_weights
from megatron_patch.conversion.hub_weights import Stored, hub_name, open_weight_file
from megatron_patch.conversion.original_layout import original_name
from megatron_patch.conversion.output import check_disk
from megatron_patch.conversion.table import projector_rows
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.weight_names import check_nothing_differs, differences


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
    numbered = any(re.search(r"(?:^|\.)(?:\d+|linear_\d+)\.(?:weight|bias)$", name) for name in tensors)
    return "mlp2x_gelu" if numbered else "linear", tensors


def extract_projector(checkpoint: Path, target: Path, dtype: torch.dtype | None = None) -> tuple[str, int]:
    """Write the projector of a Megatron checkpoint's newest iteration; only its tensors are read.

    Args:
        dtype: of the file; None: as stored.
    Returns:
        Kind of the projector, bytes of its weights.
    Raises:
        UserError: the checkpoint has no such projector, or the target exists; nothing was written.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; remove it or choose another file")
    iteration = newest_iteration(checkpoint)
    geometry = LlavaFolder.of(checkpoint).geometry()
    tensors: dict[str, torch.Tensor] = {}
    with open_weights(checkpoint, geometry) as reader:
        wanted = {row.key: row.shape for row in projector_rows(geometry)}
        found = {key: entry.size for key, entry in reader.tensors.items() if key in wanted}
        check_nothing_differs(
            f"{iteration} does not hold the projector its config.json tells of",
            differences(found, wanted, "config.json says"),
        )
        for row in projector_rows(geometry):
            (part,) = row.parts  # the layouts of a projector are Same: one hub tensor each
            whole = reader.read(row.key, tuple(0 for _ in row.shape), row.shape)
            tensors[original_name(part.name, geometry.projector_type)] = whole.to(dtype or whole.dtype)
    return geometry.projector_type, _save(tensors, target)


def _save(tensors: dict[str, torch.Tensor], target: Path) -> int:
    """Returns the bytes of the weights."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    check_disk(target.parent, nbytes)
    try:
        with atomic_file(target, durable=True, replace=False) as beside, open(beside, "wb") as file:
            torch.save(tensors, file)  # given a path, it would write that name into the file
    except (OSError, RuntimeError) as error:
        raise UserError(f"writing {target} failed: {error}; nothing was left behind") from error
    return nbytes
