"""A tiny converted LLaVA and a small dataset of coloured images, shared by the training tests."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models
from tests.training.launching import ROOT, Workspace

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "white": (240, 240, 240)}


def write_dataset(folder: Path, records: int = 96) -> None:
    """LLaVA-Pretrain's parallelism: images of one colour, text-only records, answers of different length."""
    generator = random.Random(7)
    (folder / "images").mkdir(parents=True)
    found = []
    for number in range(records):
        name, colour = generator.choice(list(COLOURS.items()))
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is the picture?"},
            {"from": "gpt", "value": f"It is {name}, " + "very " * generator.randint(0, 4) + name},
        ]
        record = {"id": f"r{number}", "image": f"{number}.png", "conversations": turns}
        if number % 5 == 4:
            turns[0]["value"] = "What is three plus four?"
            turns[1]["value"] = "seven"
            del record["image"]
        else:
            pixels = Image.new("RGB", (generator.randint(24, 40), generator.randint(24, 40)), colour)
            pixels.save(folder / "images" / f"{number}.png")
        found.append(record)
    (folder / "records.json").write_text(json.dumps(found))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Checkpoint (Mistral-like: grouped queries) and dataset, made by the public converters."""
    folder = tmp_path_factory.mktemp("training")
    tiny_models.make_tiny_llava(folder / "hf", "mistral")
    convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
    write_dataset(folder / "records")
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    subprocess.run(
        [sys.executable, str(converter), str(folder / "records"), "--split", "9,1,0", "--samples-per-shard", "8"],
        check=True,
        capture_output=True,
    )
    return Workspace(folder / "checkpoint", folder / "records" / "wds")
