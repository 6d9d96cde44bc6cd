"""Fixtures of the launcher tests."""

from pathlib import Path

import pytest

from tests.launchers.launching import Inputs
from tests.training.conftest import workspace  # noqa: F401  # a small model and its data


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Valid inputs below a fresh folder."""
    return Inputs(tmp_path / "inputs")
