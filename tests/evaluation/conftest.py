"""A tiny LLaVA with random weights, and questions about images in LLaVA's format, shared by this folder."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny_models


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder."""
    return tiny_models.make_tiny_llava(tmp_path_factory.mktemp("evaluation") / "model")


def write_questions(folder: Path, images: int, questions: int = 5) -> Path:
    """folder/digits.json with so many questions about each of so many images; prompts of different length."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(images):
        colour = (number * 37 % 256, number * 11 % 256, 255 - number * 5 % 256)
        Image.new("RGB", (28, 28), colour).save(folder / f"images/{number}.png", compress_level=1)
        turns = []
        for place in range(questions):
            mark = "" if place else "<image>\n"
            turns.append({"from": "human", "value": f"{mark}Question {place}{' of many' * (number % 4)}?"})
            turns.append({"from": "gpt", "value": "red"})
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "digits.json").write_text(json.dumps(records))
    return folder
