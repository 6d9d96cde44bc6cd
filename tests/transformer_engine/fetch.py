"""Transformer Engine's Python files, of one version, from the package registry: nothing of them is in this repository.

The wheel `transformer_engine` holds the Python of all its frameworks and no compiled library (1 MB); those are
in other packages, which are not taken.  einops is the one package that its Python needs and requirements.txt lacks.
"""

import os
import tarfile
from pathlib import Path

from tests.package_cache import installed, kept, pip

VERSION = os.environ.get("TRANSFORMER_ENGINE_VERSION") or "2.18.0"  # to look at another one; the tests have this one
PACKAGES = (f"transformer_engine=={VERSION}", "einops==0.8.2")
SOURCE = f"transformer_engine_torch=={VERSION}"  # the C++ of the compiled module, for its signatures


def python_files() -> Path:
    """Folder for sys.path with transformer_engine and einops, fetched if need be.

    Raises:
        FileNotFoundError: the registry cannot be reached or has it not.
    """
    return installed(*PACKAGES)


def source_files() -> Path:
    """Folder with the C++ of the compiled module, fetched if need be.

    Raises:
        FileNotFoundError: as python_files().
    """

    def fill(folder: Path) -> None:
        pip("download", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder), SOURCE)
        (archive,) = folder.iterdir()
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()

    return kept(SOURCE, fill)
