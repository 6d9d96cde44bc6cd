"""LLaVA-NeXT and LLaVA-OneVision against transformers in fp32, from images of odd sizes on.

transformers' own processors (the PIL ones) make its pixels and our data room makes ours; the judge counts the tokens of
each image and video itself and refuses a text with others.  Compared is what test_parity.py compares, with its
tolerances, and the gradient of image_newline.

Its processor of videos needs torchvision, so a frame is squeezed by that of images, as the base tile;
tests/test_tile_plan.py tells how far torchvision's resize is from that.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.image import image_to_grid, image_to_pixels
from megatron_patch.geometry import read_geometry_of
from megatron_patch.tile_plan import video_plan
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
IMAGES = ([(50, 120)], [(90, 31), (28, 28)], [], [(200, 200), (9, 300), (77, 60)], [(300, 7)])
# frames, height, width of videos: one, two of different lengths, beside one image (in tiles) and several (in none), and
# one between two images
VIDEOS = (
    [(3, 50, 120)],
    [(1, 31, 90), (5, 28, 28)],
    [(33, 100), (4, 7, 90)],
    [(28, 28), (2, 61, 60), (90, 31), (3, 9, 9)],
)
RECORDS = {"llava_next": IMAGES, "llava_onevision": (*IMAGES, *VIDEOS)}
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


def judges_features(
    folder: Path, model: torch.nn.Module, records: list[list[Image.Image]], videos: list[list[Image.Image]], kind: str
) -> dict:
    """The arguments of transformers' model for images of records, and frames of videos in the order of their marks.

    Its forward takes videos of one length alone, so it is given the features that its own methods make.
    """
    images = judges_images(folder, records, kind) if any(records) else {}
    if not videos:
        return images
    made = [judges_images(folder, [[frame] for frame in frames], kind)["pixel_values"][:, 0] for frames in videos]
    features = [model.get_video_features(pixels[None]).pooler_output[0] for pixels in made]
    told = {"video": SimpleNamespace(pooler_output=torch.cat(features)[None])}
    if images:
        told["image"] = model.get_image_features(**images)
    return {"mm_encoder_outputs": told}


def make_batch(folder: Path, kind: str, seed: int) -> tuple[dict[str, torch.Tensor], list, list]:
    """Our tokens, labels, pixels and plans of RECORDS, right-padded, the images of each record, and all videos."""
    geometry = read_geometry_of(folder)
    rule, draw = geometry.any_resolution, np.random.default_rng(seed)
    values = json.loads((folder / "preprocessor_config.json").read_text())
    mean, resample = tuple(values["image_mean"]), values["resample"]
    records = RECORDS[kind]
    tokens = torch.zeros(len(records), LENGTH, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    pixels, plans, images, videos = [], [], [[] for _ in records], []
    for row, sizes in enumerate(records):
        count = sum(len(size) == 2 for size in sizes)
        text = [torch.tensor(draw.integers(3, 300, 2 + row))]
        for *frames, height, width in sizes:
            shape = (*(frames or [1]), height, width, 3)
            found = [Image.fromarray(one) for one in draw.integers(0, 256, shape, dtype=np.uint8)]
            plan, mark_id = rule.plan((height, width), count), geometry.image_token_id
            if frames:
                plan, mark_id = video_plan(*frames, rule.patches), geometry.video_token_id
                videos.append(found)
                tiles = np.stack(
                    [image_to_pixels(one, rule.side_px, "stretch", mean, resample=resample) for one in found]
                )
            elif rule.is_plain(count):
                tiles = image_to_pixels(*found, rule.side_px, "pad", mean, False, resample)[None]
            else:
                tiles = image_to_grid(*found, rule, resample)
            if not frames:
                images[row] += found
            assert len(tiles) == plan.tiles
            pixels.append(torch.from_numpy(tiles))
            plans.append(plan.numbers)
            text += [torch.full((plan.tokens,), mark_id), torch.tensor(draw.integers(3, 300, 5))]
        record = torch.cat(text)
        seen = (record == geometry.image_token_id) | (record == (geometry.video_token_id or -1))
        trained = torch.from_numpy(draw.random(len(record)) < 0.5) & ~seen
        trained[0], trained[-1] = False, True
        tokens[row, : len(record)] = record
        labels[row, : len(record) - 1] = torch.where(trained[1:], record[1:], -100)
    return (
        {
            "tokens": tokens,
            "labels": labels,
            "pixels": torch.cat(pixels),
            "plans": torch.tensor(plans),
        },
        images,
        videos,
    )


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict]:
    @functools.cache
    def make(kind: str, family: str) -> dict:
        import transformers

        folder = tmp_path_factory.mktemp(f"{kind}_{family}")
        tiny_models.make_tiny_llava(folder / "hf", family, tower=CASES[kind, family], kind=kind)
        convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
        batch, images, videos = make_batch(folder / "checkpoint/llava", kind, seed=list(CASES).index((kind, family)))
        packed = pack(batch)
        torch.save(batch | {"packed": packed}, folder / "batch.pt")
        judge = getattr(transformers, read_geometry_of(folder / "hf").kind.architecture)
        model = judge.from_pretrained(folder / "hf", dtype=torch.float32)
        shown = judges_features(folder / "hf", model, images, videos, kind)
        expected = forward_and_backward(model, batch, **shown)
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
