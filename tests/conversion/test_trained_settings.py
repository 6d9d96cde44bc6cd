"""An export carries what a run was trained with: in the processor where that is exact, else in words."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.data.image import image_to_pixels
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from tests.conversion.original_folders import make_original
from tests.tiny_models import make_tiny_llava

SIZES = ((40, 25), (25, 40), (28, 28), (97, 31), (7, 100))
EVERYTHING = TrainingSettings(
    "v1", "stretch", (2, 1), exif_orientation=False, image_start_end=True, image_conv_front=True
)


def to_megatron(source: Path, target: Path, clip: Path | None = None) -> list[str]:
    return convert_to_megatron(source, clip, target, model_size="tiny", precision="fp32").notes


def export(checkpoint: Path, target: Path, **more: object) -> list[str]:
    return convert_to_huggingface(checkpoint, target, model_size="tiny", precision="fp32", **more).notes


def trained(checkpoint: Path, settings: TrainingSettings) -> None:
    """As training leaves it (tests/training/test_trained_settings.py has it done by a run)."""
    LlavaFolder.of(checkpoint).write_training_settings(settings)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
def test_the_exported_processor_makes_training_pixels(tmp_path: Path, tower: str, aspect: str) -> None:
    """Tolerance 1e-4 of the 255 steps of a pixel: float32's rounding.  Converted again, the tower's own come back."""
    from transformers import AutoProcessor

    make_tiny_llava(tmp_path / "source", tower=tower)
    to_megatron(tmp_path / "source", tmp_path / "ckpt")
    trained(tmp_path / "ckpt", TrainingSettings("v1", aspect))
    export(tmp_path / "ckpt", tmp_path / "hub")
    processor = AutoProcessor.from_pretrained(tmp_path / "hub").image_processor
    side_px = LlavaFolder.of(tmp_path / "ckpt").geometry().tower.side_px
    way = LlavaFolder.of(tmp_path / "ckpt").image_processing(side_px)
    mean, std = (np.array(way[name])[:, None, None] for name in ("image_mean", "image_std"))
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = image_to_pixels(image, side_px, aspect, way["image_mean"], way["center_crop"], way["resample"])
        got = processor(image, return_tensors="np")["pixel_values"][0] * std + mean
        np.testing.assert_allclose(got * 255, pixels, rtol=0, atol=1e-4)
    to_megatron(tmp_path / "hub", tmp_path / "again")
    before, after = (LlavaFolder.of(tmp_path / name) for name in ("ckpt", "again"))
    assert after.image_processor.read_bytes() == before.image_processor.read_bytes()
    assert after.training_settings == before.training_settings == TrainingSettings("v1", aspect)


def test_what_a_hub_folder_cannot_say_is_printed(hub, tmp_path: Path, command) -> None:
    to_megatron(hub("llava_llama"), tmp_path / "ckpt")
    untrained = export(tmp_path / "ckpt", tmp_path / "untrained")
    assert len(untrained) == 1 and not (tmp_path / "untrained/llava_training.json").exists()
    trained(tmp_path / "ckpt", EVERYTHING)
    words = ["--model-size", "tiny", "--source-llm", tmp_path / "ckpt", "--target", tmp_path / "hub", "--mg2hf"]
    code, out, err = command(*words, "--precision", "fp32")
    assert code == 0, err
    for told in (
        "trained with the template v1: write prompts in it (llava_training.json)",
        "IMAGE_ASPECT_RATIO=stretch: AutoProcessor of the folder does so by itself",
        "IMAGE_TILES=2x1: no processor of this layout cuts tiles; give the model 2 tiles",
        "and 3 <image> for each image",
        "IMAGE_START_END=true: write <im_start><image><im_end>",
        "IMAGE_CONV_FRONT=true: the images stand before the first question",
        "EXIF_ORIENTATION=false: open images without turning them",
    ):
        assert told in out
    assert LlavaFolder(tmp_path / "hub").training_settings == EVERYTHING


def test_a_template_of_ones_own_is_exported(hub, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("question: a")
    to_megatron(hub("llava_llama"), tmp_path / "ckpt")
    trained(tmp_path / "ckpt", TrainingSettings(str(tmp_path / "mine.yaml")))
    for layout, tower_name in (("hub", None), ("original", "a tower")):
        export(tmp_path / "ckpt", tmp_path / layout, layout=layout, tower_name=tower_name)
        template = LlavaFolder(tmp_path / layout).training_settings.conversation_template
        assert template == str(tmp_path / layout / "conversation_template.yaml")
        assert Path(template).read_text() == "question: a"


@pytest.mark.parametrize(
    ("settings", "aspect", "start_end", "told"),
    [
        (None, "square", False, "set it to pad when trained on padded images"),
        (TrainingSettings("v1"), "square", False, "EXIF_ORIENTATION=true: the original code does not turn"),
        (TrainingSettings("v1", "pad"), "pad", False, "template v1: choose it as conv-mode"),
        (EVERYTHING, "square", True, "IMAGE_ASPECT_RATIO=stretch: the original code crops"),
    ],
)
def test_the_original_layouts_keys_follow(
    hub, tmp_path: Path, settings: TrainingSettings | None, aspect: str, start_end: bool, told: str
) -> None:
    to_megatron(hub("llava_llama"), tmp_path / "ckpt")
    if settings is not None:
        trained(tmp_path / "ckpt", settings)
    notes = export(tmp_path / "ckpt", tmp_path / "original", layout="original", tower_name="a tower")
    config = json.loads((tmp_path / "original/config.json").read_text())
    assert (config["image_aspect_ratio"], config["mm_use_im_start_end"]) == (aspect, start_end)
    assert any(told in note for note in notes), notes
    assert LlavaFolder(tmp_path / "original").training_settings == settings


def test_an_original_source_says_what_it_was_trained_with(hub, tmp_path: Path) -> None:
    """Trained on here with other images, it goes back with these; `anyres` says nothing that is known here."""
    source = tmp_path / "llava-v1.5"
    make_original(source, hub("llama"), hub("clip"), "llama")
    notes = to_megatron(source, tmp_path / "ckpt", hub("clip"))
    found = LlavaFolder.of(tmp_path / "ckpt").training_settings
    assert found == TrainingSettings(None, "pad", exif_orientation=False)
    assert any("IMAGE_ASPECT_RATIO=pad, IMAGE_TILES=1x1, EXIF_ORIENTATION=false" in note for note in notes)
    trained(tmp_path / "ckpt", TrainingSettings("v1", image_start_end=True))
    export(tmp_path / "ckpt", tmp_path / "back", layout="original")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["image_aspect_ratio"], config["mm_use_im_start_end"]) == ("square", True)

    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"image_aspect_ratio": "anyres"}))
    notes = to_megatron(source, tmp_path / "anyres", hub("clip"))
    assert LlavaFolder.of(tmp_path / "anyres").training_settings is None
    assert any("training on crops them" in note for note in notes)
