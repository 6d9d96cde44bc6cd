"""Our energon loaders as Megatron's data provider, and their state beside each checkpoint.

Megatron asks the training iterator for `save_state()` whenever it saves, before it marks the checkpoint as finished,
and writes the answer to `data/iter_0000010/mp_rank_00/train_dataloader_dprank000.pt`.  Here it is read on resume.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_patch.data.loaders import build_train_loader, build_valid_loader
from megatron_patch.data.settings import DataSettings
from megatron_patch.errors import UserError
from megatron_patch.training.words import RunSettings

# Below the folder of checkpoints, beside theirs: Megatron takes a folder that holds something for a broken save.
DATA_FOLDER = "data"


class TrainIterator:
    """An endless iterator over micro-batches whose state can be saved."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.batches = loader, iter(loader)

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> dict[str, Tensor]:
        return next(self.batches)

    def save_state(self) -> dict[str, Any]:
        """Position after the micro-batches taken so far, in types that torch.load(weights_only=True) reads."""
        return self.loader.save_state()


class RepeatingIterator:
    """An iterator that starts over after `period` micro-batches, so that every evaluation sees the same records."""

    def __init__(self, loader: Any, period: int) -> None:
        self.loader, self.period, self.taken = loader, period, 0
        self.batches: Iterator = iter(())

    def __iter__(self) -> "RepeatingIterator":
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.taken % self.period == 0:
            self.batches = iter(self.loader)
        self.taken += 1
        return next(self.batches)


def data_settings(settings: RunSettings, args: Any) -> DataSettings:
    """What the data room needs to know, from the run's settings and Megatron's arguments."""
    geometry = settings.geometry
    # sequence parallelism cuts the sequence by TP, context parallelism into 2 * CP chunks
    sequence = args.tensor_model_parallel_size if args.sequence_parallel else 1
    context = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    return DataSettings(
        tokenizer_path=str(settings.llava_folder),
        template=settings.template,
        image_token_id=geometry.image_token_id,
        image_tokens=geometry.tower.image_tokens,
        side_px=geometry.tower.side_px,
        image_mean=settings.pixel_mean,
        image_aspect_ratio=args.image_aspect_ratio,
        center_crop=settings.center_crop,
        resample=settings.resample,
        decoder_seq_len=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        length_multiple=sequence * context,
        record_multiple=context,
        seed=args.seed,
        num_workers=args.num_workers,
        max_skipped_share=args.max_skipped_share,
        image_conv_front=args.image_conv_front,
        image_start_end=args.image_start_end,
        apply_exif_orientation=not args.ignore_exif_orientation,
        tile_columns=args.image_tiles[0],
        tile_rows=args.image_tiles[1],
        order=args.data_order,
        step_records=args.global_batch_size,
        mega_batch_mult=args.mega_batch_mult,
        packing=args.packing,
    )


def read_saved_state(folder: Path, iteration: int, rank: int) -> dict[str, Any]:
    """Loader state saved at `iteration`, of this data-parallel rank or, when there were fewer ranks, of rank 0.

    The position is the same number on every rank, so any of them serves; only the counts of records are a rank's own.

    Raises:
        UserError: it is not there, so the data position would silently start over.
    """
    states = folder / DATA_FOLDER / f"iter_{iteration:07d}" / "mp_rank_00"
    for number in (rank, 0):
        where = states / f"train_dataloader_dprank{number:03d}.pt"
        if where.is_file():
            return torch.load(where, weights_only=True, map_location="cpu")["dataloader_state_dict"]
    raise UserError(
        f"{where}: no data position in the checkpoint, so the data would start over; pass the checkpoint as "
        "PRETRAIN_CHECKPOINT_PATH of a new OUTPUT_BASEPATH if that is what you want"
    )


def build_loaders(settings: RunSettings) -> tuple[TrainIterator | None, RepeatingIterator | None, None]:
    """Training and validation iterators of this process; none on pipeline stages that need no data.

    First and last stage read the same records: the one the pictures and tokens, the other the labels.  Both decode, so
    that a record skipped by one is skipped by both.  Stages between them read packed rows for where records begin.
    """
    args = get_args()
    first = mpu.is_pipeline_first_stage()
    if not (first or mpu.is_pipeline_last_stage() or args.packing):
        return None, None, None
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    wanted = data_settings(settings, args)
    state = read_saved_state(Path(args.load), args.iteration, rank) if args.iteration > 0 else None
    train = build_train_loader(args.train_dataset_path, wanted, rank, size, with_pixels=first, state=state)
    valid = None
    if args.eval_iters:
        micro_batches = args.eval_iters * (args.global_batch_size // (args.micro_batch_size * size))
        loader = build_valid_loader(args.valid_dataset_path, wanted, rank, size, with_pixels=first)
        valid = RepeatingIterator(loader, micro_batches)
    return TrainIterator(train), valid, None
