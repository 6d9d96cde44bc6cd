"""A signal or the time limit: one more iteration, a checkpoint, exit code 0, nothing lost.  A death: told at once."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_patch.training.graceful_stop import TimeLimit
from tests.training.launching import LOSS, Workspace, command, losses, run
from tests.training.stored_checkpoint import assert_same_bits, tensors_of_run

ITERATIONS = 24
STEPS = {"TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": 1000, "EVAL_ITERS": 0, "NUM_WORKERS": 2}


def processes_of(output: Path) -> dict[int, str]:
    """Process ids and words of all processes that name `output`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found[int(folder.name)] = (folder / "cmdline").read_text(errors="replace")
    return {pid: words for pid, words in found.items() if str(output) in words}


def ranks_of(output: Path) -> list[int]:
    """Process ids of the ranks, without processes.py, which names their program too, and without their workers."""
    found = processes_of(output)
    ranks = {
        pid for pid, words in found.items() if "pretrain_llava.py" in words and "megatron_patch.launch" not in words
    }
    return [pid for pid in ranks if parent_of(pid) not in ranks]


def parent_of(process: int) -> int:
    """Its process id; 0 if the process is gone."""
    with contextlib.suppress(OSError):
        return int(status_of(process, "PPid"))
    return 0


def status_of(process: int, field: str) -> str:
    """What the kernel says of it.  OSError: the process is gone."""
    return re.search(rf"^{field}:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.M)[1]


@contextlib.contextmanager
def frozen(processes: list[int]) -> Iterator[list[int]]:
    """Within the block they do nothing; signals wait for them."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield processes
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def waits_for(process: int, number: int) -> bool:
    """Has this signal been sent to a frozen process?"""
    return bool(int(status_of(process, "ShdPnd"), 16) >> (number - 1) & 1)


class Started:
    """A run under way."""

    def __init__(self, workspace: Workspace, output: Path, **changes: object) -> None:
        words, environment = command(workspace, output, **changes)
        self.log = output.parent / f"{output.name}.printed"
        self.stream = self.log.open("w")
        self.process = subprocess.Popen(words, env=environment, stdout=self.stream, stderr=subprocess.STDOUT)

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: re.search(text, self.printed))

    def wait_until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not is_so():
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed[-4000:]
            time.sleep(0.02)

    def end(self) -> int:
        code = self.process.wait(timeout=240)
        self.stream.close()
        return code


@pytest.fixture(scope="module")
def whole(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    run(workspace, output, **STEPS)
    return output


@pytest.mark.parametrize(
    ("number", "everywhere"),
    [
        (signal.SIGUSR1, True),  # schedulers: every process of the job, loader workers and helpers too
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_within_an_iteration(number, everywhere, workspace, whole: Path, tmp_path: Path) -> None:
    # not in a process that has torch already: what passes signals on to it would be frozen, too
    started = Started(workspace, tmp_path / "out", **STEPS, PYTHON=sys.executable)
    started.wait_for(r"iteration +4/")
    with frozen(ranks_of(tmp_path / "out")) as ranks:  # however long a busy machine needs to pass the signal on
        for process in processes_of(tmp_path / "out") if everywhere else [started.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        started.wait_until(lambda: all(waits_for(rank, number) for rank in ranks))
        seen = max(losses(started.printed))
    assert started.end() == 0, started.printed[-4000:]
    stopped = re.search(rf"stopped after iteration (\d+) of {ITERATIONS}, for a signal asked for it", started.printed)
    assert stopped and int(stopped[1]) <= seen + 2, (seen, stopped)  # one that was not printed yet included
    assert max(losses(started.printed)) == int(stopped[1]) < ITERATIONS
    again = losses(run(workspace, tmp_path / "out", **STEPS))
    assert min(again) == int(stopped[1]) + 1
    assert_same_bits(tensors_of_run(tmp_path / "out", ITERATIONS), tensors_of_run(whole, ITERATIONS))


@pytest.mark.slow
def test_signal_before_the_first_iteration(workspace: Workspace, tmp_path: Path) -> None:
    """While torch is being imported, so not in a process that has it already."""
    started = Started(workspace, tmp_path / "out", **STEPS, PYTHON=sys.executable)
    while not ranks_of(tmp_path / "out"):
        time.sleep(0.05)
    time.sleep(1)
    started.process.send_signal(signal.SIGUSR1)
    assert started.end() == 0 and "stopped after iteration 1 of" in started.printed


@pytest.mark.slow
def test_time_limit_leaves_room_for_the_save(workspace: Workspace, tmp_path: Path) -> None:
    end = time.time() + 18
    words = ["--stop-at", f"{end:.0f}"]
    printed = run(workspace, tmp_path / "out", words=words, **{**STEPS, "TRAIN_ITERS": 100000, "SAVE_INTERVAL": 50})
    assert "for the time limit is near; it is saved" in printed
    last = max(losses(printed))
    tracker = tmp_path / "out/checkpoint/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(last)
    assert tracker.stat().st_mtime < end  # written last; the processes' own end takes as long as the machine lets it


@pytest.mark.parametrize("parallelism", [pytest.param({"TP": 2}, marks=pytest.mark.slow), {"NPROC_PER_NODE": 2}])
def test_a_death_ends_all_and_is_told(parallelism: dict, workspace: Workspace, tmp_path: Path) -> None:
    started = Started(workspace, tmp_path / "out", **{**STEPS, "TRAIN_ITERS": 100000, "NUM_WORKERS": 0}, **parallelism)
    started.wait_for(r"iteration +4/")
    victim = max(ranks_of(tmp_path / "out"))
    begin = time.monotonic()
    subprocess.run(["kill", "-KILL", str(victim)], check=True)
    assert started.end() == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 60
    last = started.printed.splitlines()[-1]
    assert re.match(r"rank \d was killed by SIGKILL \(out of memory\?\), and the run with it; its log: /", last), last
    assert not processes_of(tmp_path / "out")


@pytest.mark.slow
def test_a_death_costs_what_was_not_saved_and_nothing_else(workspace: Workspace, tmp_path: Path) -> None:
    """A killed rank of two, twice: the launcher goes on by itself, and losses and bits are those of a run without."""
    steps = {**STEPS, "SAVE_INTERVAL": 3, "NUM_WORKERS": 0, "NPROC_PER_NODE": 2}
    expected = losses(run(workspace, tmp_path / "whole", **steps))
    started = Started(workspace, tmp_path / "out", **steps, MAX_RESTARTS=2)
    for iteration in (5, 13):
        started.wait_for(rf"iteration +{iteration}/")
        os.kill(max(ranks_of(tmp_path / "out")), signal.SIGKILL)
        started.wait_for("starting again from the last checkpoint; restarts left: " + {5: "1", 13: "0"}[iteration])
    assert started.end() == 0, started.printed[-4000:]
    found = [(int(number), float(loss)) for number, loss in LOSS.findall(started.printed)]
    assert all(loss == expected[number] for number, loss in found), "repeated iterations, too"
    assert {number for number, _ in found} == set(range(1, ITERATIONS + 1)) and len(found) < ITERATIONS + 12
    assert_same_bits(tensors_of_run(tmp_path / "out", ITERATIONS), tensors_of_run(tmp_path / "whole", ITERATIONS))


def test_time_limit_by_the_clock() -> None:
    clock = [0.0]
    limit = TimeLimit(1000.0, lambda: clock[0])
    stops = []
    for step in range(1, 101):
        clock[0] = 10.0 * step
        if step == 20:
            clock[0] += 60.0
            limit.saved(60.0)
        elif step > 20:
            clock[0] += 60.0
        stops.append(limit.iterated())
    first = 10.0 * (stops.index(True) + 1) + 60.0
    assert first == 920.0  # 60 for the save and two iterations of 10 make 1000
    never = TimeLimit(None, lambda: 1e12)
    assert not never.iterated()
    unmeasured = TimeLimit(1000.0, iter([0.0, 890.0 / 3 * 2, 890.0]).__next__)
    assert [unmeasured.iterated(), unmeasured.iterated()] == [True, True]  # a tenth for the save, two of 593
