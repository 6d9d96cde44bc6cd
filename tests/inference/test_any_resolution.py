"""LLaVA-NeXT and LLaVA-OneVision answer alike: the Megatron engine, the one on transformers, transformers by itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.conversation import Exchange
from megatron_patch.errors import UserError
from megatron_patch.inference import Request, Sampling, open_engine
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from tests import tiny_models
from tests.model.test_any_resolution import judges_images

NEW_TOKENS = 12
KINDS = {"llava_next": ("mistral", "clip"), "llava_onevision": ("qwen2", "siglip_last")}


def requests(images: list[Path], kind: str) -> list[Request]:
    odd, even = tuple(images[::2]), tuple(images[1::2])
    videos = [
        Request("video", (Exchange("What happens?", None),), videos=(odd,)),
        Request("videos", (Exchange("Which is longer, <video> or <video>?", None),), videos=(odd, even)),
        Request("both", (Exchange("Is <image> in <video>?", None),), (images[0],), videos=(tuple(images),)),
    ]
    return (videos if kind == "llava_onevision" else []) + [
        Request("wide", (Exchange("<image>\nWhat is this?", None),), (images[0],)),
        Request("none", (Exchange("What?", None),)),
        Request("two", (Exchange("Which is red, <image> or <image>?", None),), (images[1], images[2])),
        Request("tall", (Exchange("<image>\nWhat colour?", None),), (images[3],)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_give_transformers_greedy_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Megatron engine shows its tower a few tiles at a time."""
    import transformers

    family, tower = KINDS[kind]
    tiny_models.make_tiny_llava(tmp_path / "hub", family, tower=tower, kind=kind)
    convert_to_megatron(tmp_path / "hub", None, tmp_path / "checkpoint", precision="fp32", model_size="tiny")
    files, draw = [], np.random.default_rng(0)
    for number, size in enumerate([(31, 90), (60, 60), (20, 44), (150, 29)]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(files[-1])
    asked, sampling = requests(files, kind), Sampling(max_new_tokens=NEW_TOKENS)

    expected, architecture = {}, LlavaFolder(tmp_path / "hub").geometry().kind.architecture
    judge = getattr(transformers, architecture).from_pretrained(tmp_path / "hub", dtype=torch.float32).eval()
    with open_engine(tmp_path / "hub") as engine:
        for request in asked:
            tokens = torch.from_numpy(engine.prepare(request).tokens)[None]
            more = {}
            if request.images:
                more = judges_images(tmp_path / "hub", [[Image.open(file) for file in request.images]], kind)
            if request.videos:  # all of a request are of one length
                frames = [[[Image.open(file)] for file in video] for video in request.videos]
                pixels = [judges_images(tmp_path / "hub", video, kind)["pixel_values"][:, 0] for video in frames]
                more["pixel_values_videos"] = torch.stack(pixels)
            with torch.no_grad():
                made = judge.generate(input_ids=tokens, max_new_tokens=NEW_TOKENS, do_sample=False, **more)
            expected[request.id] = made[0, tokens.shape[1] :].tolist()
        answers = {answer.id: list(answer.token_ids) for answer in engine.answer(asked, sampling)}
    assert answers == expected and len(set(map(tuple, expected.values()))) == len(expected)
    with open_engine(tmp_path / "checkpoint") as engine:
        monkeypatch.setattr("megatron_patch.model.llava.TILES_AT_ONCE", 5)
        assert {answer.id: list(answer.token_ids) for answer in engine.answer(asked, sampling)} == expected


def test_a_next_trained_on_single_tiles_is_not_shown_tiles(tmp_path: Path) -> None:
    """transformers cuts every image of such a model: other prompts than training's."""
    tiny_models.make_tiny_llava(tmp_path / "hub", "mistral", kind="llava_next")
    LlavaFolder(tmp_path / "hub").write_training_settings(TrainingSettings("mistral", "pad"))
    with pytest.raises(UserError, match=r"trained with IMAGE_ASPECT_RATIO=pad.*ask its Megatron checkpoint"):
        open_engine(tmp_path / "hub")
    assert json.loads((tmp_path / "hub/llava_training.json").read_text())["image_aspect_ratio"] == "pad"
