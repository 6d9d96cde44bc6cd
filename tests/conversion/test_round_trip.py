"""Hub -> Megatron -> hub: every tensor byte-equal, transformers loads the export and says the same."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from tests.conversion.conftest import tensors_of
from tests.tiny_models import FAMILIES, make_tiny_clip, make_tiny_llava, make_tiny_llm


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))
    )


def there_and_back(tmp_path, source, clip, precision="fp32", **export):
    convert_to_megatron(source, clip, tmp_path / "ckpt", model_size="tiny", precision=precision)
    convert_to_huggingface(
        tmp_path / "ckpt", tmp_path / "back", model_size="tiny", precision=precision, hf_checkpoint=source, **export
    )
    return tmp_path / "back"


def load(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval(), AutoProcessor.from_pretrained(folder)


def image() -> Image.Image:
    values = torch.randint(0, 256, (40, 52, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def greedy(model, processor, tokens=16):
    batch = processor(text="USER: <image>\nWhat digit is this?", images=image(), return_tensors="pt")
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 16
    with torch.no_grad():
        answer = model.generate(**batch, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return batch, answer[0, -tokens:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_llava_round_trip(hub, tmp_path, family):
    source = hub(f"llava_{family}")
    back = there_and_back(tmp_path, source, None)
    before, after = tensors_of(source), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)

    old, old_processor = load(source)
    new, new_processor = load(back)
    batch, said = greedy(old, old_processor)
    again, repeated = greedy(new, new_processor)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert said == repeated and len(set(said)) > 1
    with torch.no_grad():
        assert torch.equal(old(**batch).logits, new(**again).logits)


@pytest.mark.parametrize(("family", "clip"), [("llama", "clip_full"), ("mistral", "clip"), ("qwen2", "clip_bare")])
def test_parts_round_trip(hub, tmp_path, family, clip):
    """LLM and tower come back byte-equal; the embedding has grown when <image> lies behind its rows."""
    llm, tower = tensors_of(hub(family)), tensors_of(hub(clip))
    back = there_and_back(tmp_path, hub(family), hub(clip))
    after = tensors_of(back)
    grown = family != "qwen2"  # qwen2's embedding has spare rows
    for name, tensor in llm.items():
        mine = after.pop(f"language_model.{name}")
        if grown and name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert mine.shape == (321, 64)
            torch.testing.assert_close(mine[320], tensor.mean(dim=0), rtol=0, atol=1e-6)
            mine = mine[:320].contiguous()
        assert same_bytes(tensor, mine), name
    for name, tensor in tower.items():
        if "text_" in name or name in ("logit_scale", "visual_projection.weight"):
            continue
        assert same_bytes(tensor, after.pop("vision_tower.vision_model." + name.removeprefix("vision_model."))), name
    assert sorted(after) == [f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("bias", "weight")]

    model, processor = load(back)
    assert model.config.text_config.vocab_size == (321 if grown else 352)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == 320
    assert processor.tokenizer.pad_token is not None
    greedy(model, processor, tokens=4)


def test_new_projector_is_torch_linear(hub, tmp_path):
    """Uniform within 1/sqrt(fan_in), the same for the same seed, another for another."""
    for name, seed in (("a", 1234), ("b", 1234), ("c", 5)):
        convert_to_megatron(hub("llama"), hub("clip"), tmp_path / name, model_size="tiny", precision="fp32", seed=seed)
        convert_to_huggingface(tmp_path / name, tmp_path / f"{name}_hf", model_size="tiny", precision="fp32")
    a, b, c = (tensors_of(tmp_path / f"{name}_hf") for name in "abc")
    for layer, fan_in in (("linear_1", 48), ("linear_2", 64)):
        name = f"multi_modal_projector.{layer}.weight"
        bound = fan_in**-0.5
        assert same_bytes(a[name], b[name]) and not torch.equal(a[name], c[name])
        assert 0.98 * bound < a[name].abs().max() <= bound
        assert a[name].std() == pytest.approx(bound / 3**0.5, rel=0.05)
        bias = a[f"multi_modal_projector.{layer}.bias"]
        assert 0.8 * bound < bias.abs().max() <= bound
    provenance = json.loads((tmp_path / "c/llava/provenance.json").read_text())
    assert provenance["projector"] == {
        "type": "mlp2x_gelu",
        "origin": "new",
        "initialisation": "torch.nn.Linear",
        "seed": 5,
    }


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(hub, tmp_path, precision, dtype):
    """A source in PR keeps its bytes; another is cast once."""
    same = make_tiny_llava(tmp_path / "same", "mistral", dtype=dtype)
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    before, after = tensors_of(same), tensors_of(there_and_back(tmp_path / "1", same, None, precision))
    assert all(same_bytes(before[name], after[name]) for name in before | after)
    before = tensors_of(hub("llava_mistral"))
    after = tensors_of(there_and_back(tmp_path / "2", hub("llava_mistral"), None, precision))
    assert all(same_bytes(before[name].to(dtype), after[name]) for name in before | after)
    assert json.loads((tmp_path / "2/back/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_shards_with_index(hub, tmp_path):
    source = hub("llava_llama")
    back = there_and_back(tmp_path, source, None, shard_bytes=300_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    before, after = tensors_of(source), tensors_of(back)
    assert len(set(index["weight_map"].values())) >= 4 and set(index["weight_map"]) == set(before)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert all(same_bytes(before[name], after[name]) for name in before)
    for path in back.glob("model-*.safetensors"):
        assert path.stat().st_size < 320_000
    load(back)
    # and the sharded folder is a source again
    (tmp_path / "2").mkdir()
    again = tensors_of(there_and_back(tmp_path / "2", back, None))
    assert all(same_bytes(before[name], again[name]) for name in before)


DIALECTS = {
    "in memory in transformers 5": lambda name: (
        name.replace("language_model.lm_head", "lm_head")
        .replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.vision_model", "model.vision_tower")
        .replace("multi_modal_projector", "model.multi_modal_projector")
    ),
    "as transformers 5 saves": lambda name: name.replace("vision_tower.vision_model", "vision_tower"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_names(hub, tmp_path, dialect):
    """Other spellings of the source give the same export, and known buffers are no weights."""
    source, before = hub("llava_mistral"), tensors_of(hub("llava_mistral"))
    other = tmp_path / "other"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    renamed = {DIALECTS[dialect](name): tensor for name, tensor in before.items()}
    assert renamed.keys() != before.keys()
    renamed["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    save_file(renamed, str(other / "model.safetensors"))
    after = tensors_of(there_and_back(tmp_path, other, None))
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)


def test_pickled_weights(hub, tmp_path):
    """pytorch_model.bin, as the hub's clip-vit-large-patch14-336 has it."""
    clip = tmp_path / "clip"
    make_tiny_clip(clip, full_model=True)
    weights = load_file(str(clip / "model.safetensors"))
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)
    torch.save(weights, clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    after = tensors_of(there_and_back(tmp_path, hub("llama"), clip))
    for name, tensor in weights.items():
        if name.startswith("vision_model.") and not name.endswith("position_ids"):
            assert same_bytes(tensor, after[f"vision_tower.{name}"]), name


def test_tied_model_with_a_head_in_its_file(hub, tmp_path):
    """The duplicate is dropped; the tied model stays tied."""
    llm = tmp_path / "llm"
    make_tiny_llm(llm, "qwen2")
    weights = load_file(str(llm / "model.safetensors"))
    assert "lm_head.weight" not in weights
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, str(llm / "model.safetensors")
    )
    after = tensors_of(there_and_back(tmp_path, llm, hub("clip")))
    assert "language_model.lm_head.weight" not in after
    assert same_bytes(weights["model.embed_tokens.weight"], after["language_model.model.embed_tokens.weight"])


def test_generation_config_and_hub_folder(hub, tmp_path):
    convert_to_megatron(hub("mistral"), hub("clip"), tmp_path / "c", model_size="tiny", precision="fp32")
    names = {path.name for path in (tmp_path / "c/llava").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "untrained_tower.safetensors",
    }
    source = hub("mistral") / "generation_config.json"
    assert (tmp_path / "c/llava/generation_config.json").read_bytes() == source.read_bytes()
    config = json.loads((tmp_path / "c/llava/config.json").read_text())
    assert (config["image_token_index"], config["image_seq_length"], config["vision_feature_layer"]) == (320, 16, -2)
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert config["text_config"]["num_key_value_heads"] == 2 and config["text_config"]["vocab_size"] == 321
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    assert (tmp_path / "c/latest_checkpointed_iteration.txt").read_text().strip() == "release"
    carried = tensors_of(tmp_path / "c/llava")
    assert len(carried) == 18 and all("layers.3." in name or "post_layernorm" in name for name in carried)


def test_linear_projector(hub, tmp_path):
    """One layer, kept under its own key; the hub's LLaVA layout cannot hold it, which is said."""
    from megatron_patch.conversion.torch_dist import CheckpointReader
    from megatron_patch.errors import UserError

    target = tmp_path / "c"
    convert_to_megatron(hub("llama"), hub("clip"), target, model_size="tiny", precision="fp32", projector="linear")
    with CheckpointReader(target / "release") as reader:
        shapes = {key: tuple(entry.size) for key, entry in reader.tensors.items() if "projection" in key}
    assert shapes == {"vision_projection.encoder.weight": (64, 48), "vision_projection.encoder.bias": (64,)}
    with pytest.raises(UserError, match="linear"):
        convert_to_huggingface(target, tmp_path / "hf", model_size="tiny", precision="fp32")
