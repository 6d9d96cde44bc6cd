"""LLaVA-NeXT and LLaVA-OneVision folders of the hub: in and out byte for byte, and made of an LLM and a tower."""

import json

import pytest
import torch
import transformers
from PIL import Image

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.errors import UserError
from megatron_patch.geometry import read_geometry, read_geometry_of
from megatron_patch.llava_folder import LlavaFolder
from tests.conversion.conftest import tensors_of
from tests.conversion.test_refusals import edit_json
from tests.conversion.test_round_trip import load, same_bytes
from tests.tiny_models import make_tiny_llava, make_tiny_siglip

CASES = [("llava_next", "mistral", "clip"), ("llava_next", "llama3", "clip"), ("llava_onevision", "qwen2", "siglip")]
CASES += [("llava_onevision", "qwen2_untied", "siglip_last")]


def to_megatron(source, clip, target, **more):
    return convert_to_megatron(source, clip, target, model_size="tiny", precision="fp32", **more)


@pytest.mark.parametrize("checkpoint_format", ["torch_dist", "torch"])
@pytest.mark.parametrize(("kind", "family", "tower"), CASES)
def test_hub_to_hub(tmp_path, kind, family, tower, checkpoint_format):
    hub = make_tiny_llava(tmp_path / "hub", family, tower=tower, kind=kind)
    sizes = {"tensor_parallel": 2, "pipeline_parallel": 2} if checkpoint_format == "torch" else {}
    to_megatron(hub, None, tmp_path / "ckpt", checkpoint_format=checkpoint_format, **sizes)
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "back", model_size="tiny", precision="fp32", **sizes)
    before, after = tensors_of(hub), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() and "image_newline" in before
    assert [name for name in before if not same_bytes(before[name], after[name])] == []
    config, written = (json.loads((folder / "config.json").read_text()) for folder in (hub, tmp_path / "back"))
    for name in ("model_type", "architectures", "image_grid_pinpoints", "vision_feature_layer"):
        assert config[name] == written[name], name
    assert config.get("vision_aspect_ratio") == written.get("vision_aspect_ratio")
    assert LlavaFolder(tmp_path / "back").settings.image_aspect_ratio == "anyres"
    model = getattr(transformers, written["architectures"][0]).from_pretrained(tmp_path / "back")
    assert torch.equal(model.model.image_newline, before["image_newline"])


def test_a_new_next_counts_tokens_as_its_processor_does(hub, tmp_path):
    report = to_megatron(hub("mistral"), hub("clip"), tmp_path / "ckpt", kind="llava_next", seed=3)
    assert any("new image_newline" in note for note in report.notes)
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "hub", model_size="tiny", precision="fp32")
    model, processor = load(tmp_path / "hub")
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert type(processor).__name__ == "LlavaNextProcessor"
    newline = model.model.image_newline.detach()
    assert 0.5 < newline.std() * newline.numel() ** 0.5 < 1.5
    rule = read_geometry_of(tmp_path / "hub").any_resolution
    for size in ((90, 31), (20, 20), (8, 300)):
        made = processor(images=Image.new("RGB", size[::-1]), text="<image>\nWhat?", return_tensors="pt")
        assert (made["input_ids"] == model.config.image_token_id).sum() == rule.plan(size).tokens
        assert made["pixel_values"].shape[1] == rule.plan(size).tiles
        model(**made)
    again = to_megatron(hub("mistral"), hub("clip"), tmp_path / "again", kind="llava_next", seed=3)
    assert again.nbytes == report.nbytes
    convert_to_huggingface(tmp_path / "again", tmp_path / "hub2", model_size="tiny", precision="fp32")
    assert torch.equal(tensors_of(tmp_path / "hub2")["image_newline"], newline)


def test_a_new_onevision_has_video_token_and_grids(hub, tmp_path):
    make_tiny_siglip(tmp_path / "siglip")
    report = to_megatron(hub("qwen2"), tmp_path / "siglip", tmp_path / "ckpt", kind="llava_onevision")
    assert any("<video> added" in note for note in report.notes)
    config = json.loads((tmp_path / "ckpt/llava/config.json").read_text())
    assert (config["image_token_index"], config["video_token_index"]) == (320, 321)
    assert len(config["image_grid_pinpoints"]) == 36 and config["vision_aspect_ratio"] == "anyres_max_9"
    assert "image_seq_length" not in config
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "hub", model_size="tiny", precision="fp32")
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "hub")
    assert model.config.tie_word_embeddings
    assert json.loads((tmp_path / "hub/video_preprocessor_config.json").read_text())["size"] == {
        "height": 30,
        "width": 30,
    }


def test_a_whole_llava_has_its_kind_already(hub, tmp_path):
    with pytest.raises(UserError, match="whole LLaVA, whose config names its kind; leave the kind llava_next out"):
        to_megatron(hub("llava_llama"), None, tmp_path / "ckpt", kind="llava_next")
    with pytest.raises(UserError, match="model kind is 'next'; known: llava, llava_next, llava_onevision"):
        to_megatron(hub("llama"), hub("clip"), tmp_path / "ckpt", kind="next")
    with pytest.raises(UserError, match=r"gives 17 features for 4 x 4 patches.*wanted .* 'default'"):
        folder = make_tiny_llava(tmp_path / "hub", kind="llava_next")
        edit_json(folder / "config.json", vision_feature_select_strategy="full")
        to_megatron(folder, None, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_grid_pinpoints": [[28, 50]]}, r"image_grid_pinpoints holds \[28, 50\]"),
        ({"use_image_newline_parameter": False}, "a model without image_newline is not built here"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'; wanted anyres_max_ and a number"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer is"),
    ],
)
def test_ways_of_seeing_that_are_not_built_are_refused(tmp_path, values, said):
    folder = make_tiny_llava(tmp_path / "hub", "qwen2", tower="siglip", kind="llava_onevision")
    config = json.loads((folder / "config.json").read_text()) | values
    with pytest.raises(UserError, match=said):
        read_geometry(config)


def test_a_processor_with_other_grids_is_refused(tmp_path):
    folder = make_tiny_llava(tmp_path / "hub", kind="llava_next")
    edit_json(folder / "preprocessor_config.json", image_grid_pinpoints=[[28, 56]])
    with pytest.raises(UserError, match=r"image_grid_pinpoints of preprocessor_config\.json and config\.json differ"):
        to_megatron(folder, None, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
