"""Transformer Engine's files, and the workspace of the training tests."""

from pathlib import Path

import pytest

from tests.training.conftest import workspace  # noqa: F401
from tests.transformer_engine import fetch


@pytest.fixture(scope="session")
def files() -> Path:
    """Folder with Transformer Engine's Python; without a registry, and nothing kept, its tests are skipped."""
    try:
        return fetch.python_files()
    except FileNotFoundError as error:
        pytest.skip(f"{', '.join(fetch.PACKAGES)} cannot be fetched from the package registry: {error}")
