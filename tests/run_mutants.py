"""Breaks one line of a copy at a time and runs the tests that must notice: bash tests/run_tests.sh --mutants [TEXT...]

A TEXT chooses mutants by a part of their name, file or tests.  Prints a line for each mutant; exit code 1 if
one survived, if it could not be judged (its tests failed to run, or took too long), or if the tests fail without it.
"""

import argparse
import functools
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.mutants import MUTANTS, Mutant
from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
LIMIT_S = 300  # for the tests of one mutant; on an idle machine the longest take a tenth of it
TESTS_FAILED = 1  # pytest's exit code
# Imported once and then forked: most tests would need longer to import them than to run.
PRELOADED = ("torch.distributed.checkpoint", "transformers.models.auto.modeling_auto", "hypothesis", "pytest")
PRELOADED += tuple(f"transformers.models.{name}.modeling_{name}" for name in ("llava", "mistral", "clip"))
PRELOADED += ("transformers.generation.utils", "megatron.energon")
_CULPRIT = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.*?)(?: - .*)?$", re.MULTILINE)


class MutantError(Exception):
    """A mutant that does not fit the code any more."""


@dataclass(frozen=True)
class Verdict:
    """What the tests said of a mutant."""

    mutant: Mutant
    killed_by: str | None  # the first test that failed
    seconds: float
    problem: str = ""  # why it was not killed

    def line(self) -> str:
        """Of the table: verdict, seconds, fault, file, test."""
        verdict = "killed  " if self.killed_by else "SURVIVED"
        return f"{verdict} {self.seconds:5.0f} s | {self.mutant.name} | {self.mutant.file} | " + (
            self.killed_by or self.problem
        )


def copy_repository(target: Path) -> Path:
    """The files in version control, and new ones that will be, in a folder of their own."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def mutated(mutant: Mutant, text: str) -> str:
    """The file with the fault in it.

    Raises:
        MutantError: the line is not there once.
    """
    found = text.count(mutant.old)
    if found != 1:
        raise MutantError(f"{mutant.file}: {mutant.old!r} stands there {found} times, wanted once; fit {mutant.name!r}")
    return text.replace(mutant.old, mutant.new)


def _here(folder: Path, words: Sequence[str], printed: Path) -> None:
    """pytest in this process, which was forked with PRELOADED in it and must not see the code outside of the copy."""
    os.setsid()
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    for name in list(sys.modules):
        if name.split(".")[0] in ("tests", "megatron_patch", "__mp_main__"):
            del sys.modules[name]
    outside = {"", str(ROOT), str(ROOT / "tests")}
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in outside)]
    sys.dont_write_bytecode = True
    os.environ["PYTHON"] = sys.executable
    import pytest

    sys.exit(int(pytest.main(["-q", "--no-header", "--tb=line", "-rfE", "-W", "ignore", *words])))


@functools.cache
def _prepare_environment() -> None:
    """For this process and all that it starts: one warm Python for all copies."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # no caches of bytecode: a changed file may have the time and size of the one before
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["WARM_PYTHON"] = interpreter.python()


def run_pytest(folder: Path, words: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """Exit code (None: too slow) and output of pytest in a copy; words: tests, and options of pytest."""
    printed = folder.with_name(f"{folder.name}.printed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_here, args=(folder, words, printed))
    process.start()
    process.join(limit_s)
    late = process.is_alive()
    if late:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return None if late else process.exitcode, printed.read_text(errors="replace") if printed.is_file() else ""


def judge(mutant: Mutant, folder: Path, limit_s: float = LIMIT_S) -> Verdict:
    """Put the fault into the copy, run its tests, take it out again."""
    path = folder / mutant.file
    whole = path.read_text()
    begin = time.monotonic()
    path.write_text(mutated(mutant, whole))
    try:
        code, output = run_pytest(folder, ["-x", *mutant.tests], limit_s)
    finally:
        path.write_text(whole)
    seconds = time.monotonic() - begin
    culprit = _CULPRIT.search(output)
    if code == TESTS_FAILED and culprit:
        return Verdict(mutant, culprit[1], seconds)
    problem = {None: f"no end within {limit_s:.0f} s", 0: "its tests passed"}.get(code, f"pytest ended with {code}")
    return Verdict(mutant, None, seconds, problem)


def by_file(tests: Sequence[str], parts: int) -> list[list[str]]:
    """The tests in so many parts, those of one file together: they share what is costly to make."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.split("::")[0], []).append(test)
    found: list[list[str]] = [[] for _ in range(parts)]
    for of_file in sorted(files.values(), key=len, reverse=True):
        min(found, key=len).extend(of_file)
    return [part for part in found if part]


def run(mutants: Sequence[Mutant], workers: int = WORKERS, limit_s: float = LIMIT_S) -> list[Verdict]:
    """Judge all mutants, each in one of `workers` copies.

    Raises:
        MutantError: a mutant does not fit, or its tests fail without it.
    """
    for mutant in mutants:
        mutated(mutant, (ROOT / mutant.file).read_text())
    _prepare_environment()
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder, ThreadPoolExecutor(workers) as pool:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(workers):
            copies.put(copy_repository(Path(folder) / str(number)))

        def without_a_fault(tests: list[str]) -> None:
            copy = copies.get()
            try:
                code, output = run_pytest(copy, tests, limit_s * len(tests))
            finally:
                copies.put(copy)
            if code != 0:
                raise MutantError(f"the tests do not pass without a fault, so they prove nothing:\n{output[-3000:]}")

        def with_one(mutant: Mutant) -> Verdict:
            copy = copies.get()
            try:
                verdict = judge(mutant, copy, limit_s)
            finally:
                copies.put(copy)
            print(verdict.line(), flush=True)
            return verdict

        begin = time.monotonic()
        list(pool.map(without_a_fault, by_file(sorted({test for m in mutants for test in m.tests}), workers)))
        print(f"without a fault all of their tests pass ({time.monotonic() - begin:.0f} s)", flush=True)
        return list(pool.map(with_one, mutants))


def main(arguments: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="a part of a mutant's name, file or tests; default: all"
    )
    parser.add_argument("--workers", type=int, default=WORKERS, help="copies that are tested at a time")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for the tests of one mutant")
    given = parser.parse_args(arguments)
    chosen = [
        m for m in mutants if not given.texts or any(text in f"{m.name} {m.file} {m.tests}" for text in given.texts)
    ]
    begin = time.monotonic()
    try:
        verdicts = run(chosen, given.workers, given.limit)
    except MutantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    alive = [verdict for verdict in verdicts if verdict.killed_by is None]
    seconds = time.monotonic() - begin
    print(f"\n{len(verdicts)} mutants, {len(verdicts) - len(alive)} killed, {len(alive)} alive; {seconds:.0f} s")
    for verdict in alive:
        print(verdict.line())
    return 1 if alive or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
