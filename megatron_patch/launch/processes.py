"""The processes of this node, with the manners of a batch job:

    python -m megatron_patch.launch.processes [--check] [--max-rollbacks N] [--max-restarts N --progress FILE]
        [--log-dir FOLDER] TORCHRUN'S SCRIPT.py ...

It has torchrun's arguments for processes and nodes and gives the processes torchrun's variables (RANK, MASTER_ADDR and
so on), so that torchrun can start them as well.  But torchrun imports torch itself before it starts anything, which
takes seconds, and knows nothing of the rest.

- What the processes write goes to the console, line by line, and to FOLDER/attempt_0/PROCESS/stdout.log and stderr.log.
  Without a FOLDER they write to the console themselves.
- --check: the first process of this node looks whether everything fits (must_check, check_has_passed) while the others
  import; they wait (wait_for_check) before they do anything that stays.  When it ends in place of that, so does this,
  with its exit code, and nothing has been created.
- SIGTERM and SIGUSR1 are handed to the processes, which save and end by themselves; when they end with exit code 0, so
  does this.  Before the check has passed a signal ends everything.
- When a process dies, the others have SHUTDOWN_SECONDS to end.  The tail of its stderr and one sentence end the output;
  the exit code is that process's own.
- When another node is lost (heartbeat.py), the processes of this one end, with exit code 69.
- Exit code 75 (ROLL_BACK) of a process asks for another start from the last checkpoint, N times at most.
- After a death there is another start, N times at most, if this one has changed FILE, which names the last checkpoint:
  what dies before it has saved would die there again.  Not after a process has said why it ends (a line `error: ...`,
  as of a bad loss), nor with exit code 2, which is wrong input, nor when a signal has asked for the end.
"""

import argparse
import contextlib
import functools
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from megatron_patch.launch.heartbeat import Heartbeat

ROLL_BACK = 75  # EX_TEMPFAIL of sysexits.h
WRONG_INPUT = 2
REFUSAL = "error: "  # begins the line in which a process says why it ends
CHECK = "LLAVA_CHECK"  # variable of a process: descriptor by which it tells, or is told, that the check has passed
LOST = 69  # EX_UNAVAILABLE: another node
STDERR_TAIL_LINES = 25
# What the survivors of a death say: theirs is not the cause.
OF_SURVIVORS = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "ncclSystemError")
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
SHUTDOWN_SECONDS = 20.0  # for the others when a process has died: they wait for it in vain
POLL_SECONDS = 0.05
OUTPUT_SECONDS = 2.0  # to pass on the last lines; a process left behind by another may hold its output open for ever


# ---------------------------------------------------------------- for the script that is started


def must_check() -> bool:
    """Is this the process that has to look whether everything fits?"""
    return CHECK in os.environ and os.environ["LOCAL_RANK"] == "0"


def check_has_passed() -> None:
    """Let the others go on: called by the process that must_check()."""
    descriptor = int(os.environ.pop(CHECK))
    os.write(descriptor, b"1")
    os.close(descriptor)


def wait_for_check() -> None:
    """Return when the check has passed.  Called before anything is created; without --check it does nothing."""
    if CHECK in os.environ:
        descriptor = int(os.environ.pop(CHECK))
        if not os.read(descriptor, 1):  # whoever started this has died
            sys.exit(1)
        os.close(descriptor)


# ---------------------------------------------------------------- output


class _Output:
    """Passes on what the processes write: whole lines to the console and, once there is a folder, to files.

    A console that stands still stops no process: lines wait here.
    """

    def __init__(self) -> None:
        # of their own: those of `python -u` may write a part of what they are given
        self.stdout, self.stderr = (open(number, "wb", closefd=False) for number in (1, 2))  # noqa: SIM115
        self._lines: queue.SimpleQueue = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def add(self, pipe: IO[bytes], console: IO[bytes], log: str) -> None:
        """From now on read a pipe.  log: the file below the folder."""
        self._readers.append(threading.Thread(target=self._read, args=(pipe, console, log), daemon=True))
        self._readers[-1].start()

    def keep(self, folder: Path | None) -> None:
        """Write files below the folder, with all that has come so far; None: there will be none."""
        self._lines.put((folder,))

    def close(self) -> None:
        """Pass on the last lines."""
        end = time.monotonic() + OUTPUT_SECONDS
        for reader in self._readers:
            reader.join(max(0.0, end - time.monotonic()))
        self._lines.put(None)
        self._writer.join(OUTPUT_SECONDS)

    def _read(self, pipe: IO[bytes], console: IO[bytes], log: str) -> None:
        self._lines.put((console, log, b""))  # a process that is silent has files, too
        for line in pipe:
            self._lines.put((console, log, line))

    def _write(self) -> None:
        early, files = [], {}
        append = early.append  # what is done with a line beside the console
        while (found := self._lines.get()) is not None:
            if len(found) == 1:
                (folder,) = found
                append = functools.partial(self._append, files, folder) if folder else lambda _: None
                for line in early:
                    append(line)
                early.clear()
                continue
            console, *line = found
            append(line)
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more (`| head`)
                console.write(line[1])
                console.flush()

    @staticmethod
    def _append(files: dict[str, IO[bytes]], folder: Path, named: tuple[str, bytes]) -> None:
        log, line = named
        with contextlib.suppress(OSError):  # a full disk: what cannot be saved ends the run by itself
            if log not in files:
                (folder / log).parent.mkdir(parents=True, exist_ok=True)
                files[log] = (folder / log).open("wb", buffering=0)
            files[log].write(line)


# ---------------------------------------------------------------- processes


class _Process:
    """One process of this node."""

    def __init__(self, arguments: argparse.Namespace, local_rank: int, output: _Output, check: int | None) -> None:
        """check: the descriptor of CHECK; None: there is no check."""
        count = arguments.nproc_per_node
        self.rank = arguments.node_rank * count + local_rank
        self.log = f"{local_rank}/stderr.log"
        variables = {
            "RANK": self.rank,
            "LOCAL_RANK": local_rank,
            "GROUP_RANK": arguments.node_rank,
            "WORLD_SIZE": arguments.nnodes * count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": arguments.master_addr,
            "MASTER_PORT": arguments.master_port,
        }
        if check is not None:
            variables[CHECK] = check
        # without a folder for logs the console is theirs: a chat shows an answer word by word
        pipe = None if arguments.log_dir is None else subprocess.PIPE
        # of a torchrun around this, which has processes and a place to meet of its own
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        self._started = subprocess.Popen(
            [sys.executable, "-u", *arguments.script],
            env={**inherited, **{name: str(value) for name, value in variables.items()}},
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,  # with its workers it is a group; a terminal's signals come to this process alone
            pass_fds=() if check is None else (check,),
        )
        if pipe is not None:
            output.add(self._started.stdout, output.stdout, f"{local_rank}/stdout.log")
            output.add(self._started.stderr, output.stderr, self.log)
        self.ended_by_us = False

    @property
    def exit_code(self) -> int | None:
        """As subprocess has it, negative for a signal; None: it is running."""
        return self._started.poll()

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        self._started.send_signal(number)

    def end(self, number: int) -> None:
        """Send a signal to the process and all that it has started."""
        if self.exit_code is None:
            self.ended_by_us = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._started.pid, number)

    def wait(self, until: float) -> None:
        """Return when it has ended, or the monotonic clock says `until`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._started.wait(max(0.0, until - time.monotonic()))


def _end(processes: Sequence[_Process], number: int) -> None:
    """End those that run with a signal; after SHUTDOWN_SECONDS with SIGKILL."""
    for last in (number, signal.SIGKILL):
        for process in processes:
            process.end(last)
        until = time.monotonic() + SHUTDOWN_SECONDS
        for process in processes:
            process.wait(until)


def _as_exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _raise_exit(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _start(arguments: argparse.Namespace, output: _Output, processes: list[_Process]) -> None:
    """Start all processes into the list; with --check return when it has passed, and end this process if it has not."""
    if not arguments.check:
        for number in range(arguments.nproc_per_node):
            processes.append(_Process(arguments, number, output, None))
        return
    answer, told = os.pipe()
    waited_for, gate = os.pipe()
    for number in range(arguments.nproc_per_node):
        processes.append(_Process(arguments, number, output, waited_for if number else told))
    os.close(told)
    # How the others end is of no interest yet: what is wrong for them is wrong for the first, which says it.
    first, answered = processes[0], False
    while not answered and first.exit_code is None:
        answered = bool(select.select([answer], [], [], POLL_SECONDS)[0])
    if not answered or not os.read(answer, 1):  # b"": it has closed its end by dying
        first.wait(time.monotonic() + SHUTDOWN_SECONDS)
        sys.exit(_as_exit_code(first.exit_code or 1))
    os.write(gate, b"1" * arguments.nproc_per_node)


# ---------------------------------------------------------------- how it ended


def _stderr_tail(process: _Process, folder: Path | None) -> list[str]:
    log = folder and folder / process.log
    return log.read_text(errors="replace").splitlines()[-STDERR_TAIL_LINES:] if log and log.is_file() else []


def _cause(failed: Sequence[_Process], folder: Path | None) -> _Process:
    """The process that died first, as far as can be told.  Neither our signal nor a broken connection is a cause."""

    def innocence(process: _Process) -> tuple[bool, bool, int]:
        survivor = any(mark in line for line in _stderr_tail(process, folder) for mark in OF_SURVIVORS)
        return process.ended_by_us and process.exit_code < 0, process.exit_code > 0 and survivor, process.rank

    return min(failed, key=innocence)


def _has_said_why(tail: Sequence[str]) -> bool:
    return any(line.startswith(REFUSAL) for line in tail)


def _report(process: _Process, folder: Path | None) -> None:
    tail, code = _stderr_tail(process, folder), process.exit_code
    died = f"ended with exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name
        died = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    if tail and not _has_said_why(tail) and code > 0:
        print(f"--- the last lines of rank {process.rank}", *tail, "---", sep="\n", file=sys.stderr)
    log = f"; its log: {folder / process.log}" if folder else ""
    print(f"rank {process.rank} {died}, and the run with it{log}", file=sys.stderr, flush=True)


def _why_no_restart(
    arguments: argparse.Namespace, cause: _Process, failed: Sequence[_Process], folder: Path | None, before: str
) -> str | None:
    """Why a death is the end although there may be restarts; None: there is another start."""
    tails = (_stderr_tail(process, folder) for process in failed if process.exit_code > 0)
    if cause.exit_code in (WRONG_INPUT, ROLL_BACK) or any(map(_has_said_why, tails)):
        return "it would end there again"
    if _progress(arguments) == before:
        return "no checkpoint has been saved since its start, so it would die there again"
    return None if arguments.max_restarts > 0 else "MAX_RESTARTS are used up"


def _progress(arguments: argparse.Namespace) -> str:
    """What names the last checkpoint; empty: there is none."""
    try:
        return arguments.progress.read_text(errors="replace").strip() if arguments.progress else ""
    except OSError:
        return ""


def _start_again(arguments: argparse.Namespace, kind: str) -> None:
    """Become a process that starts the same from the last checkpoint.  kind: of start, rollbacks or restarts."""
    left = vars(arguments)[f"max_{kind}"] - 1
    print(f"starting again from the last checkpoint; {kind} left: {left}", file=sys.stderr)
    again = vars(arguments) | {f"max_{kind}": left}
    script = again.pop("script")
    del again["check"]
    words = [f"--{name}={value}" for name, value in again.items() if value is not None]
    os.execv(sys.executable, [sys.executable, "-u", "-m", "megatron_patch.launch.processes", *words, *script])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_patch.launch.processes", allow_abbrev=False)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--max-rollbacks", "--max_rollbacks", type=int, default=0)
    parser.add_argument("--max-restarts", "--max_restarts", type=int)
    parser.add_argument("--progress", type=Path)
    parser.add_argument("--log-dir", "--log_dir", type=Path)
    parser.add_argument("--nproc_per_node", type=int, default=1)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node_rank", type=int, default=0)
    parser.add_argument("--master_addr", default="127.0.0.1")
    parser.add_argument("--master_port", type=int, default=_free_port())
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT.py", help="and its arguments")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Start, watch and end the processes; ends this one."""
    arguments = _parse(words)
    for number in (*FORWARDED, *ENDING):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _raise_exit)
    output, processes, watch = _Output(), [], None
    before, asked = _progress(arguments), []
    to_end = signal.SIGKILL
    try:
        _start(arguments, output, processes)
        to_end = signal.SIGINT
        watch = Heartbeat(arguments.node_rank, arguments.nnodes, arguments.master_addr, arguments.master_port + 1)
        folder = _new_folder(arguments.log_dir) if arguments.log_dir else None
        output.keep(folder)
        _forward_signals(processes, asked)
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and not watch.lost:
            time.sleep(POLL_SECONDS)
            codes = [process.exit_code for process in processes]
        if watch.lost and not any(codes):
            _end(processes, signal.SIGKILL)  # they wait for the lost node and can save nothing
        elif any(codes):
            _end(processes, signal.SIGTERM)
    finally:
        _end(processes, to_end)  # none is left unless a signal ends this process
        output.close()
        if watch is not None:
            watch.close(failed=any(process.exit_code not in (0, ROLL_BACK) for process in processes))
    if watch.lost and any(process.exit_code for process in processes):
        print(f"error: {watch.lost}; the same command on all nodes goes on from the last checkpoint", file=sys.stderr)
        sys.exit(LOST)
    failed = [process for process in processes if process.exit_code]
    if not failed:
        return
    cause = _cause(failed, folder)
    if cause.exit_code == ROLL_BACK and arguments.max_rollbacks > 0:
        _start_again(arguments, "rollbacks")
    if cause.exit_code == ROLL_BACK:
        print("error: MAX_ROLLBACKS are used up; look into the records that were named", file=sys.stderr)
    _report(cause, folder)
    if arguments.max_restarts is not None and not asked:
        why = _why_no_restart(arguments, cause, failed, folder, before)
        if why is None:
            _start_again(arguments, "restarts")
        print(f"it is not started again: {why}", file=sys.stderr)
    sys.exit(_as_exit_code(cause.exit_code))


def _new_folder(log_dir: Path) -> Path:
    """For the logs of this start: a rollback leaves those before it."""
    folder = log_dir / f"attempt_{len(list(log_dir.glob('attempt_*')))}"
    folder.mkdir(parents=True)
    return folder


def _forward_signals(processes: Sequence[_Process], asked: list[int]) -> None:
    """From now on FORWARDED are the processes' business.  asked: those that have come."""

    def forward(number: int, _: Any) -> None:
        asked.append(number)
        print(f"{signal.Signals(number).name}: the processes finish their iteration, save and end", file=sys.stderr)
        for process in processes:
            process.signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)


if __name__ == "__main__":
    main(sys.argv[1:])
