"""torchrun, with the manners of a batch job:

    python -m megatron_patch.launch [--check] [--max-rollbacks N] -m torch.distributed.run ARGUMENTS OF TORCHRUN

- --check: first of all the script is run alone, with --check-only in front of its arguments; when that fails, so does
  this, with the same exit code, before anything is created.  Meanwhile torchrun is imported.
- SIGTERM and SIGUSR1 are handed to the processes of this node, which save and end by themselves; when they end with
  exit code 0, so does this.  torchrun itself would end with an error.
- When a process dies, the tail of its stderr and one sentence end the output, instead of torchrun's table of all that
  died after it; the exit code is that process's own.
- Exit code 75 (ROLL_BACK) of a process asks for another start from the last checkpoint, N times at most.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TORCHRUN = ["-m", "torch.distributed.run"]
ROLL_BACK = 75  # EX_TEMPFAIL of sysexits.h
STDERR_TAIL_LINES = 25
# What the survivors of a death say: theirs is not the cause.
OF_SURVIVORS = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "ncclSystemError")
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def _children() -> list[int]:
    """Process ids of this process's children, started by whichever of its threads."""
    return [
        int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _forward(number: int, _: Any) -> None:
    children = _children()
    if not children:
        sys.exit(128 + number)
    print(f"{signal.Signals(number).name}: the processes finish their iteration, save and end", file=sys.stderr)
    for child in children:
        os.kill(child, number)


def _end(number: int, _: Any) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def _check(arguments: list[str]) -> Iterator[None]:
    """Run the script among the arguments of torchrun beside the block, as the only rank, --check-only before its own.

    Waits for it at the end of the block, and ends this process if it failed.
    """
    # a file: a host's name may end like a script's
    first = next(number for number, word in enumerate(arguments) if word.endswith(".py") and os.path.isfile(word))
    command = [sys.executable, "-u", arguments[first], "--check-only", *arguments[first + 1 :]]
    # RANK and WORLD_SIZE of a job are other things: number of this node and number of nodes
    process = subprocess.Popen(command, env={**os.environ, "RANK": "0", "WORLD_SIZE": "1"})
    try:
        yield
        code = process.wait()
    finally:
        process.kill()  # if it has not ended: a signal ends both
    if code:
        sys.exit(code if code > 0 else 128 - code)


class _Logs:
    """What the processes of this node wrote, as torchrun keeps it below --log-dir."""

    def __init__(self, folder: str | None) -> None:
        self.folder = Path(folder or "/nowhere")

    def of(self, failure: Any) -> Path:
        """File with the errors of a failed process; of the latest start."""
        found = self.folder.glob(f"*/attempt_*/{failure.local_rank}/stderr.log")
        return max(found, key=lambda path: path.stat().st_mtime, default=self.folder)

    def stderr_tail(self, failure: Any) -> list[str]:
        log = self.of(failure)
        return log.read_text(errors="replace").splitlines()[-STDERR_TAIL_LINES:] if log.is_file() else []


def _cause(failures: dict[int, Any], logs: _Logs) -> tuple[int, Any]:
    """(rank, failure) of the process that died first, as far as can be told.

    Neither torchrun's SIGTERM to the others nor their broken connections are a cause.
    """

    def innocence(rank_and_failure: tuple[int, Any]) -> tuple[bool, bool, int]:
        rank, failure = rank_and_failure
        survivor = any(mark in line for line in logs.stderr_tail(failure) for mark in OF_SURVIVORS)
        return failure.exitcode == -signal.SIGTERM, failure.exitcode > 0 and survivor, rank

    return min(failures.items(), key=innocence)


def _report(rank: int, failure: Any, logs: _Logs) -> None:
    tail = logs.stderr_tail(failure)
    died = f"ended with exit code {failure.exitcode}"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        died = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    refused = any(line.startswith("error: ") for line in tail)
    if tail and not refused and failure.exitcode > 0:
        print(f"--- the last lines of rank {rank}", *tail, "---", sep="\n", file=sys.stderr)
    log = f"; its log: {logs.of(failure)}" if logs.of(failure).is_file() else ""
    print(f"rank {rank} {died}, and the run with it{log}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    """Run torchrun with `arguments`; ends the process."""
    check, rollbacks = contextlib.nullcontext(), 0
    for number in FORWARDED:
        signal.signal(number, _end)
    if arguments[:1] == ["--check"]:
        arguments = arguments[1:]
        check = _check(arguments)
    if arguments[:1] == ["--max-rollbacks"]:
        rollbacks, arguments = int(arguments[1]), arguments[2:]
    if arguments[:2] == TORCHRUN:
        arguments = arguments[2:]
    with check:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    parsed = parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *arguments])
    for number in FORWARDED:
        signal.signal(number, _forward)
    logs = _Logs(parsed.log_dir)
    try:
        run(parsed)
    except ChildFailedError as error:
        rank, failure = _cause(error.failures, logs)
        if failure.exitcode == ROLL_BACK and rollbacks > 0:
            print(f"starting again from the last checkpoint; rollbacks left: {rollbacks - 1}", file=sys.stderr)
            again = [sys.executable, "-u", "-m", "megatron_patch.launch", "--max-rollbacks", str(rollbacks - 1)]
            os.execv(sys.executable, [*again, *TORCHRUN, *arguments])
        if failure.exitcode == ROLL_BACK:
            print("error: MAX_ROLLBACKS are used up; look into the records that were named", file=sys.stderr)
        _report(rank, failure, logs)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main(sys.argv[1:])
