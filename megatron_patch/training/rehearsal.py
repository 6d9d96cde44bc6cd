"""One rank of a job of any size, on one CPU: everything that can go wrong before the first step.

The rank's real words go through every check and Megatron's own parser; its process groups, of torch's fake backend,
are those of the whole job; its part of the model is built without memory (meta device) and compared with the
checkpoint; its own slice of the data order is read, tokenised and collated.  Nothing is sent, computed or written.
"""

import contextlib
import io
import itertools
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from megatron_patch import device, patches
from megatron_patch.arguments import add_arguments
from megatron_patch.data.loading.loader import build_train_loader
from megatron_patch.errors import UserError
from megatron_patch.object_storage import StorageError
from megatron_patch.training.config import RunConfig, frozen_parts, read_config

MICRO_BATCHES = 2  # that are read
SHOWN_RECORDS = 4


@dataclass(frozen=True)
class Rehearsed:
    """What a rank of the job is."""

    rank: int
    world: int
    place: dict[str, tuple[int, int]]  # TP, PP, CP, DP -> rank and size
    layers: tuple[int, int]  # first and last decoder layer of its stage, from 0
    parameters: int  # of this rank
    trained: int
    micro_batches: int  # of a step
    records: list[str]  # the first that it reads
    shapes: list[tuple[int, ...]]  # of the micro-batches' tokens

    def text(self) -> str:
        """A few lines."""
        places = ", ".join(f"{name} {rank} of {size}" for name, (rank, size) in self.place.items())
        shapes = " and ".join(" x ".join(map(str, shape)) for shape in self.shapes) or "none: this stage reads no data"
        return "\n".join(
            (
                f"rank {self.rank} of {self.world}: {places}",
                f"  layers      {self.layers[0]} to {self.layers[1]} of the decoder",
                f"  parameters  {self.parameters:,}, {self.trained:,} of them trained",
                f"  a step      {self.micro_batches} micro-batches",
                f"  reads       {', '.join(self.records) or '-'}, ...",
                f"  tokens      {shapes}",
            )
        )


def rehearse(argv: list[str]) -> Rehearsed:
    """What the rank of the environment (RANK, WORLD_SIZE) does with the arguments of a run.

    Raises:
        UserError: it could not start.
    """
    settings = read_config(argv)
    patches.check(device.backend().NAME)
    warnings.simplefilter("ignore")
    patches.apply_all(device.backend().NAME)

    import torch
    from megatron.core import mpu
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    from megatron_patch.training.pretrain import model_builder
    from megatron_patch.training.strict_load import check_checkpoint, source_folder

    # the last ones win: nothing is written
    silent = ["--tensorboard-dir", "", "--wandb-project", "", "--fake-process-group"]
    sys.argv[1:] = [*settings.megatron_arguments, *silent]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = parse_and_validate_args(add_arguments)
            initialize_megatron(allow_no_cuda=True)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"Megatron refuses these arguments: {error}") from None
    build = model_builder(settings, frozen_parts(args))
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    with torch.device("meta"):
        model = build(pre_process=first, post_process=last)
    if (source := source_folder(args.load, args.pretrained_checkpoint)) is not None:
        check_checkpoint([model], source, alone=True)
    if settings.lora is not None:
        check_checkpoint([model], Path(args.init_from), settings.lora.iteration, alone=True, base=True)
    place = {
        "TP": (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
        "PP": (mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()),
        "CP": (mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()),
        "DP": (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()),
    }
    records, shapes = _records(settings, *place["DP"], reads=first or last)
    numbers = [layer.layer_number - 1 for layer in model.language_model.decoder.layers]
    parts = list(model.parameters())
    return Rehearsed(
        args.rank,
        args.world_size,
        place,
        (min(numbers), max(numbers)),
        sum(part.numel() for part in parts),
        sum(part.numel() for part in parts if part.requires_grad),
        args.global_batch_size // (args.micro_batch_size * place["DP"][1]),
        records,
        shapes,
    )


def _records(settings: RunConfig, rank: int, size: int, reads: bool) -> tuple[list[str], list[tuple[int, ...]]]:
    if not reads:
        return [], []
    loader = build_train_loader(settings.train_dataset_path, settings.data, rank, size)
    batches = list(itertools.islice(iter(loader), MICRO_BATCHES))
    names = [name for batch in batches for name in batch["record_ids"]]
    return names[:SHOWN_RECORDS], [tuple(batch["tokens"].shape) for batch in batches]


def main(argv: list[str]) -> int:
    """Print what the rank is; exit code 2 and one sentence when it could not start."""
    try:
        print(rehearse(argv).text())
    except (UserError, StorageError) as error:
        print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    return 0
