"""The loader's state in a folder of checkpoints, as Megatron lays it down with each of them."""

from pathlib import Path
from typing import Any

import torch

from megatron_patch.data.loading.state import redistribute
from megatron_patch.errors import UserError

# Below the folder of checkpoints, beside theirs: Megatron takes a folder that holds something for a broken save.
DATA_FOLDER = "data"


def read_saved_state(folder: Path, iteration: int, rank: int, size: int) -> dict[str, Any]:
    """Loader state for data-parallel rank `rank` of `size`, from what was saved at `iteration` by any number of ranks.

    Raises:
        UserError: it is not there, not whole, or not that of every rank; the data would silently start over.
    """
    states = folder / DATA_FOLDER / f"iter_{iteration:07d}"
    first = _read_rank(states, 0)
    saved = first.get("topology", {}).get("data_parallel_size", size)
    if saved == size:
        return _read_rank(states, rank)
    others = range(1, saved) if rank == 0 else ()
    return redistribute([first, *(_read_rank(states, number) for number in others)], rank, size)


def _read_rank(states: Path, rank: int) -> dict[str, Any]:
    """What one data-parallel rank saved."""
    for ranks in ("mp_rank_00", "mp_rank_00_000"):  # the second where the saving run had pipeline stages
        where = states / ranks / f"train_dataloader_dprank{rank:03d}.pt"
        if where.is_file():
            try:
                return torch.load(where, weights_only=True, map_location="cpu")["dataloader_state_dict"]
            except Exception as error:  # whatever a file that is cut off or strange may raise
                raise UserError(
                    f"{where}: the data position cannot be read ({type(error).__name__}); resume from an older one"
                ) from error
    raise UserError(
        f"{states}: no data position{f' of rank {rank}' if rank else ''} in the checkpoint, so the data would start "
        "over; pass the checkpoint as PRETRAIN_CHECKPOINT_PATH of a new OUTPUT_BASEPATH if that is what you want"
    )
