"""A process of the fork server is what a fresh start is: what it sees, how it ends, and that it ends with its shim."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warm import interpreter

pytestmark = pytest.mark.skipif(os.environ.get("COLD_START") == "1", reason="COLD_START=1: nothing is warm")

INHERITED = 512  # a descriptor that nobody has open
PROBE = """
import json, multiprocessing.process, os, signal, sys, threading
import numpy, torch
print("said on stderr", file=sys.stderr)
masked = os.umask(0)
os.umask(masked)
print(json.dumps({
    "argv": sys.argv, "name": __name__, "main": sys.modules["__main__"].__dict__ is globals(),
    "file": globals().get("__file__"), "spec": __spec__ and __spec__.name, "folder": os.getcwd(),
    "path": sys.path, "environment": dict(os.environ), "umask": masked, "input": sys.stdin.read(),
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1], "inherited": os.read(512, 100).decode(),
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "handled": [str(signal.getsignal(number)).split(" at ")[0] for number in range(1, 32)],
    "threads": len(os.listdir("/proc/self/task")), "of torch": torch.get_num_threads(),
    "origin": multiprocessing.process.ORIGINAL_DIR,
    "flags": [sys.flags.optimize, sys.flags.isolated, sys.flags.no_site, sys.flags.ignore_environment],
    "started": [thread.name for thread in threading.enumerate()],
}))
"""
ENDINGS = {
    "code": "import sys; sys.exit(7)",
    "text": "import sys; sys.exit('no more')",
    "nothing": "import sys; sys.exit()",
    "exception": "raise ValueError('wrong')",
    "SIGTERM": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "SIGKILL": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "last words": "import atexit, sys; atexit.register(print, 'bye'); sys.stdout.write('unfinished line')",
    "late thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()",
}
SLEEPER = """
import os, sys, time
if os.fork() == 0:
    time.sleep(100)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(100)
"""


@pytest.fixture
def environment() -> dict[str, str]:
    """What a launcher gives to its processes on a CPU, and a variable of its own."""
    return {**os.environ, **interpreter.ENVIRONMENT, "OWN": "a value", "PYTHONPATH": "/nonexistent/place"}


def run(program: str, folder: Path, environment: dict[str, str], warm: bool, words: list[str], **how: object):
    """A finished process of the program, and how its start is counted."""
    script = folder / "program.py"
    script.write_text(program)
    before = interpreter.account()
    python = interpreter.python() if warm else sys.executable
    done = subprocess.run(
        [python, *words, "program" if "-m" in words else str(script), "one", "two words", ""],
        env=environment,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=100,
        **how,
    )
    return done, list((interpreter.account() - before).elements())


@contextlib.contextmanager
def open_at(number: int, text: bytes) -> Iterator[int]:
    """A pipe that holds `text`, open for reading at this descriptor."""
    read, write = os.pipe()
    os.write(write, text)
    os.close(write)
    assert fcntl.fcntl(read, fcntl.F_DUPFD, number) == number, "it is in use"
    os.close(read)
    try:
        yield number
    finally:
        os.close(number)


@pytest.mark.parametrize("words", [[], ["-u"], ["-u", "-m"]])
def test_a_program_sees_what_a_fresh_start_sees(words: list[str], environment: dict, tmp_path: Path) -> None:
    seen = []
    for warm in (False, True):
        previous = os.umask(0o027)
        try:
            with open_at(INHERITED, b"a pipe") as number:
                done, counted = run(PROBE, tmp_path, environment, warm, words, input="some input", pass_fds=[number])
        finally:
            os.umask(previous)
        assert (done.returncode, done.stderr, counted) == (0, "said on stderr\n", ["warm"] * warm)
        seen.append(json.loads(done.stdout))
    fresh, forked = seen
    # What imports have set, they set in a fresh start as well.
    one, other = (set(report["environment"].items()) for report in (fresh, forked))
    assert {name for name, _ in one ^ other} <= {"TORCHINDUCTOR_CACHE_DIR"}
    del fresh["environment"], forked["environment"]
    assert forked == fresh
    assert fresh["input"] == "some input" and fresh["inherited"] == "a pipe" and fresh["umask"] == 0o027


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_as_a_fresh_start_does(ending: str, environment: dict, tmp_path: Path) -> None:
    (fresh, _), (forked, counted) = (run(ENDINGS[ending], tmp_path, environment, warm, []) for warm in (False, True))
    assert counted == ["warm"]
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_no_two_have_the_same_random_numbers(environment: dict, tmp_path: Path) -> None:
    program = "import random, numpy; print(random.random(), numpy.random.random())"
    first, second = (run(program, tmp_path, environment, True, [])[0].stdout.split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_shim_is_one_to_the_program(number: signal.Signals, environment: dict, tmp_path: Path) -> None:
    program = """
import signal, sys, time
signal.signal(int(sys.argv[1]), lambda number, _: sys.exit(number))
print("ready", flush=True)
time.sleep(60)
"""
    (tmp_path / "program.py").write_text(program)
    command = [interpreter.python(), str(tmp_path / "program.py"), str(int(number))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == number


def processes_with(text: str) -> list[int]:
    """Ids of processes with `text` in their command line."""
    found = subprocess.run(["pgrep", "-f", text], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


@pytest.mark.parametrize("how", ["the shim", "the process", "pkill"])
def test_none_outlives_the_other(how: str, environment: dict, tmp_path: Path) -> None:
    """Whichever is killed, by its id or by its words: shim, process and the process's children are gone at once."""
    (tmp_path / "program.py").write_text(SLEEPER)
    where = tmp_path / "process_id"
    command = [interpreter.python(), str(tmp_path / "program.py"), str(where)]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (where.exists() and where.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    inner = int(where.read_text())
    assert {process.pid, inner} < set(processes_with(str(where))), "ps sees shim, process and its child"
    if how == "pkill":
        subprocess.run(["pkill", "-KILL", "-f", str(where)], check=True)
    else:
        os.kill(process.pid if how == "the shim" else inner, signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL
    if how == "the process":
        (orphan,) = processes_with(str(where))  # as in a fresh start: nobody has killed the child
        os.kill(orphan, signal.SIGKILL)
    while processes_with(str(where)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_of_multiprocessing_are_warm_too(environment: dict, tmp_path: Path) -> None:
    program = """
import multiprocessing, sys
def work(queue): queue.put(("torch" in sys.modules, __name__))
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
    sys.exit(process.exitcode)
"""
    done, counted = run(program, tmp_path, environment, True, [])
    assert (done.returncode, done.stdout, counted) == (0, "(True, '__mp_main__')\n", ["warm"] * 2), done.stderr


COLD = {
    "another value that an import has read": ({"HF_HOME": "/elsewhere"}, [], "HF_HOME"),
    "another number of threads": ({"OMP_NUM_THREADS": "2"}, [], "OMP_NUM_THREADS"),
    "another limit": ({}, ["bash", "-c", 'ulimit -c 0 -n 500; exec "$@"', "bash"], "limits"),
    "another core": ({}, ["taskset", "-c", "0"], "cores"),
}


@pytest.mark.parametrize("case", COLD)
def test_what_cannot_be_handed_over_starts_cold(case: str, environment: dict, tmp_path: Path) -> None:
    changes, before_it, reason = COLD[case]
    (tmp_path / "program.py").write_text("import sys; print('torch' in sys.modules, sys.executable); sys.exit(3)")
    counted = interpreter.account()
    command = [*before_it, interpreter.python(), str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment | changes, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, f"False {sys.executable}\n"), done.stderr
    ((why, count),) = (interpreter.account() - counted).items()
    assert count == 1 and why.startswith("cold: ") and reason in why
