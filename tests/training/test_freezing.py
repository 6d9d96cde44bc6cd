"""What a stage trains: with the launchers' own freezing, every frozen weight keeps its bytes and the others move."""

from pathlib import Path

import pytest
import torch

from megatron_patch.conversion.torch_dist import CheckpointReader
from tests.training.launching import Workspace, run

PARTS = ("language_model", "vision_model", "vision_projection")
# An empty variable is as good as none: the launcher's own default holds, where tests/training/launching.py sets others.
SHIPPED = {"FREEZE_LANGUAGE_MODEL": "", "FREEZE_VISION_TOWER": "", "FREEZE_PROJECTOR": "", "CONVERSATION_TEMPLATE": ""}
CASES = {
    "stage 1": (SHIPPED, {"vision_projection"}),
    "stage 2": (SHIPPED | {"script": "run_sft_mcore_llava.sh"}, {"language_model", "vision_projection"}),
    "the tower alone": (
        {"FREEZE_LANGUAGE_MODEL": "true", "FREEZE_VISION_TOWER": "false", "FREEZE_PROJECTOR": "true"},
        {"vision_model"},
    ),
}
# AdamW shrinks what it is given, even without a gradient: decay shows a weight that is only half frozen.
STEPS = {"TRAIN_ITERS": 2, "SAVE_INTERVAL": 2, "LR_WARMUP_ITERS": 0, "EVAL_ITERS": 0, "WEIGHT_DECAY": 0.1}


def weights(iteration: Path) -> dict[str, torch.Tensor]:
    """Every weight of the model in one iteration's folder, by its name."""
    with CheckpointReader(iteration) as reader:
        return {
            name: reader.read(name, (0,) * len(entry.size), tuple(entry.size))
            for name, entry in reader.tensors.items()
            if name.startswith(PARTS)
        }


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Over the rows that both have: a run pads the vocabulary by its tensor parallelism."""
    rows = min(len(one), len(other))
    return torch.equal(one[:rows].contiguous().view(torch.uint8), other[:rows].contiguous().view(torch.uint8))


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_keep_their_bytes_and_the_others_move(case: str, workspace: Workspace, tmp_path: Path) -> None:
    changes, trained = CASES[case]
    run(workspace, tmp_path / "out", **STEPS, **changes)
    before = weights(workspace.checkpoint / "release")
    after = weights(tmp_path / "out/checkpoint/iter_0000002")
    assert before.keys() == after.keys() and {name.split(".")[0] for name in before} == set(PARTS)
    moved = {name for name in before if not same_bytes(before[name], after[name])}
    assert moved == {name for name in before if name.split(".")[0] in trained}
