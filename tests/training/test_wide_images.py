"""A model trained with IMAGE_ASPECT_RATIO=pad on very wide images: its export answers as it does inside Megatron, and a
centre crop, which would leave both ends away, does not.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_patch.conversion import convert_to_huggingface
from megatron_patch.data.conversation import Exchange
from megatron_patch.inference.interface import Request, Sampling
from megatron_patch.inference.transformers_engine import TransformersEngine
from tests.training.conftest import COLOURS
from tests.training.launching import ROOT, Workspace, run

QUESTION = "What colour is the left end?"
RECORDS, HELD_OUT = 240, 40
TRAINED = {"TRAIN_ITERS": 200, "LR": "3e-3", "GLOBAL_BATCH_SIZE": 16, "BATCH_SIZE": 16, "LR_WARMUP_ITERS": 10}


def write_images(folder: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """[(file name, colour of the left end)]: a strip of 8 : 1, grey but for its two ends of different colours."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    found = []
    for number in range(count):
        left, right = generator.sample(list(COLOURS), 2)
        image = Image.new("RGB", (224, 28), (128, 128, 128))
        image.paste(COLOURS[left], (0, 0, 84, 28))
        image.paste(COLOURS[right], (140, 0, 224, 28))
        image.save(folder / f"{number}.png")
        found.append((f"{number}.png", left))
    return found


@pytest.fixture(scope="module")
def wide(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The tiny checkpoint and a dataset of strips."""
    folder = tmp_path_factory.mktemp("wide") / "records"
    records = []
    for name, colour in write_images(folder / "images", RECORDS, 1):
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": colour}]
        records.append({"id": name, "image": name, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    subprocess.run([sys.executable, str(converter), str(folder)], check=True, capture_output=True)
    return Workspace(workspace.checkpoint, folder / "wds")


def right_answers(lines: list[str], asked: list[tuple[str, str]]) -> int:
    return sum(line == colour for line, (_, colour) in zip(lines, asked, strict=True))


@pytest.mark.slow
def test_the_export_sees_both_ends(wide: Workspace, tmp_path: Path) -> None:
    run(wide, tmp_path / "out", IMAGE_ASPECT_RATIO="pad", EVAL_ITERS=0, **TRAINED)
    asked = write_images(tmp_path / "images", HELD_OUT, 2)
    prompts = [{"id": name, "image": name, "prompt": QUESTION} for name, _ in asked]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    checkpoint = tmp_path / "out/checkpoint"
    command = ["bash", str(ROOT / "examples/llava_mcore/run_inference_llava.sh"), "--model", str(checkpoint)]
    command += ["--prompts", str(tmp_path / "prompts.jsonl"), "--image-root", str(tmp_path / "images")]
    subprocess.run([*command, "--output", str(tmp_path / "megatron.jsonl")], check=True, capture_output=True)
    in_megatron = [json.loads(line)["answer"] for line in (tmp_path / "megatron.jsonl").read_text().splitlines()]

    hub = wide.checkpoint.parent / "hf"
    convert_to_huggingface(checkpoint, tmp_path / "hf", model_size="tiny", precision="fp32", hf_checkpoint=hub)
    engine = TransformersEngine(tmp_path / "hf", torch.float32)

    def answers() -> list[str]:
        requests = [Request(name, (Exchange(f"<image>\n{QUESTION}", None),), (images / name,)) for name, _ in asked]
        return [answer.text for answer in engine.answer(requests, Sampling(max_new_tokens=16))]

    images = tmp_path / "images"
    assert answers() == in_megatron
    padded = right_answers(in_megatron, asked)
    (tmp_path / "hf/llava_training.json").unlink()  # as an export that does not say how it was trained
    engine = TransformersEngine(tmp_path / "hf", torch.float32, "mistral")
    cropped = right_answers(answers(), asked)
    print(f"\nof {HELD_OUT} strips right: padded as trained {padded}, centre crop {cropped}")
    assert padded >= 0.9 * HELD_OUT and cropped <= 0.5 * HELD_OUT
