"""A record whose loss is NaN: the run does as it was told, and names the record."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from megatron_patch.training.loss_spikes import LossHistory
from tests.training.launching import Workspace, losses, run
from tests.training.poison import RECORD, overflowing_checkpoint, poisoned_workspace, spoilt_checkpoint
from tests.training.stored_checkpoint import assert_same_bits, tensors_of_run

STEPS = {"TRAIN_ITERS": 6, "SAVE_INTERVAL": 2, "EVAL_ITERS": 0}
PARALLELISMS = {
    "TP2": {"TP": 2},
    "PP2": {"PP": 2},
    "CP2": {"CP": 2},
    "DP2 + distributed optimizer": {"NPROC_PER_NODE": 2, "DO": "true"},
}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return poisoned_workspace(tmp_path_factory.mktemp("poisoned"))


@pytest.fixture(scope="module")
def skipped(poisoned: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Output, log and the bad iteration of a run in one process that drops it."""
    output = tmp_path_factory.mktemp("skipped") / "out"
    printed = run(poisoned, output, ON_BAD_LOSS="skip", **STEPS)
    return output, printed, written_down(output)[0]["iteration"]


def written_down(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "bad_batches.jsonl").read_text().splitlines()]


def test_the_step_is_dropped_and_the_record_named(skipped: tuple[Path, str, int]) -> None:
    output, printed, iteration = skipped
    (line,) = written_down(output)
    assert RECORD in line["record_ids"] and len(line["record_ids"]) == 2
    assert (line["loss"], line["reason"], line["rank"]) == ("nan", "the loss is not finite", 0)
    assert f"iteration {iteration}: the loss is not finite" in printed and f"{RECORD}" in printed
    found = losses(printed)
    trained = [found[number] for number in found if number != iteration]
    assert len(trained) == 5 and all(math.isfinite(loss) and loss > 0 for loss in trained)
    bad = {name for name, data in tensors_of_run(output, 6).items() if data.numel() % 4 == 0 and not_finite(data)}
    assert all("word_embeddings" in name for name in bad), bad  # the poisoned row, as it came


def not_finite(data: torch.Tensor) -> bool:
    return not bool(data.view(torch.float32).isfinite().all())


@pytest.mark.slow
def test_the_run_stops_and_goes_on_without_that_iteration(poisoned, skipped, tmp_path: Path) -> None:
    """By default exit code 1; with the window left out on resuming, the weights are those of the run above."""
    output, _, iteration = skipped
    printed = run(poisoned, tmp_path / "out", expected_exit=1, **STEPS)
    assert printed.count("error: ") == 1 and f"error: iteration {iteration}: the loss is not finite" in printed
    assert f"records {', '.join(written_down(tmp_path / 'out')[0]['record_ids'])}" in printed
    saved = (iteration - 1) // 2 * 2
    assert (tmp_path / "out/checkpoint/latest_checkpointed_iteration.txt").read_text() == str(saved)
    words = ["--skip-train-iteration-range", f"{iteration}-{iteration}", "400-410"]
    printed = run(poisoned, tmp_path / "out", words=words, **STEPS)
    assert f"iteration {iteration} is left out, as asked" in printed
    assert min(losses(printed)) == saved + 1
    assert_same_bits(tensors_of_run(tmp_path / "out", 6), tensors_of_run(output, 6))


def test_roll_back(poisoned, skipped, tmp_path: Path) -> None:
    output, _, iteration = skipped
    printed = run(poisoned, tmp_path / "out", ON_BAD_LOSS="rollback", MAX_ROLLBACKS=1, **STEPS)
    assert printed.count("starting again from the last checkpoint; rollbacks left: 0") == 1
    assert json.loads((tmp_path / "out/checkpoint/iterations_to_skip.json").read_text()) == [iteration]
    assert_same_bits(tensors_of_run(tmp_path / "out", 6), tensors_of_run(output, 6))
    printed = run(poisoned, tmp_path / "none", expected_exit=75, ON_BAD_LOSS="rollback", MAX_ROLLBACKS=0, **STEPS)
    assert "error: MAX_ROLLBACKS are used up" in printed


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_every_layout_decides_alike(parallelism: str, poisoned, skipped, tmp_path: Path) -> None:
    """The same record, the same losses of the other steps; and left out by its number the same bits."""
    _, printed, iteration = skipped
    expected = losses(printed)
    found = losses(run(poisoned, tmp_path / "out", ON_BAD_LOSS="skip", **STEPS, **PARALLELISMS[parallelism]))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4)
    assert {line["iteration"] for line in written_down(tmp_path / "out")} == {iteration}
    assert all(RECORD in line["record_ids"] for line in written_down(tmp_path / "out"))
    words = ["--skip-train-iteration-range", str(iteration)]
    run(poisoned, tmp_path / "left out", words=words, **STEPS, **PARALLELISMS[parallelism])
    assert_same_bits(tensors_of_run(tmp_path / "left out", 6), tensors_of_run(tmp_path / "out", 6))


@pytest.mark.slow
def test_weights_that_are_bad_end_the_run(workspace: Workspace, tmp_path: Path) -> None:
    """No step can be trained on: skipping has an end."""
    spoilt = Workspace(spoilt_checkpoint(tmp_path), workspace.dataset)
    printed = run(spoilt, tmp_path / "out", expected_exit=1, ON_BAD_LOSS="skip", **{**STEPS, "TRAIN_ITERS": 60})
    assert [line["iteration"] for line in written_down(tmp_path / "out")[::4]] == list(range(1, 12))
    assert "so were the 10 before, so the weights may be bad" in printed


@pytest.mark.parametrize("clip", ["1.0", pytest.param("0", marks=pytest.mark.slow)], ids=["clipped", "not clipped"])
def test_a_gradient_that_is_not_finite_moves_nothing(workspace: Workspace, tmp_path: Path, clip: str) -> None:
    """The losses are finite, and the optimizer takes no step; ten such steps in a row end the run."""
    overflowing = Workspace(overflowing_checkpoint(tmp_path), workspace.dataset)
    settings = {**STEPS, "TRAIN_ITERS": 60, "SAVE_INTERVAL": 60, "CLIP_GRAD": clip}
    printed = run(overflowing, tmp_path / "out", expected_exit=1, ON_BAD_LOSS="skip", **settings)
    lines = written_down(tmp_path / "out")
    assert {line["reason"] for line in lines} == {"the gradient is not finite"}
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert sorted({line["iteration"] for line in lines}) == list(range(1, 12))
    assert "so were the 10 before, so the weights may be bad" in printed


@pytest.mark.slow
def test_a_step_above_the_median_of_the_last_ones_is_dropped(workspace: Workspace, tmp_path: Path) -> None:
    """With a learning rate that moves nothing the losses are those of the records, and a small factor tells some."""
    factor = 1.02
    settings = {"LR": "1e-30", "MIN_LR": "1e-30", "GLOBAL_BATCH_SIZE": 2, "TRAIN_ITERS": 40, "EVAL_ITERS": 0}
    found = losses(run(workspace, tmp_path / "out", ON_BAD_LOSS="skip", SPIKE_FACTOR=factor, **settings))
    dropped = {line["iteration"]: line for line in written_down(tmp_path / "out")}
    history: list[float] = []
    for iteration in range(1, 41):
        highest = factor * statistics.median(history) if len(history) >= 10 else math.inf
        if iteration in dropped:
            assert dropped[iteration]["loss"] > highest
            assert dropped[iteration]["reason"].endswith("1.02 times the median of the last steps")
        else:
            assert found[iteration] <= highest * (1 + 1e-6)  # printed with seven digits
            history.append(found[iteration])
    assert 3 <= len(dropped) <= 25, "a factor that tells nothing proves nothing"


def test_a_leap_is_measured_by_the_median() -> None:
    history = LossHistory(3.0)
    history.losses.extend([2.0] * 9)
    assert history.highest == math.inf
    history.losses.append(50.0)
    assert history.highest == 6.0
    history.losses.extend([1.0] * 50)
    assert history.highest == 3.0 and len(history.losses) == 50
    assert LossHistory(0).highest == math.inf
