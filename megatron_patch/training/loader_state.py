"""The loader's state in a folder of checkpoints, as Megatron lays it down with each of them."""

from pathlib import Path
from typing import Any

import torch

from megatron_patch.errors import UserError

# Below the folder of checkpoints, beside theirs: Megatron takes a folder that holds something for a broken save.
DATA_FOLDER = "data"


def read_saved_state(folder: Path, iteration: int, rank: int) -> dict[str, Any]:
    """Loader state saved at `iteration`, of this data-parallel rank or, when there were fewer ranks, of rank 0.

    The position is the same number on every rank, so any of them serves; only the counts of records are a rank's own.

    Raises:
        UserError: it is not there or not whole, so the data position would silently start over.
    """
    states = folder / DATA_FOLDER / f"iter_{iteration:07d}"
    for number in (rank, 0):
        for ranks in ("mp_rank_00", "mp_rank_00_000"):  # the second where the saving run had pipeline stages
            where = states / ranks / f"train_dataloader_dprank{number:03d}.pt"
            if where.is_file():
                try:
                    return torch.load(where, weights_only=True, map_location="cpu")["dataloader_state_dict"]
                except Exception as error:  # whatever a file that is cut off or strange may raise
                    raise UserError(
                        f"{where}: the data position cannot be read ({type(error).__name__}); resume from an older one"
                    ) from error
    raise UserError(
        f"{states}: no data position in the checkpoint, so the data would start over; pass the checkpoint as "
        "PRETRAIN_CHECKPOINT_PATH of a new OUTPUT_BASEPATH if that is what you want"
    )
