"""The model of a checkpoint, or its tower, outside the training loop: Megatron's parser, no globals."""

import sys
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args

from megatron_patch import device
from megatron_patch.checkpoint_files import base_of, newest_iteration
from megatron_patch.errors import UserError
from megatron_patch.geometry import VOCABULARY_STEP, LlavaGeometry
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.lora import PARTS, LoraRecord
from megatron_patch.model.llava import LlavaModel, build_tower, own_name, tower_config, weight_shapes
from megatron_patch.step_flop import Frozen
from megatron_patch.training.adapters import load_adapters, load_whole
from megatron_patch.training.config import decoder_arguments
from megatron_patch.training.strict_load import gathered
from megatron_patch.weight_names import check_nothing_differs, differences

SIXTEEN_BITS = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"], torch.float32: []}


def build_model(
    checkpoint: Path,
    length: int,
    tensor: int,
    pipeline: int,
    context: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LlavaModel:
    """This rank's part of the checkpoint's model of local layers, without its weights: their values mean nothing.

    The process groups of these sizes exist already.  Overwrites sys.argv, from which Megatron's parser reads.

    Args:
        checkpoint: folder with `llava/`.
        length: tokens of the longest record.
        tensor, pipeline, context: parallel sizes.
        dtype: of the weights.
    """
    folder = LlavaFolder.of(checkpoint)
    geometry = folder.geometry()
    config = _decoder_config(
        geometry,
        length,
        *("--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)),
        *("--context-parallel-size", str(context)),
        *(["--sequence-parallel"] if sequence_parallel else []),
        *SIXTEEN_BITS[dtype],
        *device.megatron_arguments(sixteen_bits=False),
    )
    config.perform_initialization = False  # of 7B it takes a minute
    frozen = Frozen()
    if (record := folder.lora) is not None:
        frozen = Frozen(**{part: part not in record.trained for part in PARTS}).with_adapters(record.config)
    images = folder.image_processing(geometry.tower.side_px)
    step = VOCABULARY_STEP * tensor
    model = LlavaModel(
        config,
        geometry,
        -(-geometry.language.vocabulary // step) * step,
        images["image_mean"],
        images["image_std"],
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        frozen=frozen,
    )
    return model.to(device=device.current_device(), dtype=dtype)


def load_weights(model: LlavaModel, checkpoint: Path) -> None:
    """Read the newest iteration of the checkpoint into the model that build_model() made of it.

    Of adapters the base comes first, from where their training found it.

    Raises:
        UserError: on every rank alike: weights are missing, unknown or of another shape; the base is not there.
    """
    record = LlavaFolder.of(checkpoint).lora
    if record is None:
        load_whole([model], newest_iteration(checkpoint))
        return
    load_whole([model], _base_of_all(checkpoint, record))
    load_adapters(model, checkpoint)


def _base_of_all(checkpoint: Path, record: LoraRecord) -> Path:
    """base_of(), whose reading of the whole base one rank does for all.  Raises UserError, on every rank alike."""
    problem = None
    if torch.distributed.get_rank() == 0:
        try:
            base_of(checkpoint, record)
        except UserError as error:
            problem = str(error)
    if (told := gathered(problem)[0]) is not None:
        raise UserError(told)
    return Path(record.base, record.iteration)


def load_tower(geometry: LlavaGeometry, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> CLIPViTModel:
    """The vision tower as training in this dtype runs it, with its weights (names and layers as checkpoints have them).

    The process groups, of one process, exist already.  Overwrites sys.argv, from which Megatron's parser reads.

    Raises:
        UserError: weights are missing, unknown or of another shape.
    """
    config = tower_config(_decoder_config(geometry, 1, *SIXTEEN_BITS[dtype]), geometry.tower, "false")
    tower = build_tower(config, geometry.tower, ProcessGroupCollection.use_mpu_process_groups())
    own, given = tower.state_dict(), {}
    for name, value in weights.items():
        if ".layers." not in name:
            given[own_name(name, own)] = value
            continue
        for layer, of_layer in enumerate(value):
            given[own_name(name.replace(".layers.", f".layers.{layer}.", 1), own)] = of_layer
    lists = differences(weight_shapes(given), weight_shapes(own), "the model has")
    check_nothing_differs("the checkpoint's vision tower is not that of its llava/ folder", lists)
    tower.load_state_dict({name: given.get(name, value) for name, value in own.items()})
    return tower.to(device=device.current_device(), dtype=dtype).eval().requires_grad_(False)


def _decoder_config(geometry: LlavaGeometry, length: int, *arguments: str) -> TransformerConfig:
    """The decoder's config as Megatron's parser makes it for records of `length` tokens."""
    sys.argv[1:] = [
        *device.megatron_arguments(sixteen_bits="--bf16" in arguments or "--fp16" in arguments),
        *decoder_arguments(geometry.language, length),
        *("--seq-length", str(length), "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3"),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--calculate-per-token-loss"),
        "--no-gradient-accumulation-fusion",  # there is no gradient buffer outside of the training loop
        *arguments,
    ]
    args = parse_args()
    validate_args(args)
    return core_transformer_config_from_args(args)
