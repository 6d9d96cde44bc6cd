"""LLaVA-NeXT and LLaVA-OneVision against transformers in fp32, from images of odd sizes on.

transformers' own processors (the PIL ones) make its pixels and our data room makes ours; the judge counts the tokens of
each image itself and refuses a text with others.  Compared is what test_parity.py compares, with its tolerances, and
the gradient of image_newline.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.image import image_to_grid, image_to_pixels
from megatron_patch.geometry import read_geometry_of
from tests import tiny_models
from tests.model.test_parity import PARALLELISMS, WEIGHTS, forward_and_backward, pack, run_cases

# kind, family -> tower
CASES = {
    ("llava_next", "mistral"): "clip",
    ("llava_next", "llama"): "clip",
    ("llava_onevision", "qwen2"): "siglip",
    ("llava_onevision", "qwen2_untied"): "siglip_last",
}
# height, width of the images of each record: wide, tall, thin, tiny, square ones, and no image at all
RECORDS = ([(50, 120)], [(90, 31), (28, 28)], [], [(200, 200), (9, 300), (77, 60)], [(300, 7)])
LENGTH = 208  # of every row: the longest record, in a multiple that two parts of a sequence and four pieces need


def judges_images(folder: Path, records: list[list[Image.Image]], kind: str) -> dict:
    """The arguments of transformers' model that its processor makes of the images."""
    from transformers import LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil

    values = json.loads((folder / "preprocessor_config.json").read_text())
    del values["image_processor_type"]
    if kind == "llava_next":
        images = [image for record in records for image in record]
        return dict(LlavaNextImageProcessorPil(**values)(images, return_tensors="pt"))
    return dict(
        LlavaOnevisionImageProcessorPil(**values)([record for record in records if record], return_tensors="pt")
    )


def make_batch(folder: Path, kind: str, seed: int) -> tuple[dict[str, torch.Tensor], list[list[Image.Image]]]:
    """Our tokens, labels, pixels and plans of RECORDS, right-padded, and the images."""
    geometry = read_geometry_of(folder)
    rule, draw = geometry.any_resolution, np.random.default_rng(seed)
    values = json.loads((folder / "preprocessor_config.json").read_text())
    mean, resample = tuple(values["image_mean"]), values["resample"]
    tokens = torch.zeros(len(RECORDS), LENGTH, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    pixels, plans, images = [], [], []
    for row, sizes in enumerate(RECORDS):
        images.append([Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes])
        text = [torch.tensor(draw.integers(3, 300, 2 + row))]
        for image, size in zip(images[-1], sizes, strict=True):
            plan = rule.plan(size, len(sizes))
            if rule.is_plain(len(sizes)):
                tiles = image_to_pixels(image, rule.side_px, "pad", mean, False, resample)[None]
            else:
                tiles = image_to_grid(image, rule, resample)
            assert len(tiles) == plan.tiles
            pixels.append(torch.from_numpy(tiles))
            plans.append(plan.numbers)
            text += [torch.full((plan.tokens,), geometry.image_token_id), torch.tensor(draw.integers(3, 300, 5))]
        record = torch.cat(text)
        trained = torch.from_numpy(draw.random(len(record)) < 0.5) & (record != geometry.image_token_id)
        trained[0], trained[-1] = False, True
        tokens[row, : len(record)] = record
        labels[row, : len(record) - 1] = torch.where(trained[1:], record[1:], -100)
    return {
        "tokens": tokens,
        "labels": labels,
        "pixels": torch.cat(pixels),
        "plans": torch.tensor(plans),
    }, images


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict]:
    @functools.cache
    def make(kind: str, family: str) -> dict:
        import transformers

        folder = tmp_path_factory.mktemp(f"{kind}_{family}")
        tiny_models.make_tiny_llava(folder / "hf", family, tower=CASES[kind, family], kind=kind)
        convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
        batch, images = make_batch(folder / "checkpoint/llava", kind, seed=list(CASES).index((kind, family)))
        packed = pack(batch)
        torch.save(batch | {"packed": packed}, folder / "batch.pt")
        judge = getattr(transformers, read_geometry_of(folder / "hf").kind.architecture)
        model = judge.from_pretrained(folder / "hf", dtype=torch.float32)
        expected = forward_and_backward(model, batch, **judges_images(folder / "hf", images, kind))
        name = f"{kind}_{family}"
        return {"family": name, "folder": folder, "batch": batch, "packed": packed, "expected": expected}

    return make


@pytest.mark.parametrize(
    "parallelism",
    [
        pytest.param(name, marks=() if name == "one process" else pytest.mark.slow)
        for name in PARALLELISMS
        if name != "TP3"  # nine heads alone are cut by three
    ],
)
def test_logits_loss_and_gradients_equal_transformers(
    parallelism: str, make_case: Callable[[str, str], dict], tmp_path: Path
) -> None:
    cases = [make_case(*case) for case in CASES]
    plan = PARALLELISMS[parallelism] | {"length": 512, "weights": WEIGHTS}
    run_cases(plan, cases, tmp_path, parallelism)
