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

# Every Python that starts with it on PYTHONPATH tells at its end what it is and what it has imported.
TELL = """
import atexit, os, sys
def tell():
    path = os.path.join(os.path.dirname(__file__), f"{os.getpid()}.modules")
    with open(path, "w") as file:
        file.write("\\n".join([" ".join(sys.orig_argv), *sys.modules]))
atexit.register(tell)
"""
# Part of a process's command line -> what takes long to import and does nothing there.
OTHERS = {"scipy", "sklearn", "pandas", "matplotlib", "pyarrow", "torchvision", "transformers.modeling_utils"}
NOT_IMPORTED = {
    "launch.processes": {
        *OTHERS,
        "torch",
        "numpy",
        "transformers",
        "megatron.core",
        "megatron.energon",
    },
    "": {*OTHERS, "transformers.activations", "transformers.generation.utils", "torch._dynamo"},  # a rank
}


def modules_of_processes(folder: Path) -> dict[str, set[str]]:
    """What each process that has ended has imported, by the part of its command line in NOT_IMPORTED."""
    found = {}
    for file in folder.glob("*.modules"):
        words, *modules = file.read_text().split("\n")
        kind = next(part for part in NOT_IMPORTED if part in words)
        assert kind not in found, f"one process more: {words}"
        found[kind] = set(modules)
    return found


@pytest.mark.parametrize(
    "script", ["run_mcore_llava.sh", pytest.param("run_sft_mcore_llava.sh", marks=pytest.mark.slow)]
)
def test_a_launcher_starts_cold_and_its_losses_are_those_of_a_warm_start(
    script: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as hook:
        (tmp_path / "sitecustomize.py").write_text(TELL)
        hook.setenv("PYTHONPATH", str(tmp_path))
        cold = run(workspace, tmp_path / "cold", script=script, **COLD)
    imported = modules_of_processes(tmp_path)
    assert imported.keys() == NOT_IMPORTED.keys(), "processes.py and one rank, and none for the check or a save"
    assert {kind: imported[kind] & names for kind, names in NOT_IMPORTED.items()} == {
        kind: set() for kind in NOT_IMPORTED
    }
    warm = run(workspace, tmp_path / "warm", script=script, TRAIN_ITERS=3)
    assert losses(cold) == losses(warm) and len(losses(cold)) == 3
    assert "successfully saved checkpoint from iteration       3" in cold


@pytest.mark.slow
def test_ranks_end_with_launch_py(workspace: Workspace, tmp_path: Path) -> None:
    """`kill -9` of processes.py alone: nobody is left to train on and write where the next start writes."""
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
