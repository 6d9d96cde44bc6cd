"""The model of a checkpoint outside the training loop, for verification and tests: Megatron's parser, no globals."""

import sys
from pathlib import Path

from megatron.core import mpu
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args

from megatron_patch import device
from megatron_patch.geometry import VOCABULARY_STEP
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.model.llava import LlavaModel
from megatron_patch.training.config import decoder_arguments


def build_model(
    checkpoint: Path, length: int, tensor: int, pipeline: int, context: int = 1, sequence_parallel: bool = False
) -> LlavaModel:
    """This rank's part of the checkpoint's model in fp32, without its weights.

    The process groups of these sizes exist already.  Overwrites sys.argv, from which Megatron's parser reads.

    Args:
        checkpoint: folder with `llava/`.
        length: tokens of the longest record.
        tensor, pipeline, context: parallel sizes.
    """
    folder = LlavaFolder.of(checkpoint)
    geometry = folder.geometry()
    sys.argv[1:] = [
        *device.megatron_arguments(sixteen_bits=False),
        *decoder_arguments(geometry.language, length),
        *("--seq-length", str(length), "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3"),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--calculate-per-token-loss"),
        *("--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)),
        *("--context-parallel-size", str(context)),
        *(["--sequence-parallel"] if sequence_parallel else []),
    ]
    args = parse_args()
    validate_args(args)
    images = folder.image_processing(geometry.tower.side_px)
    step = VOCABULARY_STEP * tensor
    model = LlavaModel(
        core_transformer_config_from_args(args),
        geometry,
        -(-geometry.language.vocabulary // step) * step,
        images["image_mean"],
        images["image_std"],
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
    )
    return model.to(device.current_device())
