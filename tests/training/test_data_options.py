"""Packing, grouped order and tiles in whole runs, and the record counters that a run keeps."""

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_patch.data.loading.dataset import EnergonFolder
from tests.data.factories import convert_records, make_records
from tests.training.launching import Workspace, losses, run

ITERATIONS = 12
PACKED = {"PACKING": "true", "BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 4, "TRAIN_ITERS": ITERATIONS}


@pytest.fixture(scope="module")
def packed(damaged: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a packed run of one process printed, and its output folder."""
    output = tmp_path_factory.mktemp("packed") / "out"
    return run(damaged, output, **PACKED, MAX_SKIPPED=0.05), output


@pytest.mark.slow
def test_the_account_of_records_is_in_log_and_tensorboard(packed: tuple[str, Path], damaged: Workspace) -> None:
    printed, output = packed
    lines = re.findall(r"records: kept (\d+) \| truncated (\d+) \| skipped (\d+)(?: \((.*)\))?", printed)
    assert len(lines) == ITERATIONS
    kept, _, skipped, reasons = lines[-1]
    epoch = len(EnergonFolder(str(damaged.dataset), "train"))
    assert int(kept) + int(skipped) >= epoch, "the run should see every record"
    assert re.fullmatch(r"not an image \d+", reasons) and int(skipped) in (2, 3)
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    for tag, last in (("kept", kept), ("skipped", skipped), ("skipped: not an image", skipped)):
        assert int(events.Scalars(f"records/{tag}")[-1].value) == int(last)


@pytest.mark.slow  # packed rows at CP2 are in test_parallelism
@pytest.mark.parametrize("parallelism", [{"PP": 2}, {"CP": 2, "TP": 2}, {"NPROC_PER_NODE": 2, "DO": "true"}])
def test_packed_runs_agree_with_one_process(
    parallelism: dict, packed: tuple[str, Path], damaged: Workspace, tmp_path: Path
) -> None:
    """Tolerance 1e-4 as in test_layouts."""
    alone = losses(packed[0])
    found = losses(run(damaged, tmp_path / "out", **PACKED, MAX_SKIPPED=0.05, **parallelism))
    assert sorted(found) == list(range(1, ITERATIONS + 1))
    assert alone[ITERATIONS] < 0.8 * alone[1], "a run that does not learn proves little"
    assert max(abs(found[i] / alone[i] - 1) for i in found) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_packed_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, packed: tuple[str, Path], damaged: Workspace, tmp_path: Path
) -> None:
    settings = {**PACKED, "MAX_SKIPPED": 0.05, "SAVE_INTERVAL": 6, "DO": "true"}
    run(damaged, tmp_path / "out", **{**settings, "TRAIN_ITERS": 6}, LR_WARMUP_ITERS=2, NPROC_PER_NODE=before)
    rest = losses(run(damaged, tmp_path / "out", **settings, NPROC_PER_NODE=after))
    assert sorted(rest) == list(range(7, ITERATIONS + 1))


@pytest.mark.slow
def test_steps_of_text_alone_hang_nobody(workspace: Workspace, tmp_path: Path) -> None:
    """Two data-parallel ranks, the tower is trained, whole steps have no image; tiles and two turns beside."""
    settings = {
        "DATA_ORDER": "modality",
        "MEGA_BATCH_MULT": 2,
        "GLOBAL_BATCH_SIZE": 4,
        "IMAGE_TILES": "2x1",
        "NPROC_PER_NODE": 2,
        "NUM_WORKERS": 1,
    }
    found = losses(run(workspace, tmp_path / "out", TRAIN_ITERS=25, **settings))
    assert sorted(found) == list(range(1, 26))
    assert found[25] < found[1]


@pytest.mark.slow
def test_text_alone_on_one_rank_hangs_no_other(workspace: Workspace, tmp_path: Path) -> None:
    """FSDP gathers the frozen tower's weights from all ranks, of which some have images and some have not."""
    settings = {"NPROC_PER_NODE": 2, "FSDP": "full", "BATCH_SIZE": 1, "FREEZE_VISION_TOWER": "true", "TRAIN_ITERS": 4}
    assert sorted(losses(run(workspace, tmp_path / "out", limit_s=120, **settings))) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [{"NPROC_PER_NODE": 2, "DO": "true"}, {"PP": 2}])
def test_equal_work_trains_on_the_same_steps(parallelism: dict, workspace: Workspace, tmp_path: Path) -> None:
    """Losses as without BALANCE_COST, within 1e-6 relative: sums are taken in another order, nothing else."""
    settings = {"TRAIN_ITERS": 12, "GLOBAL_BATCH_SIZE": 16, **parallelism}
    turns, equal = (
        losses(run(workspace, tmp_path / balance, BALANCE_COST=balance, **settings)) for balance in ("false", "true")
    )
    assert sorted(turns) == sorted(equal) == list(range(1, 13))
    assert turns[12] < 0.9 * turns[1], "a run that does not learn proves little"
    worst = max(abs(equal[number] / turns[number] - 1) for number in turns)
    print(f"largest relative difference {worst:.1e}")
    assert worst <= 1e-6


@pytest.mark.slow
def test_a_run_of_equal_work_goes_on_with_other_ranks(workspace: Workspace, tmp_path: Path) -> None:
    """Two ranks for half of the steps, then four: the losses and record counters of one rank that takes turns."""
    settings = {"TRAIN_ITERS": 16, "GLOBAL_BATCH_SIZE": 8, "SAVE_INTERVAL": 8, "DO": "true"}
    whole = run(workspace, tmp_path / "whole", **settings)
    equal = {**settings, "BALANCE_COST": "true", "CHECK": "true"}
    run(workspace, tmp_path / "out", words=["--exit-interval", "8"], NPROC_PER_NODE=2, **equal)
    printed = run(workspace, tmp_path / "out", NPROC_PER_NODE=4, **equal)
    rest, expected = losses(printed), losses(whole)
    assert sorted(rest) == list(range(9, 17))
    assert max(abs(rest[number] / expected[number] - 1) for number in rest) <= 6.7e-6
    counted = r"records: kept .*"
    assert re.findall(counted, printed) == re.findall(counted, whole)[8:]


def test_a_template_that_leaves_no_label_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    printed = run(workspace, tmp_path / "out", expected_exit=2, CHECK="true", DECODER_SEQ_LEN=20, TRAIN_ITERS=3)
    assert re.search(r"\d+ of \d+ records looked at carry no label", printed)
    assert not (tmp_path / "out").exists()


def test_turns_that_the_template_cannot_hold_are_refused_at_the_start(workspace: Workspace, tmp_path: Path) -> None:
    """Data of stage 2 under the template of stage 1: a third of the records have two questions."""
    root = make_records(tmp_path / "records", 60)
    convert_records(root)
    several = Workspace(workspace.checkpoint, root / "wds")
    words = {"CONVERSATION_TEMPLATE": "plain", "CHECK": "true", "TRAIN_ITERS": 3}
    printed = run(several, tmp_path / "out", expected_exit=2, **words)
    sentence = r"error: .*: 20 of 54 records looked at cannot be used \(turns 20; .*; choose a CONVERSATION_TEMPLATE"
    assert re.match(sentence, printed) and printed.count("\n") == 1, printed
    assert not (tmp_path / "out").exists()
