"""May this run read cached features of its tower?  They are those of one tower, one dataset and one way with images."""

import argparse
import hashlib
import os
from pathlib import Path

import torch

from megatron_patch.checkpoint_files import read_tensors
from megatron_patch.data.loading.blend import is_blend
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.errors import UserError
from megatron_patch.geometry import TowerGeometry

TOWER = "vision_model."  # what its names in a checkpoint begin with


def read_tower(iteration: Path) -> dict[str, torch.Tensor]:
    """The tower's weights in an iteration's folder, names without TOWER, layers stacked.  Raises UserError."""
    weights = read_tensors(iteration, TOWER)
    if not weights:
        raise UserError(f"{iteration}: holds no vision tower; wanted a checkpoint of a LLaVA")
    return {name.removeprefix(TOWER): value for name, value in weights.items()}


def hash_of(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """sha256 over names, shapes and values in the dtype in which a run holds them, which its checkpoints are in too."""
    told = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].to(dtype).contiguous()
        told.update(f"{name} {list(value.shape)}\n".encode())
        told.update(value.view(-1).view(torch.uint8).numpy())
    return told.hexdigest()


def check_feature_cache(
    arguments: argparse.Namespace,
    iteration: Path | None,
    data: DataConfig,
    pixel_std: tuple[float, float, float],
    tower: TowerGeometry,
) -> None:
    """Refuse a cache whose features are not those that this run's tower would make.

    The weights, seconds of reading for a large tower, are looked at by rank 0 alone, which ends the run for all.

    Args:
        arguments: of config.parse_own_arguments().
        iteration: folder of the weights that the run begins with; None: drawn at random.

    Raises:
        UserError: it is incomplete or of something else, or no cache can serve this run.
    """
    # here, for energon's import takes seconds
    from megatron_patch.data.loading.dataset import EnergonFolder
    from megatron_patch.data.loading.feature_cache import FeatureCache, FeatureKey

    if not arguments.freeze_vision_tower:
        raise UserError(
            "FEATURE_CACHE needs FREEZE_VISION_TOWER=true: the features of a tower that is trained change with every "
            "step; freeze it, or leave FEATURE_CACHE out"
        )
    if iteration is None:
        raise UserError(
            "FEATURE_CACHE needs the weights of a checkpoint, and with PRETRAIN_CHECKPOINT_PATH none the tower is "
            "drawn at random; leave FEATURE_CACHE out"
        )
    if is_blend(arguments.train_dataset_path):
        raise UserError(
            f"FEATURE_CACHE holds the features of one folder, and DATASET_PATH {arguments.train_dataset_path} lists "
            "several; pass one of them as DATASET_PATH, or leave FEATURE_CACHE out"
        )
    cache = FeatureCache(arguments.feature_cache)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    weights = cache.key.weights
    if os.environ.get("RANK", "0") == "0" and cache.dtype == dtype:
        weights = hash_of(read_tower(iteration), dtype)
    dataset = EnergonFolder(arguments.train_dataset_path, "train").fingerprint
    cache.check(FeatureKey.of(dataset, data, pixel_std, tower, weights, dtype))
