"""A tiny converted LLaVA and a small dataset of coloured images, shared by the training tests."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.preparation.shard_writer import tar_header
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


def spoil_images(dataset: Path, count: int) -> int:
    """Make the first images of the train split unreadable; no file changes its size.  Returns how many."""
    spoilt = 0
    for index in range(len(EnergonFolder(str(dataset), "train"))):
        sample = EnergonFolder(str(dataset), "train")[index]
        if "jpg" in sample and spoilt < count:
            tar = dataset / sample["__shard__"]
            data = tar.read_bytes()
            place = data.index(tar_header(f"{sample['__key__']}.jpg", len(sample["jpg"]))) + 512
            tar.write_bytes(data[:place] + b"no image" + data[place + 8 :])
            spoilt += 1
    return spoilt


@pytest.fixture(scope="session")
def damaged(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The dataset after two images went bad on the disk."""
    folder = tmp_path_factory.mktemp("damaged") / "wds"
    shutil.copytree(workspace.dataset, folder)
    assert spoil_images(folder, 2) == 2
    return Workspace(workspace.checkpoint, folder)
