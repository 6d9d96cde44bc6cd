"""Transformer Engine's Python files, of one version, from the package registry: nothing of them is in this repository.

The wheel `transformer_engine` holds the Python of all its frameworks and no compiled library (1 MB); those are
in other packages, which are not taken.  einops is the one package that its Python needs and requirements.txt lacks.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

VERSION = os.environ.get("TRANSFORMER_ENGINE_VERSION") or "2.18.0"  # to look at another one; the tests have this one
PACKAGES = (f"transformer_engine=={VERSION}", "einops==0.8.2")
SOURCE = f"transformer_engine_torch=={VERSION}"  # the C++ of the compiled module, for its signatures
LIMIT_S = 120


def cache() -> Path:
    """Where the packages are kept between runs of the tests: TRANSFORMER_ENGINE_CACHE, or one in the user's own."""
    return Path(os.environ.get("TRANSFORMER_ENGINE_CACHE") or Path.home() / ".cache/llava_tests")


def _pip(command: str, *arguments: str) -> None:
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--retries", "1", "--timeout", "15")
    words = [sys.executable, "-m", "pip", command, *quiet, *arguments]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise FileNotFoundError(f"pip gave no answer in {LIMIT_S} s") from error
    if done.returncode:
        raise FileNotFoundError((done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1])


def _kept(name: str, fill: Callable[[Path], None]) -> Path:
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


def python_files() -> Path:
    """Folder for sys.path with transformer_engine and einops, fetched if need be.

    Raises:
        FileNotFoundError: as _kept().
    """

    def fill(folder: Path) -> None:
        _pip("install", "--only-binary", ":all:", "--target", str(folder), *PACKAGES)

    return _kept("_".join(PACKAGES), fill)


def source_files() -> Path:
    """Folder with the C++ of the compiled module, fetched if need be.

    Raises:
        FileNotFoundError: as _kept().
    """

    def fill(folder: Path) -> None:
        _pip("download", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder), SOURCE)
        (archive,) = folder.iterdir()
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()

    return _kept(SOURCE, fill)
