"""A request becomes what training makes of the same question: tokens, tiles, padding, orientation, by the folder."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.conversation import Exchange
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.task_encoder import TaskEncoder
from megatron_patch.data.record import Record
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Request, RequestError
from megatron_patch.inference.prompt import PromptEncoder
from megatron_patch.inference.prompt_file import read_lines
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from tests import tiny_models

ANSWER = "It is a nine."


def turned_image() -> bytes:
    """Wider than high, of random pixels, with an EXIF tag that says: turn it by a quarter."""
    pixels = np.random.default_rng(3).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, "jpeg", exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> LlavaFolder:
    """Of a checkpoint whose tokenizer has <im_start> and <im_end>."""
    root = tmp_path_factory.mktemp("prompt")
    tiny_models.make_tiny_llm(root / "llm", "mistral")
    tiny_models.make_tiny_clip(root / "clip")
    words = {"precision": "fp32", "model_size": "tiny", "add_tokens": ["<im_start>", "<im_end>"]}
    convert_to_megatron(root / "llm", root / "clip", root / "checkpoint", **words)
    return LlavaFolder.of(root / "checkpoint")


def trained(folder: LlavaFolder, settings: TrainingSettings) -> TaskEncoder:
    """The encoder of a training with these settings."""
    geometry = folder.geometry()
    config = DataConfig(
        tokenizer_path=str(folder.path),
        template=settings.conversation_template,
        image_token_id=geometry.image_token_id,
        image_tokens=geometry.tower.image_tokens,
        side_px=geometry.tower.side_px,
        image_mean=folder.image_processing(geometry.tower.side_px)["image_mean"],
        image_aspect_ratio=settings.image_aspect_ratio,
        decoder_seq_len=512,
        image_conv_front=settings.image_conv_front,
        image_start_end=settings.image_start_end,
        apply_exif_orientation=settings.exif_orientation,
        tile_columns=settings.image_tiles[0],
        tile_rows=settings.image_tiles[1],
        **{"micro_batch_size": 1, "length_multiple": 1, "seed": 0, "num_workers": 0},
    )
    return TaskEncoder(config, with_pixels=True)


CHANGES = {
    "plain settings": {},
    "vicuna": {"conversation_template": "v1"},
    "pad": {"image_aspect_ratio": "pad"},
    "tiles": {"image_tiles": (2, 1), "image_aspect_ratio": "stretch"},
    "as it lies in the file": {"exif_orientation": False},
    "start and end": {"image_start_end": True},
    "in front": {"image_conv_front": True, "conversation_template": "v1"},  # of the system's words, which mistral lacks
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_prompts_are_those_of_training(folder: LlavaFolder, tmp_path: Path, change: dict):
    own = LlavaFolder(Path(shutil.copytree(folder.path, tmp_path / "llava")))
    settings = dataclasses.replace(TrainingSettings("mistral"), **change)
    own.write_training_settings(settings)
    image = turned_image()
    questions = ["What is this?\n<image>", "What colour?"]
    turns = (Exchange("<image>\nWhat is this?", ANSWER), Exchange(questions[1], ANSWER))
    row = trained(own, settings).encode_record(Record("r", turns, (image,)))
    asked = (Exchange(questions[0], ANSWER), Exchange(questions[1], None))
    prompt = PromptEncoder(own).encode(Request("r", asked, (image,)))
    length = len(prompt.tokens)
    assert row.tokens[:length].tolist() == prompt.tokens.tolist()
    assert row.labels[length - 1] == row.tokens[length] and row.labels[length - 2] == -100, "the answer begins there"
    assert np.array_equal(row.pixels, prompt.pixels)
    if change:
        template = "v1" if settings.image_conv_front else "mistral"
        plain = PromptEncoder(folder, template).encode(Request("r", asked, (image,)))
        same_pixels = plain.pixels.shape == prompt.pixels.shape and np.array_equal(plain.pixels, prompt.pixels)
        assert not (same_pixels and plain.tokens.tolist() == prompt.tokens.tolist()), "the setting changes nothing"


def test_marks_stand_where_training_puts_them(folder: LlavaFolder):
    encoder, image = PromptEncoder(folder, "mistral"), turned_image()

    def tokens(question: str, images: int) -> list[int]:
        return encoder.encode(Request("r", (Exchange(question, None),), (image,) * images)).tokens.tolist()

    assert tokens("What is this?", 1) == tokens("<image>\nWhat is this?", 1) == tokens("What is this? <image>", 1)
    assert tokens("What is this?", 2) == tokens("<image>\n<image>\nWhat is this?", 2)
    assert tokens("<image> or <image>?", 2) != tokens("<image><image> or ?", 2)


def test_requests_that_cannot_be_asked(folder: LlavaFolder, tmp_path: Path):
    encoder, image = PromptEncoder(folder, "mistral"), turned_image()
    for turns, images, said in (
        ((), (), "a last question without one"),
        ((Exchange("x", "y"),), (), "a last question without one"),
        ((Exchange("x", None), Exchange("y", None)), (), "a last question without one"),
        ((Exchange("<image>", None),), (image,), "the prompt is empty"),
        ((Exchange("<image> x", None),), (), "1 <image> marks, 0 images"),
        ((Exchange("<image> x", None),), (image, image), "1 <image> marks, 2 images"),
        ((Exchange("x", None),), (tmp_path / "none.png",), "image missing"),
        ((Exchange("x", None),), (tmp_path,), "image missing"),
        ((Exchange("x", None),), (image[:300],), "image truncated"),
        ((Exchange("\ud800", None),), (), "not Unicode"),
        ((Exchange("x " * 600, None),), (), "wanted fewer than 512"),
    ):
        with pytest.raises(RequestError, match=r"^r: ") as error:
            encoder.encode(Request("r", turns, images))
        assert said in str(error.value)
    with pytest.raises(RequestError, match="one question and one answer"):
        PromptEncoder(folder, "plain").encode(Request("r", (Exchange("x", "y"), Exchange("z", None))))
    only_an_image = Request("r", (Exchange("", None),), (image,))
    assert len(PromptEncoder(folder, "plain").encode(only_an_image).tokens) >= 16, "captions need no question"


def test_an_unknown_template_is_refused(folder: LlavaFolder):
    with pytest.raises(UserError, match="conversation template is 'none'"):
        PromptEncoder(folder, "none")


def test_lines_with_videos(folder: LlavaFolder, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(name.encode() + bytes([number]))
    (tmp_path / "still.png").write_bytes(b"still")
    lines = [
        {"video": "a", "prompt": "x"},
        {"videos": ["a", ["b/0.png", "b/4.png", "b/2.png"]], "prompt": "<video> <video>", "frames": 2},
        {"video": ["b/0.png", "still.png"], "image": "still.png", "text": "x"},
        {"video": "none", "prompt": "x"},
        {"video": "../a", "prompt": "x"},
        {"video": [], "prompt": "x"},
        {"videos": ["a", 3], "prompt": "x"},
        {"video": "a", "frames": 0, "prompt": "x"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(read_lines((tmp_path / "p.jsonl").read_bytes().splitlines(), tmp_path))
    videos = [None if line.request is None else line.request.videos for line in found]
    frames = {name: [name.encode() + bytes([number]) for number in range(5)] for name in ("a", "b")}
    assert videos[0] == (tuple(frames["a"]),)
    assert videos[1] == ((frames["a"][0], frames["a"][4]), (frames["b"][0], frames["b"][2]))
    assert videos[2] == ((frames["b"][0], b"still"),) and found[2].request.images == (b"still",)
    assert videos[5] == ()
    for number, said in (
        (3, "video missing: none: not in"),
        (4, "outside the video folder"),
        (6, "videos are not all file names"),
        (7, "frames per video is 0"),
    ):
        assert found[number].request is None and said in found[number].error, found[number]
    with pytest.raises(RequestError, match="1: video: 1 videos for this model, which knows no <video>, wanted a LLaVA"):
        PromptEncoder(folder, "mistral").encode(found[0].request)
