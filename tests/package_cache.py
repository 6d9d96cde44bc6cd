"""Packages that some tests need beside requirements.txt, from the package registry, each fetched once."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 300


def cache() -> Path:
    """Where the packages are kept between runs of the tests: LLAVA_TEST_CACHE, or a folder in the user's own cache."""
    return Path(os.environ.get("LLAVA_TEST_CACHE") or Path.home() / ".cache/llava_tests")


def pip(command: str, *arguments: str) -> None:
    """Run pip without a question, for exactly the packages named.

    Raises:
        FileNotFoundError: it failed, with its last line.
    """
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--retries", "1", "--timeout", "15")
    words = [sys.executable, "-m", "pip", command, *quiet, *arguments]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise FileNotFoundError(f"pip gave no answer in {LIMIT_S} s") from error
    if done.returncode:
        raise FileNotFoundError((done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1])


def kept(name: str, fill: Callable[[Path], None]) -> Path:
    """Folder `name` of the cache, filled once, whole or not at all.

    Raises:
        FileNotFoundError: it is not there, and the registry cannot be reached or has it not.
    """
    target = cache() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        filled = Path(folder) / name
        filled.mkdir()
        fill(filled)
        try:
            filled.rename(target)
        except OSError:  # another test process was first
            if not target.is_dir():
                raise
    return target


def installed(*packages: str) -> Path:
    """Folder for PYTHONPATH with these packages (as pip names them, `NAME==VERSION`) and no others.

    Raises:
        FileNotFoundError: as kept().
    """

    def fill(folder: Path) -> None:
        pip("install", "--only-binary", ":all:", "--target", str(folder), *packages)

    return kept("_".join(packages), fill)
