"""Runs as a user starts them, each process importing all by itself: the other tests' processes are forked warm."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.training.launching import Workspace, losses, run
from tests.training.test_graceful_stop import Started, processes_of, ranks_of

COLD = {"PYTHON": sys.executable, "TRAIN_ITERS": 3, "CHECK": "true"}


@pytest.mark.parametrize(
    "script", ["run_mcore_llava.sh", pytest.param("run_sft_mcore_llava.sh", marks=pytest.mark.slow)]
)
def test_a_launcher_starts_cold_and_its_losses_are_those_of_a_warm_start(
    script: str, workspace: Workspace, tmp_path: Path
) -> None:
    cold = run(workspace, tmp_path / "cold", script=script, **COLD)
    warm = run(workspace, tmp_path / "warm", script=script, TRAIN_ITERS=3)
    assert losses(cold) == losses(warm) and len(losses(cold)) == 3
    assert "successfully saved checkpoint from iteration       3" in cold


def test_ranks_end_with_torchrun(workspace: Workspace, tmp_path: Path) -> None:
    """`kill -9` of torchrun alone: nobody is left to train on and write where the next start writes."""
    settings = {**COLD, "TRAIN_ITERS": 100000, "CHECK": "false", "NPROC_PER_NODE": 2}
    started = Started(workspace, tmp_path / "out", **settings)
    started.wait_for(r"iteration +2/")
    assert len(ranks_of(tmp_path / "out")) == 2
    os.kill(started.process.pid, signal.SIGKILL)
    assert started.end() == -signal.SIGKILL
    assert not wait_until_gone(tmp_path / "out")


def wait_until_gone(output: Path) -> dict[int, str]:
    """What is left of a run after ten seconds, at best nothing and at once."""
    end = time.monotonic() + 10
    while (left := processes_of(output)) and time.monotonic() < end:
        time.sleep(0.05)
    return left
