"""Around Megatron's load_checkpoint: every weight is there, or the run stops with a sentence; one line says what came.

Megatron's default of --dist-ckpt-strictness looks for nothing, and a missing weight then ends in a traceback of every
rank; its other values fail under torch 2.15 (`torch.empty` gets `strides`).  For the format `torch` it answers a failed
strict load with one that is not strict.  So names and shapes are compared here, before anything is read.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_patch.checkpoint_files import (
    NOT_WEIGHTS,
    RANK_FILE,
    TRACKER,
    PlacedTensor,
    checkpoint_format,
    newest_iteration,
    rank_folder_name,
    rank_folders,
    read_metadata,
    read_rank_file,
)
from megatron_patch.errors import UserError
from megatron_patch.model.llava import LlavaModel, own_name, weight_shapes
from megatron_patch.weight_names import check_nothing_differs, differences, without_padding

Shapes = dict[str, tuple[int, ...]]


def source_folder(load: str | None, pretrained: str | None) -> Path | None:
    """The checkpoint that Megatron will read: the one to resume, else the one to start from."""
    for folder in (load, pretrained):
        if folder is not None and (Path(folder) / TRACKER).is_file():
            return Path(folder)
    return None


def content_metadata(iteration: Path) -> dict[str, Any]:
    """For sharded_state_dict(), of what an iteration of the format torch_dist holds: layers stacked or one by one."""
    metadata = dist_checkpointing.load_content_metadata(str(iteration)) or {}
    return metadata | {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}


def _distributed_shapes(model: list[LlavaModel], iteration: Path, base: bool) -> tuple[Shapes, Shapes, int]:
    """(wanted by this rank, stored, number of other tensors) of a torch_dist checkpoint, by global name and shape."""
    metadata = content_metadata(iteration)
    wanted: Shapes = {}
    for part in model:
        state = part.base_sharded_state_dict(metadata) if base else part.sharded_state_dict(metadata=metadata)
        for value in _flat(state):
            if isinstance(value, ShardedTensor) and not value.key.endswith("_extra_state"):
                wanted[value.key] = tuple(value.global_shape)
    stored: Shapes = {}
    others = 0
    for key, entry in read_metadata(iteration).state_dict_metadata.items():
        if key.startswith(NOT_WEIGHTS):
            others += not key.startswith("common_state")  # arguments and counters: always read
        elif isinstance(entry, TensorStorageMetadata) and not key.endswith("_extra_state"):
            stored[key] = tuple(entry.size)
    return wanted, stored, others


def _flat(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in _flat(child)]
    if isinstance(value, list | tuple):
        return [leaf for child in value for leaf in _flat(child)]
    # a factory (gate and up stacked) splits its tensor only while saving
    return _flat(value.build()) if hasattr(value, "build") else [value]


def _rank_shapes(model: list[LlavaModel], iteration: Path, base: bool) -> tuple[Shapes, Shapes, int]:
    """The same for this rank's file of the format `torch`.

    Raises:
        UserError: the files are those of another TP or PP.
    """
    tensor, pipeline = mpu.get_tensor_model_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size()
    ranks = rank_folders(iteration)
    have = tuple(max(numbers) + 1 for numbers in zip(*ranks, strict=True))
    if have != (tensor, pipeline):
        raise UserError(
            f"{iteration} holds files for TP {have[0]} x PP {have[1]}, this run is TP {tensor} x PP {pipeline}; "
            "run with those, or convert to the format torch_dist, which every parallelism reads"
        )
    name = rank_folder_name(mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank(), pipeline > 1)
    if len(model) > 1:
        raise UserError("the format torch is not read by an interleaved pipeline here; use torch_dist")
    left_out = model[0].adapter_names() if base else ()
    own = {name: value for name, value in model[0].state_dict().items() if name not in left_out}
    places = read_rank_file(iteration / name / RANK_FILE)
    stored = {own_name(key, own): place.shape for key, place in places.items() if not key.endswith("_extra_state")}
    return weight_shapes(own), stored, 0


def read_rank_weights(iteration: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of this rank's file of the format `torch`, read as far as they are looked at."""
    ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    path = iteration / rank_folder_name(*ranks, mpu.get_pipeline_model_parallel_world_size() > 1) / RANK_FILE
    return {name: _mapped(path, place) for name, place in read_rank_file(path).items()}


def _mapped(path: Path, place: PlacedTensor) -> torch.Tensor:
    """A tensor in a file, read as far as it is looked at; changes to it stay in memory."""
    count = math.prod(place.shape) * place.dtype.itemsize
    data = np.memmap(path, np.uint8, "c", place.position, count)
    return torch.from_numpy(data).view(place.dtype).reshape(place.shape)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    if not torch.distributed.is_initialized():
        return [value]
    result: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(result, value)
    return result


def check_checkpoint(
    model: list[LlavaModel], checkpoint: Path, name: str | None = None, alone: bool = False, base: bool = False
) -> str:
    """Compare the newest iteration of a checkpoint (or the one of that name) with the model, over all ranks.

    alone: there are no other ranks to ask; weights that are not this one's are passed over.
    base: it is what adapters are trained on.

    Returns:
        One line: how many weights will be loaded, skipped, newly initialised.
    Raises:
        UserError: on every rank alike, with the weights that are missing, unknown or of another shape.
    """
    problem, wanted, stored, others = None, {}, {}, 0
    try:
        iteration = newest_iteration(checkpoint) if name is None else checkpoint / name
        is_torch = checkpoint_format(iteration) == "torch"
        wanted, stored, others = (_rank_shapes if is_torch else _distributed_shapes)(model, iteration, base)
    except UserError as error:
        problem, is_torch = str(error), False
    if alone:
        stored = {key: shape for key, shape in stored.items() if key in wanted}
    reports = [(problem, wanted, stored)] if alone else gathered((problem, wanted, stored))
    for text in (report[0] for report in reports):
        if text is not None:
            raise UserError(text)
    if is_torch:  # every rank has names of its own
        pairs = [(report[1], report[2]) for report in reports]
    else:
        everything = {key: shape for report in reports for key, shape in report[1].items()}
        vocabulary = model[0].geometry.language.vocabulary
        pairs = [(everything, without_padding(stored, everything, vocabulary))]
    of_ranks = [differences(found, asked, "the model has") for asked, found in pairs]
    check_nothing_differs(
        f"{iteration} does not hold this model's weights; convert it again, or start from the checkpoint that belongs "
        "to this model",
        {title: sorted({name for lists in of_ranks for name in lists[title]}) for title in of_ranks[0]},
    )
    loaded = len({key for asked, _ in pairs for key in asked})
    skipped = f"{others} skipped (no weights)" if others else "0 skipped"
    return f"weights: {loaded} loaded from {iteration}, {skipped}, 0 newly initialised"


def strict(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's load_checkpoint(model, optimizer, scheduler, ...)."""

    def wrapped(ddp_model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        settings = get_args()
        folder = source_folder(settings.load, settings.pretrained_checkpoint)
        if folder is not None and settings.ckpt_format in ("torch_dist", "torch"):
            name = None if settings.ckpt_step is None else f"iter_{settings.ckpt_step:07}"
            print_rank_0(check_checkpoint(unwrap_model(ddp_model), folder, name))
        elif folder is None and not settings.lora_rank:  # adapters.py says what it loads
            print_rank_0("weights: 0 loaded, 0 skipped, all newly initialised (no checkpoint given)")
        return load_checkpoint(ddp_model, *args, **kwargs)

    return wrapped
