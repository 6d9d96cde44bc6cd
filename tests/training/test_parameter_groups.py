"""Learning rates per module, and a resume with another one than was saved."""

import re
from pathlib import Path

import pytest

from megatron_patch.conversion.torch_dist import CheckpointReader
from tests.training.launching import Workspace, losses, run

CONSTANT = {"LR": "1e-3", "MIN_LR": "1e-3", "LR_WARMUP_ITERS": 0}
SETTINGS = {"TRAIN_ITERS": 4, "SAVE_INTERVAL": 4, **CONSTANT}


def rates(printed: str) -> dict[int, float]:
    """Learning rate by iteration."""
    found = re.findall(r"iteration +(\d+)/.*?learning rate: ([0-9.E+-]+)", printed)
    return {int(number): float(rate) for number, rate in found}


def largest_change(before: Path, after: Path, name: str) -> float:
    """Of any entry of a weight, between two folders of an iteration."""
    values = []
    for folder in (before, after):
        with CheckpointReader(folder) as reader:
            size = reader.tensors[name].size
            values.append(reader.read(name, (0,) * len(size), tuple(size)))
    return (values[1] - values[0]).abs().max().item()


def test_modules_learn_at_their_own_rates(workspace: Workspace, tmp_path: Path) -> None:
    """Adam's first step moves an entry by the learning rate, whatever the gradient (Kingma and Ba 2015, section 2.1).

    Weight decay of AdamW takes lr * decay * weight beside it: 5e-3 * 20 = 10% of the projector's weights.
    """
    settings = {**SETTINGS, "TRAIN_ITERS": 1, "SAVE_INTERVAL": 1}
    rates = {"VISION_TOWER_LR": "2e-4", "PROJECTOR_LR": "5e-3", "PROJECTOR_WEIGHT_DECAY": "20"}
    run(workspace, tmp_path / "out", **settings, **rates)
    before, after = workspace.checkpoint / "release", tmp_path / "out/checkpoint/iter_0000001"
    fc2 = "decoder.layers.mlp.linear_fc2.weight"
    assert largest_change(before, after, f"language_model.{fc2}") == pytest.approx(1e-3, rel=1e-3)
    assert largest_change(before, after, f"vision_model.{fc2}") == pytest.approx(2e-4, rel=1e-3)
    assert largest_change(before, after, "vision_projection.encoder.linear_fc2.bias") == pytest.approx(5e-3, rel=1e-3)
    assert largest_change(before, after, "vision_projection.encoder.linear_fc2.weight") > 6e-3


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [{}, {"NPROC_PER_NODE": 2, "DO": "true"}])
def test_a_run_goes_on_with_another_learning_rate(parallelism: dict, workspace: Workspace, tmp_path: Path) -> None:
    first = run(workspace, tmp_path / "out", **SETTINGS, **parallelism)
    assert set(rates(first).values()) == {1e-3}
    again = run(
        workspace, tmp_path / "out", **{**SETTINGS, "TRAIN_ITERS": 6, "LR": "1e-4", "MIN_LR": "1e-4"}, **parallelism
    )
    assert rates(again) == {5: 1e-4, 6: 1e-4}
    assert all(loss < losses(first)[1] for loss in losses(again).values())
