"""What both sides of a training benchmark hold on to: a gate before each step, which the other end opens for a block.

The other end (Side) starts a process, waits until it stands at its first step, and then opens the gate for so many
steps at a time; in between the process sleeps.  So two trainers take turns on the same cores within one run, and what
the machine does beside them meets both.  The two ends talk through two named pipes in a folder.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

FOLDER = "BENCHMARK_PIPES"  # environment variable: where the pipes are
OPEN, DONE = "open", "done"  # names of the pipes: numbers of steps go in, a line of JSON per block comes out
START_S = 900  # a side that has not come to its first step by then never will


def reset_peak_memory() -> None:
    """Forget this process's peak of resident memory (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes of resident memory at their peak since reset_peak_memory()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Gate:
    """The end within the trainer's process."""

    def __init__(self) -> None:
        """Opens the pipes, for which it waits for the other end."""
        folder = Path(os.environ[FOLDER])
        self._open: TextIO = (folder / OPEN).open()
        self._done: TextIO = (folder / DONE).open("w")
        self._left = 0
        self._told: dict[str, Any] = {}
        self._began = 0.0
        self._profile: Any = None
        self._said_ready = False

    def before_step(self) -> None:
        """To be called where a step begins, with nothing of the step before left to do; ends the process at the end."""
        if self._left == 0:
            self._say()
            steps, _, profile = self._open.readline().strip().partition(" ")
            if not steps:
                os._exit(0)  # no checkpoint at the end: 16 bytes per parameter would have to be written
            self._left = int(steps)
            self._told = {"losses": [], "threads": _threads()}
            reset_peak_memory()
            self._profile = _start_profile() if profile else None
            self._began = time.perf_counter()
        self._left -= 1

    def note(self, loss: float | None = None, **more: Any) -> None:
        """What the line of this block shall hold besides; losses are collected."""
        if loss is not None:
            self._told["losses"].append(loss)
        self._told |= more

    def _say(self) -> None:
        told = {"ready": True}
        if self._said_ready:
            seconds = time.perf_counter() - self._began
            told = {"seconds": seconds, "peak_bytes": _peak_bytes(), **self._told}
            if self._profile is not None:
                told["operators"] = _operators(self._profile)
                self._profile = None
        self._said_ready = True
        self._done.write(json.dumps(told) + "\n")
        self._done.flush()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _start_profile() -> Any:
    import torch

    profile = torch.profiler.profile()
    profile.start()
    return profile


def _operators(profile: Any) -> dict[str, dict[str, float]]:
    """Name -> calls, and seconds within the operator itself, not in those it calls."""
    import torch

    profile.stop()
    cuda = torch.cuda.is_available()
    return {
        event.key: {
            "calls": event.count,
            "seconds": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6,
        }
        for event in profile.key_averages()
    }


def _peak_bytes() -> int:
    """Of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return peak_memory()


@dataclass
class Block:
    """Some steps of one side."""

    seconds: float
    peak_bytes: int
    losses: list[float]
    more: dict[str, Any]


class Side:
    """The end outside: a trainer's process, started and let run block by block."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """`folder` is made, for the pipes and `printed`, what the process says."""
        self.name = name
        folder.mkdir(parents=True)
        for pipe in (OPEN, DONE):
            os.mkfifo(folder / pipe)
        self.printed = folder / "printed"
        with self.printed.open("w") as stream:
            self._process = subprocess.Popen(
                command,
                env={**environment, FOLDER: str(folder)},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # read and write, for opening a pipe to read alone would wait for ever for a process that died
        self._open = (folder / OPEN).open("r+b", buffering=0)
        self._done = os.open(folder / DONE, os.O_RDWR | os.O_NONBLOCK)
        self._buffer = b""
        self._answer()

    def run(self, steps: int, profile: bool = False) -> Block:
        """Let it do so many steps; profile: with torch's profiler, whose `operators` are in `more` then."""
        self._open.write(f"{steps}{' profile' if profile else ''}\n".encode())
        told = self._answer()
        return Block(told.pop("seconds"), told.pop("peak_bytes"), told.pop("losses"), told)

    def _answer(self) -> dict[str, Any]:
        """The next line.

        Raises:
            RuntimeError: the process ended, or said nothing for START_S.
        """
        deadline = time.monotonic() + START_S
        while b"\n" not in self._buffer:
            try:
                self._buffer += os.read(self._done, 65536)
            except BlockingIOError:
                ended = self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    what = f"ended with code {self._process.returncode}" if ended else f"said nothing for {START_S} s"
                    self.stop()
                    raise RuntimeError(f"{self.name} {what}:\n{self.printed.read_text()[-3000:]}") from None
                time.sleep(0.005)
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def stop(self) -> None:
        """End it and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
