"""The moving average of the weights: by its formula from the saved weights, over a resume, and exported."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_patch.conversion import convert_to_huggingface
from megatron_patch.conversion.torch_dist import CheckpointReader
from tests.training.launching import Workspace, run

DECAY = 0.75
STEPS = 4
SETTINGS = {"EMA_DECAY": DECAY, "SAVE_INTERVAL": 1, "LR_WARMUP_ITERS": 0, "LR": "1e-2", "MIN_LR": "1e-3"}
TRAINED = ("language_model.decoder.layers.mlp.linear_fc1.weight", "vision_projection.encoder.linear_fc2.weight")
FROZEN = "vision_model.conv1.weight"


def weight(folder: Path, name: str) -> torch.Tensor:
    """A whole tensor of one iteration's folder."""
    with CheckpointReader(folder) as reader:
        size = reader.tensors[name].size
        return reader.read(name, (0,) * len(size), tuple(size))


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [{}, {"TP": 2, "NPROC_PER_NODE": 4, "DO": "true"}])
def test_the_average_follows_its_formula_over_a_resume(parallelism: dict, workspace: Workspace, tmp_path: Path) -> None:
    settings = {**SETTINGS, **parallelism, "FREEZE_VISION_TOWER": "true"}
    checkpoints = tmp_path / "out" / "checkpoint"
    for last in (2, STEPS):
        run(workspace, tmp_path / "out", TRAIN_ITERS=last, **settings)
    for name in TRAINED:
        average = weight(workspace.checkpoint / "release", name)
        for step in range(1, STEPS + 1):
            average = DECAY * average + (1 - DECAY) * weight(checkpoints / f"iter_{step:07}", name)
            saved = weight(checkpoints / "average" / f"iter_{step:07}", name)
            assert (saved - average).abs().max() <= 1e-6, (name, step)
        assert (saved - weight(checkpoints / f"iter_{STEPS:07}", name)).abs().max() > 1e-3
    newest = checkpoints / "average" / f"iter_{STEPS:07}"
    assert torch.equal(weight(newest, FROZEN), weight(workspace.checkpoint / "release", FROZEN))
    convert_to_huggingface(checkpoints / "average", tmp_path / "hf", model_size="tiny", precision="fp32")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    name = next(name for name in exported if name.endswith("multi_modal_projector.linear_2.weight"))
    assert torch.equal(exported[name], weight(newest, TRAINED[1]))
