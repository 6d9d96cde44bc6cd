"""SAVE_OPTIM and LOAD_OPTIM: what a checkpoint holds, and how a run goes on without the optimizer's state."""

import re
from pathlib import Path

import pytest

from tests.training.launching import Workspace, losses, run
from tests.training.stored_checkpoint import tensors_of_run

STEPS = {"SAVE_INTERVAL": 4, "EVAL_ITERS": 0, "LR_WARMUP_ITERS": 3}
RATE = re.compile(r"iteration +(\d+)/.*learning rate: ([0-9.E+-]+)")


def rates(printed: str) -> dict[int, float]:
    return {int(number): float(rate) for number, rate in RATE.findall(printed)}


@pytest.fixture(scope="module")
def whole(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of eight iterations that is never stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, run(workspace, output, TRAIN_ITERS=8, **STEPS)


@pytest.mark.parametrize(
    ("saving", "going_on", "why"),
    [
        pytest.param({"SAVE_OPTIM": "false"}, {}, "it was saved with SAVE_OPTIM=false", marks=pytest.mark.slow),
        pytest.param({}, {"LOAD_OPTIM": "false"}, "LOAD_OPTIM=false", marks=pytest.mark.slow),
        pytest.param(
            {"SAVE_OPTIM": "false", "DO": "true", "NPROC_PER_NODE": 2},
            {"SAVE_OPTIM": "false", "TP": 2},
            "it was saved with SAVE_OPTIM=false",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_without_its_optimizer(
    saving: dict, going_on: dict, why: str, whole, workspace: Workspace, tmp_path: Path
) -> None:
    """Says so in one sentence; the learning rate is that of a run never stopped, the losses are not."""
    words = ["--exit-interval", "4"]
    first = run(workspace, tmp_path / "out", words=words, TRAIN_ITERS=8, **STEPS, **saving)
    assert "without its optimizer's state" not in first
    names = tensors_of_run(tmp_path / "out", 4)
    assert any(name.startswith("optimizer") for name in names) == ("SAVE_OPTIM" not in saving)
    again = run(workspace, tmp_path / "out", TRAIN_ITERS=8, **STEPS, **going_on)
    assert again.count(f"iter_0000004 without its optimizer's state ({why}): Adam's moments begin at zero") == 1
    expected, found = losses(whole[1]), losses(again)
    assert rates(again) == {number: rate for number, rate in rates(whole[1]).items() if number > 4}
    assert losses(first) | {5: found[5]} == pytest.approx({n: expected[n] for n in range(1, 6)}, rel=1e-5)
    assert found[8] != pytest.approx(expected[8], rel=1e-5)
    saved = any(name.startswith("optimizer") for name in tensors_of_run(tmp_path / "out", 8))
    assert saved == (going_on.get("SAVE_OPTIM") != "false")
