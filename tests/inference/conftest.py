"""A tiny LLaVA as an exported folder and as a checkpoint, images, and the engine on transformers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.inference import Engine, open_engine
from tests import tiny_models


@dataclass(frozen=True)
class Folders:
    """exported: Hugging Face; checkpoint: converted from it; images: 0.png to 3.png of random pixels."""

    exported: Path
    checkpoint: Path
    images: Path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Mistral-like: grouped queries."""
    root = tmp_path_factory.mktemp("inference")
    tiny_models.make_tiny_llava(root / "exported", "mistral")
    convert_to_megatron(root / "exported", None, root / "checkpoint", precision="fp32", model_size="tiny")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (30 + 9 * number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    return Folders(root / "exported", root / "checkpoint", root / "images")


@pytest.fixture(scope="session")
def engine(folders: Folders) -> Iterator[Engine]:
    """transformers, in this process."""
    with open_engine(folders.exported) as opened:
        yield opened
