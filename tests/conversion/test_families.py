"""Every family of LLM and every kind of tower: round trip byte for byte, the same words, refusals by name."""

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.conversion.hub_weights import hub_name
from megatron_patch.conversion.plan import wanted_tensors
from megatron_patch.conversion.table import table_of_weights
from megatron_patch.errors import UserError
from megatron_patch.geometry import read_geometry
from megatron_patch.language_models import LANGUAGE_MODELS
from megatron_patch.training.config import decoder_arguments
from megatron_patch.vision_towers import VISION_TOWERS
from tests.conversion.conftest import tensors_of
from tests.conversion.test_round_trip import image, load, same_bytes, there_and_back
from tests.conversion.tiny_openai_clip import SIDE_PX, make_tiny_openai_clip
from tests.tiny_models import (
    MORE_FAMILIES,
    TOWERS,
    make_tiny_llava,
    make_tiny_llm,
    make_tiny_siglip,
    text_config,
    vision_config,
)


def greedy(folder: Path, tokens: int = 32) -> tuple[list[int], torch.Tensor]:
    """The next tokens that transformers chooses with the folder's own processor, and the logits of the prompt."""
    model, processor = load(folder)
    batch = processor(text="USER: <image>\nWhat digit is this?", images=image(), return_tensors="pt")
    vision = model.config.vision_config
    assert int((batch["input_ids"] == 320).sum()) == (vision.image_size // vision.patch_size) ** 2
    with torch.no_grad():
        answer = model.generate(**batch, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        return answer[0, -tokens:].tolist(), model(**batch).logits


@pytest.mark.parametrize(
    ("family", "tower"), [(family, "clip") for family in MORE_FAMILIES] + [("llama", tower) for tower in TOWERS[1:]]
)
def test_round_trip_and_the_same_words(tmp_path, family, tower):
    source = make_tiny_llava(tmp_path / "hf", family, tower=tower)
    back = there_and_back(tmp_path, source, None)
    before, after = tensors_of(source), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)
    (said, logits), (repeated, again) = greedy(source), greedy(back)
    assert said == repeated and len(set(said)) > 3
    assert torch.equal(logits, again)


@pytest.mark.parametrize("full", [False, True], ids=["SiglipVisionModel", "SiglipModel"])
def test_siglip_as_a_part(tmp_path, full):
    """Layer -2, all tokens, its own processor; the pooling head is carried along."""
    llm, tower = make_tiny_llm(tmp_path / "llm", "qwen3"), make_tiny_siglip(tmp_path / "tower", full_model=full)
    convert_to_megatron(llm, tower, tmp_path / "ckpt", model_size="tiny", precision="fp32")
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "back", model_size="tiny", precision="fp32")
    after = tensors_of(tmp_path / "back")
    for name, tensor in tensors_of(tower).items():
        if name.startswith("vision_model."):
            assert same_bytes(tensor, after[f"vision_tower.{name}"]), name
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "full")
    images = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "SiglipImageProcessor" and images["size"] == {"height": 30, "width": 30}
    greedy(tmp_path / "back", tokens=4)


def test_the_feature_layer_may_be_the_last(hub, tmp_path, command):
    """All layers run then, and only what lies behind them is carried along; a whole LLaVA keeps its own."""
    words = ["--model-size", "tiny", "--precision", "fp32", "--vision-feature-layer", "-1"]
    code, _, err = command(
        "--source-llm", hub("llama"), "--source-clip", hub("clip"), "--target", tmp_path / "c", *words
    )
    assert code == 0, err
    assert json.loads((tmp_path / "c/llava/config.json").read_text())["vision_feature_layer"] == -1
    assert len(tensors_of(tmp_path / "c/llava")) == 2
    code, _, err = command("--source-llm", hub("llava_llama"), "--target", tmp_path / "d", *words)
    assert code == 2 and "leave the vision feature layer -1 out" in err and not (tmp_path / "d").exists()


# ---------------------------------------------------------------- OpenAI's TorchScript archive


@pytest.fixture(scope="module")
def openai(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """The archive, and the model in it in fp32."""
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    return path, make_tiny_openai_clip(path)


def test_openai_archive(hub, openai, tmp_path):
    """What transformers' tower says of the exported weights is what OpenAI's module says, layer for layer."""
    path, model = openai
    convert_to_megatron(hub("llama"), path, tmp_path / "ckpt", model_size="tiny", precision="fp32")
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "back", model_size="tiny", precision="fp32")
    llava, _ = load(tmp_path / "back")
    vision = llava.config.vision_config
    numbers = (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads)
    assert (*numbers, vision.image_size, vision.patch_size) == (128, 512, 3, 2, 28, 7)
    assert (vision.hidden_act, vision.layer_norm_eps) == ("quick_gelu", 1e-5)
    pixels = torch.randn(2, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        for layers in range(4):
            torch.testing.assert_close(theirs[layers], model.visual.hidden(pixels, layers), rtol=0, atol=1e-5)
    provenance = json.loads((tmp_path / "ckpt/llava/provenance.json").read_text())
    assert "ViT-tiny.pt" in json.dumps(provenance["sources"]["clip"])


def test_openai_bytes_stay_in_fp16(hub, openai, tmp_path):
    path, model = openai
    convert_to_megatron(hub("llama"), path, tmp_path / "ckpt", model_size="tiny", precision="fp16")
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "back", model_size="tiny", precision="fp16")
    after, tower = tensors_of(tmp_path / "back"), "vision_tower.vision_model."
    joined = model.visual.transformer.resblocks[1].attn.in_proj_weight.half()
    for number, letter in enumerate("qkv"):
        found = after[f"{tower}encoder.layers.1.self_attn.{letter}_proj.weight"]
        assert same_bytes(found, joined[128 * number : 128 * (number + 1)])
    assert same_bytes(after[tower + "embeddings.patch_embedding.weight"], model.visual.conv1.weight.half())
    assert same_bytes(
        after[tower + "encoder.layers.2.mlp.fc2.bias"], model.visual.transformer.resblocks[2].mlp.c_proj.bias.half()
    )
    assert same_bytes(after[tower + "post_layernorm.weight"], model.visual.ln_post.weight.half())


def test_a_plain_state_dict_of_openai_names(hub, openai, tmp_path):
    """The same weights saved by torch.save, one of them transposed in memory."""
    _, model = openai
    state = model.state_dict()
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    state[name] = state[name].t().contiguous().t()
    torch.save(state, tmp_path / "state.pt")
    convert_to_megatron(hub("llama"), tmp_path / "state.pt", tmp_path / "ckpt", model_size="tiny", precision="fp32")
    convert_to_huggingface(tmp_path / "ckpt", tmp_path / "back", model_size="tiny", precision="fp32")
    found = tensors_of(tmp_path / "back")["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert same_bytes(found, state[name].contiguous())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def rewritten(source: Path, target: Path, change) -> Path:
    """The archive with another data.pkl."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return target


def test_openai_files_that_are_refused(hub, openai, tmp_path):
    path, model = openai

    def refused(source: Path, text: str) -> None:
        with pytest.raises(UserError, match=text):
            convert_to_megatron(hub("llama"), source, tmp_path / "ckpt", model_size="tiny", precision="fp32")
        assert not (tmp_path / "ckpt").exists()

    evil = rewritten(path, tmp_path / "evil.pt", lambda data: pickle.dumps(Evil(tmp_path / "ran")))
    refused(evil, "asks for posix.system, which no weights need")
    assert not (tmp_path / "ran").exists()
    shutil.copyfile(path, tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", path.stat().st_size - 1000)
    refused(tmp_path / "cut.pt", "cut.pt is no archive of CLIP weights .*not a zip file")
    torch.save({"visual.layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "resnet.pt")
    refused(tmp_path / "resnet.pt", "holds no vision transformer")
    state = model.state_dict()
    torch.save(state | {"visual.adapter.weight": torch.ones(2)}, tmp_path / "more.pt")
    refused(tmp_path / "more.pt", r"unknown \(1\): visual.adapter.weight")
    del state["visual.transformer.resblocks.1.ln_2.bias"]
    torch.save(state, tmp_path / "less.pt")
    refused(tmp_path / "less.pt", r"missing \(1\): .*layers.1.layer_norm2.bias")
    refused(tmp_path / "absent.pt", "absent.pt is not a folder")


# ---------------------------------------------------------------- geometry


def config(family: str = "llama", tower: str = "clip", text: dict | None = None, **values) -> dict:
    """A full LLaVA config as read_geometry wants it."""
    whole = {
        "text_config": text_config(family).to_dict() | (text or {}),
        "vision_config": vision_config(tower=tower).to_dict(),
    }
    return whole | {"image_token_index": 320} | values


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_parameter_count_equals_transformers(family):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(text_config(family))
    geometry = read_geometry(config(family)).language
    assert geometry.parameters == sum(tensor.numel() for tensor in model.parameters())


def test_qwen3_as_published():
    sizes = {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
    assert read_geometry(config("qwen3", text=sizes)).language.parameters == 596_049_920


# hidden, ffn, layers, heads, side, patch as published; image tokens
PUBLISHED_TOWERS = {
    "openai/clip-vit-base-patch32": ("clip", 768, 3072, 12, 12, 224, 32, 49),
    "openai/clip-vit-base-patch16": ("clip", 768, 3072, 12, 12, 224, 16, 196),
    "openai/clip-vit-large-patch14": ("clip", 1024, 4096, 24, 16, 224, 14, 256),
    "openai/clip-vit-large-patch14-336": ("clip", 1024, 4096, 24, 16, 336, 14, 576),
    "google/siglip-base-patch16-224": ("siglip", 768, 3072, 12, 12, 224, 16, 196),
    "google/siglip-so400m-patch14-384": ("siglip", 1152, 4304, 27, 16, 384, 14, 729),
}


@pytest.mark.parametrize("name", PUBLISHED_TOWERS)
def test_the_table_knows_every_tensor_of_the_published_towers(name):
    """Names and shapes are those of transformers' own model, made without memory."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    kind, hidden, ffn, layers, heads, side_px, patch_px, tokens = PUBLISHED_TOWERS[name]
    vision = vision_config(layers, kind)
    vision.update({"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads})
    vision.update({"image_size": side_px, "patch_size": patch_px})
    strategy = "default" if kind == "clip" else "full"
    whole = LlavaConfig(vision_config=vision, text_config=text_config("qwen3"), vision_feature_select_strategy=strategy)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(whole)
    theirs = {hub_name("LLaVA", key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    geometry = read_geometry(json.loads(whole.to_json_string(use_diff=False)))
    ours = {tensor.name: tensor.shape for tensor in wanted_tensors(table_of_weights(geometry), geometry)}
    assert ours == theirs
    assert geometry.tower.image_tokens == tokens


def test_strategies_count_tokens_as_transformers_does():
    """`full` keeps CLIP's class token; `default` drops SigLIP's first patch."""
    assert read_geometry(config(vision_feature_select_strategy="full")).tower.image_tokens == 17
    assert read_geometry(config(tower="siglip", vision_feature_select_strategy="default")).tower.image_tokens == 15


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("llama", {"model_type": "gemma2"}, f"'gemma2'; known: {', '.join(LANGUAGE_MODELS)}"),
        ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'; known: default, llama3"),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "'linear'; known: default, llama3",
        ),
        ("llama3", {"attention_bias": True}, "attention_bias=true"),
    ],
)
def test_unknown_language_models_are_refused(family, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_geometry(config(family, text=text))


@pytest.mark.parametrize("name", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_other_factors_than_llama3s_are_refused(name):
    scaling = dict(text_config("llama3").rope_parameters)
    with pytest.raises(UserError, match=f"{name} is 2.0, not .*Llama-3's own values"):
        read_geometry(config("llama3", text={"rope_parameters": scaling | {name: 2.0}}))


def test_unknown_towers_are_refused():
    whole = config()
    whole["vision_config"]["model_type"] = "dinov2"
    with pytest.raises(UserError, match=f"'dinov2'; known: {', '.join(VISION_TOWERS)}"):
        read_geometry(whole)


def test_a_sliding_window_is_honoured_up_to_its_length():
    """The parity tests run with 48 tokens in a window of 48."""
    language = read_geometry(config("mistral_window")).language
    assert language.sliding_window == 48 and decoder_arguments(language, 48)
    with pytest.raises(UserError, match=r"DECODER_SEQ_LEN=49 must be at most 48: .* sliding window"):
        decoder_arguments(language, 49)
