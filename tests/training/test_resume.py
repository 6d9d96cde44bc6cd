"""SIGKILL, then the same command: the losses of the run that was never killed, to the last printed digit, and at the
end the same checkpoint: weights, optimizer, random state, schedule and counters.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import write_dataset
from tests.training.launching import ROOT, Workspace, losses, run, run_and_kill, run_until
from tests.training.stored_checkpoint import assert_same_run

ITERATIONS = 20
SAVE_INTERVAL = 5
PARALLELISMS = {
    "one process": {},
    "two loader workers": {"NUM_WORKERS": 2},
    "DP2 + distributed optimizer": {"NPROC_PER_NODE": 2, "DO": "true"},
    "asynchronous saves": {"ASYNC_SAVE": "true"},
    "FSDP": {"NPROC_PER_NODE": 2, "FSDP": "full"},
}
SLOW = {
    "DP2 + distributed optimizer": pytest.mark.slow,  # test_resume_parallelism has two ranks
    "two loader workers": pytest.mark.slow,  # the loader's own tests cover workers in seconds
    "asynchronous saves": pytest.mark.slow,
    "FSDP": pytest.mark.slow,
}


def helpers_of_saves() -> set[int]:
    """Orphaned processes that multiprocessing spawned: a save starts one, which holds half a gigabyte."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    found = (line.split(maxsplit=2) for line in listed.splitlines()[1:])
    return {int(pid) for pid, parent, args in found if parent == "1" and "multiprocessing.spawn" in args}


@pytest.mark.parametrize("parallelism", [pytest.param(name, marks=SLOW.get(name, ())) for name in PARALLELISMS])
def test_kill_and_resume(parallelism: str, workspace: Workspace, tmp_path: Path) -> None:
    # the process that writes asynchronous saves takes some seconds to begin
    kill_at, iterations = (32, 40) if parallelism == "asynchronous saves" else (8, ITERATIONS)
    settings = {"TRAIN_ITERS": iterations, "SAVE_INTERVAL": SAVE_INTERVAL, **PARALLELISMS[parallelism]}
    whole = losses(run(workspace, tmp_path / "whole", **settings))
    before = helpers_of_saves()
    killed = run_and_kill(workspace, tmp_path / "killed", at_iteration=kill_at, **settings)
    assert all(killed[i] == whole[i] for i in killed)
    again = losses(run(workspace, tmp_path / "killed", **settings))
    assert max(killed) < iterations, "the run was over before it was killed"
    assert not helpers_of_saves() - before, "a helper process of a save outlived the run"
    assert min(again) > 1 and min(again) % SAVE_INTERVAL == 1, f"resumed at {min(again)}, after no checkpoint"
    assert len(again) >= iterations - max(killed)  # it may have gone on for a while
    different = {i: (again[i], whole[i]) for i in again if again[i] != whole[i]}
    assert not different, f"resumed and uninterrupted losses differ: {different}"
    assert_same_run(tmp_path / "killed", tmp_path / "whole", iterations)


@pytest.mark.slow  # tests/patches/test_async_saves.py has the process alone
def test_a_killed_writer_of_asynchronous_saves_ends_the_run(workspace: Workspace, tmp_path: Path) -> None:
    """It would train to its end without a checkpoint, and hang there; the same command goes on from the last one."""

    def kill_writer() -> None:
        found = subprocess.run(
            ["pgrep", "-f", str(tmp_path / "out")], capture_output=True, text=True, check=True
        ).stdout
        (writer,) = [int(pid) for pid in found.split() if os.getpriority(os.PRIO_PROCESS, int(pid)) == 10]
        os.kill(writer, signal.SIGKILL)

    settings = {"ASYNC_SAVE": "true", "SAVE_INTERVAL": SAVE_INTERVAL}
    code, printed = run_until(workspace, tmp_path / "out", 8, kill_writer, TRAIN_ITERS=200, **settings)
    assert code == 1
    assert "asynchronous saves ended with signal 9" in printed and "goes on from the last checkpoint" in printed
    last = (tmp_path / "out/checkpoint/latest_checkpointed_iteration.txt").read_text()
    again = losses(run(workspace, tmp_path / "out", TRAIN_ITERS=int(last) + 10, **settings))
    assert int(last) == min(again) - 1 == SAVE_INTERVAL * (min(again) // SAVE_INTERVAL) and len(again) == 10


def test_another_dataset_is_refused_on_resume(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, tmp_path / "out", TRAIN_ITERS=3, SAVE_INTERVAL=3)
    write_dataset(tmp_path / "other", records=40)
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    subprocess.run([sys.executable, str(converter), str(tmp_path / "other")], check=True, capture_output=True)
    other = Workspace(workspace.checkpoint, tmp_path / "other" / "wds")
    words = {"TRAIN_ITERS": 6, "SAVE_INTERVAL": 3}
    printed = run(other, tmp_path / "out", expected_exit=2, CHECK="true", **words)
    assert "cannot be resumed" in printed
    assert "number of records" in printed
