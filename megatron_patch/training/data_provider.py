"""Our energon loaders as Megatron's data provider, and their state beside each checkpoint.

Megatron asks the training iterator for `save_state()` whenever it saves, before it marks the checkpoint as finished,
and writes the answer to `data/iter_0000010/mp_rank_00/train_dataloader_dprank000.pt`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_patch.data.loading.loader import build_train_loader, build_valid_loader
from megatron_patch.training.config import RunConfig
from megatron_patch.training.loader_state import read_saved_state


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


def build_loaders(
    settings: RunConfig, vp_stage: int | None = None
) -> tuple[TrainIterator | None, RepeatingIterator | None, None]:
    """Training and validation iterators of a (virtual) stage of this process; none on stages that need no data.

    First and last stage read the same records: the one the images and tokens, the other the labels.  Both decode, so
    that a record skipped by one is skipped by both.  Stages between them read them for where records begin in a row.
    """
    args = get_args()
    first, last = (
        at_end(ignore_virtual=False, vp_stage=vp_stage)
        for at_end in (mpu.is_pipeline_first_stage, mpu.is_pipeline_last_stage)
    )
    if not (first or last or args.packing or args.padding_free):
        return None, None, None
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    state = read_saved_state(Path(args.load), args.iteration, rank, size) if args.iteration > 0 else None
    train = build_train_loader(settings.train_dataset_path, settings.data, rank, size, with_pixels=first, state=state)
    valid = None
    if settings.valid_dataset_path:
        micro_batches = args.eval_iters * (args.global_batch_size // (args.micro_batch_size * size))
        loader = build_valid_loader(settings.valid_dataset_path, settings.data, rank, size, with_pixels=first)
        valid = RepeatingIterator(loader, micro_batches)
    return TrainIterator(train), valid, None
