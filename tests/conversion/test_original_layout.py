"""liuhaotian's LLaVA layout: in, out, and across to the hub's; every tensor byte-equal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron, original_layout
from megatron_patch.errors import UserError
from megatron_patch.geometry import read_geometry_of
from megatron_patch.vision_towers import published_towers
from tests.conversion.conftest import tensors_of
from tests.conversion.original_folders import make_original, use_sentencepiece
from tests.conversion.test_refusals import edit_json, forward
from tests.conversion.test_round_trip import greedy, load, same_bytes
from tests.tiny_models import make_tiny_clip, make_tiny_llava, make_tiny_siglip

TOWER = "model.vision_tower.vision_tower."


def to_megatron(source, clip, target, **more):
    return convert_to_megatron(source, clip, target, model_size="tiny", precision="fp32", **more)


def export(checkpoint, target, **more):
    return convert_to_huggingface(checkpoint, target, model_size="tiny", precision="fp32", **more)


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bytes(before[name], after[name])] == []


def in_hub_names(weights: dict) -> dict:
    """Written down a second time on purpose: the names that LlavaForConditionalGeneration's files have."""
    result = {}
    for name, tensor in weights.items():
        if name.startswith(TOWER):
            name = name.replace(TOWER, "vision_tower.")
        elif name.startswith("model.mm_projector."):
            name = name.replace("model.mm_projector.0", "multi_modal_projector.linear_1")
            name = name.replace("model.mm_projector.2", "multi_modal_projector.linear_2")
        else:
            name = "language_model." + name
        result[name] = tensor
    return result


@pytest.mark.parametrize(
    ("family", "inside", "linear", "pickled"),
    [
        ("llama", True, False, True),
        ("llama", False, True, False),
        ("mistral", False, False, True),
        ("qwen2", True, True, True),
    ],
)
def test_original_to_original(hub, tmp_path, family, inside, linear, pickled):
    """Names, bytes, config and tokenizer come back as they were, whatever the projector and wherever the tower."""
    source, clip = tmp_path / "llava-v1.5", hub("clip")
    before = make_original(source, hub(family), clip, family, inside, linear, pickled)
    report = to_megatron(source, clip, tmp_path / "ckpt")
    assert any("IMAGE_ASPECT_RATIO=pad" in note for note in report.notes)
    layout = "original" if inside else "original_without_tower"
    export(tmp_path / "ckpt", tmp_path / "back", layout=layout, hf_checkpoint=source)
    assert_same(before, tensors_of(tmp_path / "back"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert not list((tmp_path / "back").glob("processor_config.json"))


def test_tokenizer_of_sentencepiece(hub, tmp_path):
    """A folder with tokenizer.model alone: the checkpoint's tokenizer cuts as sentencepiece does, and it comes back."""
    import sentencepiece
    from transformers import AutoTokenizer

    source = tmp_path / "llava-v1.5"
    make_original(source, hub("llama"), hub("clip"), "llama")
    sentences = [f"USER: What is {number} in the picture? ASSISTANT: It is a digit." for number in range(200)]
    model = use_sentencepiece(source, sentences)
    to_megatron(source, hub("clip"), tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "back", layout="original")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert not (tmp_path / "back/tokenizer.json").exists()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ckpt/llava")
    for text in ("What is the digit?", "USER: x  y\nASSISTANT:", "Grüße, 世界"):
        assert tokenizer.encode(text) == [1, *pieces.encode(text)], text
    assert tokenizer.encode("<image>", add_special_tokens=False) == [pieces.get_piece_size()]


def test_original_to_hub(hub, tmp_path):
    """The hub's layout of an original folder: transformers loads it, and <image> has its row."""
    source = tmp_path / "llava-v1.5"
    before = in_hub_names(make_original(source, hub("llama"), hub("clip"), "llama"))
    to_megatron(source, hub("clip"), tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "hub")
    after = tensors_of(tmp_path / "hub")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert after[name].shape == (321, 64)
        torch.testing.assert_close(after[name][320], before[name].mean(dim=0), rtol=0, atol=1e-6)
        after[name] = after[name][:320].contiguous()
    assert_same(before, after)
    model, processor = load(tmp_path / "hub")
    batch, _ = greedy(model, processor, tokens=4)
    assert not (tmp_path / "hub/original").exists()
    with torch.no_grad():
        ours = model(**batch).logits[..., :320]
        theirs = original_forward(hub("llama"), hub("clip"), before, batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def original_forward(llm, clip, weights: dict, batch: dict) -> torch.Tensor:
    """Logits put together from the parts as the original code does it: patches of layer -2, two linear layers with a
    GELU between, the text's embeddings before and after."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    language, tower = AutoModelForCausalLM.from_pretrained(llm).eval(), CLIPVisionModel.from_pretrained(clip).eval()
    features = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    linear = torch.nn.functional.linear
    first, second = (
        [weights[f"multi_modal_projector.linear_{layer}.{kind}"] for kind in ("weight", "bias")] for layer in (1, 2)
    )
    features = linear(torch.nn.functional.gelu(linear(features, *first)), *second)
    (ids,) = batch["input_ids"]
    begin = int((ids == 320).nonzero()[0])
    embed = language.get_input_embeddings()
    parts = [embed(ids[None, :begin]), features, embed(ids[None, begin + 16 :])]
    return language(inputs_embeds=torch.cat(parts, dim=1)).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_hub_to_original_and_back(hub, tmp_path, family):
    """A hub LLaVA in the original layout has the original's fields, and is a source again."""
    before = tensors_of(hub(f"llava_{family}"))
    to_megatron(hub(f"llava_{family}"), None, tmp_path / "ckpt")
    with pytest.raises(UserError, match="--vision-tower-name"):
        export(tmp_path / "ckpt", tmp_path / "original", layout="original")
    export(tmp_path / "ckpt", tmp_path / "original", layout="original", tower_name="openai/clip-vit-large-patch14-336")
    assert_same(before, in_hub_names(tensors_of(tmp_path / "original")))
    config = json.loads((tmp_path / "original/config.json").read_text())
    expected = {
        "architectures": [f"Llava{family.removesuffix('2').title()}ForCausalLM"],
        "model_type": f"llava_{family.removesuffix('2')}",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 48,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "rope_theta": 1e4 if family == "llama" else 1e6,
        "rope_scaling": None,
        "vocab_size": 352 if family == "qwen2" else 336,
        "torch_dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    assert "rope_parameters" not in config and "text_config" not in config
    to_megatron(tmp_path / "original", hub("clip"), tmp_path / "again")
    export(tmp_path / "again", tmp_path / "hub")
    assert_same(before, tensors_of(tmp_path / "hub"))


@pytest.mark.parametrize(("family", "tower"), [("llama3", "clip"), ("smollm2", "siglip"), ("mistral_window", "siglip")])
def test_other_families_across_the_layouts(tmp_path, family, tower):
    """Rope scaling, tied heads, windows and SigLIP survive the original's config: same bytes, same geometry."""
    source = make_tiny_llava(tmp_path / "source", family, tower=tower)
    clip = make_tiny_siglip(tmp_path / "clip") if tower == "siglip" else make_tiny_clip(tmp_path / "clip")
    to_megatron(source, None, tmp_path / "1")
    export(tmp_path / "1", tmp_path / "original", layout="original", tower_name="a tower")
    to_megatron(tmp_path / "original", clip, tmp_path / "2")
    export(tmp_path / "2", tmp_path / "hub")
    assert_same(tensors_of(source), tensors_of(tmp_path / "hub"))
    assert read_geometry_of(tmp_path / "1/llava") == read_geometry_of(tmp_path / "2/llava")


def test_llms_the_original_code_has_no_class_for(tmp_path):
    source = make_tiny_llava(tmp_path / "source", "qwen3")
    to_megatron(source, None, tmp_path / "ckpt")
    with pytest.raises(UserError, match="'qwen3'; known: llama, mistral, qwen2"):
        export(tmp_path / "ckpt", tmp_path / "original", layout="original", tower_name="a tower")
    assert not (tmp_path / "original").exists()


def test_parts_to_original(hub, tmp_path):
    """The tower is named after the folder it came from; without it no tower tensor is written."""
    to_megatron(hub("mistral"), hub("clip"), tmp_path / "ckpt", projector="linear")
    report = export(tmp_path / "ckpt", tmp_path / "original", layout="original_without_tower")
    config = json.loads((tmp_path / "original/config.json").read_text())
    assert (config["mm_vision_tower"], config["unfreeze_mm_vision_tower"]) == ("clip", False)
    names = tensors_of(tmp_path / "original")
    assert not [name for name in names if "vision_tower" in name]
    assert {name: tuple(tensor.shape) for name, tensor in names.items() if "projector" in name} == {
        "model.mm_projector.weight": (64, 48),
        "model.mm_projector.bias": (64,),
    }
    assert any("a tuned tower needs" in note for note in report.notes)


def test_added_tokens_are_kept(hub, tmp_path):
    """Rows of new tokens are not taken for the one of <image>: they and their tokenizer are exported."""
    from transformers import AutoTokenizer

    source = tmp_path / "llava"
    make_original(source, hub("llama"), hub("clip"), "llama")
    to_megatron(source, hub("clip"), tmp_path / "ckpt", add_tokens=["<a_0>..<a_2>"])
    export(tmp_path / "ckpt", tmp_path / "back", layout="original")
    assert tensors_of(tmp_path / "back")["lm_head.weight"].shape == (324, 64)
    assert json.loads((tmp_path / "back/config.json").read_text())["vocab_size"] == 324
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.convert_tokens_to_ids(["<a_0>", "<a_2>", "<image>"]) == [320, 322, 323]


def test_known_towers_are_those_of_transformers():
    """A tower inside a folder has no config there: the numbers of CLIP's four that are known."""
    tokens = {"patch14-336": 576, "patch14": 256, "patch16": 196, "patch32": 49}
    for name in (name for name in published_towers() if name.startswith("openai/")):
        values = {"mm_vision_tower": name, "mm_hidden_size": 1024 if "large" in name else 768}
        source = original_layout.Original(Path("x"), values, "llama", name, -2, "mlp2x_gelu")
        found = original_layout.find_tower(source, None, [TOWER + "vision_model.pre_layrnorm.weight"])
        config = found.config
        assert found.inside and found.folder is None and config.hidden_act == "quick_gelu"
        assert (config.image_size // config.patch_size) ** 2 == tokens[
            name.partition("patch")[1] + name.split("patch")[1]
        ]
        assert config.intermediate_size == 4 * config.hidden_size == 256 * config.num_attention_heads


def test_siglip_inside_has_lost_its_last_layer():
    """The original code takes the last of its 27 layers and its pooling head off, and sees the last of the rest."""
    name = "google/siglip-so400m-patch14-384"
    source = original_layout.Original(Path("x"), {"mm_hidden_size": 1152}, "qwen2", name, -2, "mlp2x_gelu")
    stored = [f"{TOWER}vision_model.encoder.layers.{layer}.mlp.fc1.bias" for layer in range(26)]
    found = original_layout.find_tower(source, None, stored)
    config = found.config
    assert (config.num_hidden_layers, config.vision_use_head, found.feature_layer) == (26, False, -1)
    assert (config.image_size // config.patch_size) ** 2 == 729 and config.intermediate_size == 4304
    whole = [f"{TOWER}vision_model.encoder.layers.{layer}.mlp.fc1.bias" for layer in range(27)]
    found = original_layout.find_tower(source, None, whole)
    assert (found.config.num_hidden_layers, found.feature_layer) == (27, -2)


@pytest.fixture
def original(hub, tmp_path):
    folder = tmp_path / "source"
    make_original(folder, hub("llama"), hub("clip"), "llama", pickled=False)
    return folder


REFUSED = {
    "spatial": ({"mm_patch_merge_type": "spatial"}, ["'spatial'", "known: flat, spatial_unpad"]),
    "class token kept": ({"mm_vision_select_feature": "cls_patch"}, ["'cls_patch'", "known: patch"]),
    "another class": ({"architectures": ["LlavaMptForCausalLM"]}, ["LlavaMptForCausalLM", "LlavaLlamaForCausalLM"]),
    "another projector": ({"mm_projector_type": "mlp3x_gelu"}, ["'mlp3x_gelu'", "known: mlp2x_gelu, linear"]),
    "no layer": ({"mm_vision_select_layer": None}, ["mm_vision_select_layer is None"]),
    "another width": ({"mm_hidden_size": 1024}, ["mm_hidden_size is 1024", "48 wide"]),
    "resampler": ({"mm_resampler_type": "perceiver"}, ["resamplers"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused(hub, original, tmp_path, command, case):
    values, texts = REFUSED[case]
    edit_json(original / "config.json", **values)
    code, _, err = command(*forward(original, hub("clip"), tmp_path / "ckpt"))
    assert code == 2 and all(text in err for text in texts), err
    assert not list(tmp_path.glob("ckpt*"))


def test_weights_that_are_refused(hub, original, tmp_path, command):
    """The three lists; and a tower that is neither inside nor given."""
    whole = load_file(str(original / "model.safetensors"))
    words = forward(original, hub("clip"), tmp_path / "ckpt")

    def refuse(weights: dict, *texts: str, words=words) -> None:
        save_file(weights, str(original / "model.safetensors"))
        code, _, err = command(*words)
        assert code == 2 and all(text in err for text in texts), err
        assert not list(tmp_path.glob("ckpt*"))

    refuse(whole | {"model.image_newline": torch.ones(64)}, "unknown (1): model.image_newline")
    extra = {"model.layers.4.mlp.up_proj.weight": torch.ones(176, 64)}
    refuse(whole | extra, "left over (1): model.layers.4.mlp.up_proj.weight")
    absent = {name: tensor for name, tensor in whole.items() if name != "model.mm_projector.2.bias"}
    refuse(absent, "missing (1): multi_modal_projector.linear_2.bias")
    one = TOWER + "vision_model.encoder.layers.3.mlp.fc1.bias"
    refuse({name: tensor for name, tensor in whole.items() if name != one}, "missing (1)", "layers.3.mlp.fc1.bias")
    alone = {name: tensor for name, tensor in whole.items() if "vision_tower" not in name}
    none = forward(original, "none", tmp_path / "ckpt")
    refuse(alone, "'openai/clip-vit-large-patch14-336'", "SOURCE_CLIP_CKPT_PATH", words=none)
    projector = ["--mm-projector", original / "config.json"]
    refuse(whole, "its own projector", words=[*words, *projector])
    torch.save({}, original / "mm_projector.bin")
    (original / "model.safetensors").unlink()
    code, _, err = command(*words)
    assert code == 2 and "a projector without an LLM" in err and "PROJECTOR_PATH" in err


def test_words_of_the_other_direction(hub, original, tmp_path, command):
    for words in (["--layout", "original"], ["--vision-tower-name", "x"]):
        code, _, err = command(*forward(original, hub("clip"), tmp_path / "ckpt", *words))
        assert code == 2 and words[0] in err and not (tmp_path / "ckpt").exists()
    code, _, err = command(*forward(original, hub("clip"), tmp_path / "ckpt"))
    assert code == 0, err
    back = forward(tmp_path / "ckpt", "none", tmp_path / "back", "--mg2hf")
    code, _, err = command(*back, "--add-tokens", "<a>")
    assert code == 2 and "--add-tokens" in err
    code, _, err = command(*back, "--vision-tower-name", "x")
    assert code == 2 and "the hub's holds the tower itself" in err
    code, _, err = command(*back, "--hf-checkpoint", hub("mistral"), "--layout", "original")
    assert code == 2 and "is not the model" in err and not (tmp_path / "back").exists()
    code, out, err = command(*back, "--hf-checkpoint", original, "--layout", "original")
    assert code == 0 and "unfreeze_mm_vision_tower" in out, err


def test_next_in_the_original_layout(hub, tmp_path):
    """LLaVA-NeXT (v1.6): image_newline and the grids are there in both layouts, every tensor byte-equal."""
    source, clip = tmp_path / "llava-v1.6", hub("clip")
    before = make_original(source, hub("mistral"), clip, "mistral", pickled=False)
    before["model.image_newline"] = torch.randn(64, generator=torch.Generator().manual_seed(5))
    save_file(before, str(source / "model.safetensors"), metadata={"format": "pt"})
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    grids = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": pinpoints}
    edit_json(source / "config.json", **grids)
    report = to_megatron(source, clip, tmp_path / "ckpt")
    assert any("IMAGE_ASPECT_RATIO=anyres" in note for note in report.notes)
    geometry = read_geometry_of(tmp_path / "ckpt/llava")
    assert geometry.model_type == "llava_next" and geometry.any_resolution.candidates == ((28, 56), (56, 28), (56, 56))

    export(tmp_path / "ckpt", tmp_path / "back", layout="original")
    assert_same(before, tensors_of(tmp_path / "back"))
    assert (source / "config.json").read_bytes() == (tmp_path / "back/config.json").read_bytes()

    export(tmp_path / "ckpt", tmp_path / "hub")
    assert same_bytes(tensors_of(tmp_path / "hub")["image_newline"], before["model.image_newline"])
    model, processor = load(tmp_path / "hub")
    assert (
        type(model).__name__ == "LlavaNextForConditionalGeneration" and type(processor).__name__ == "LlavaNextProcessor"
    )
    assert processor.image_processor.image_grid_pinpoints == model.config.image_grid_pinpoints == pinpoints

    to_megatron(tmp_path / "hub", None, tmp_path / "ckpt2")
    export(tmp_path / "ckpt2", tmp_path / "derived", layout="original", tower_name="openai/clip-vit-large-patch14-336")
    values = json.loads((tmp_path / "derived/config.json").read_text())
    assert {name: values[name] for name in grids} == grids
    derived = tensors_of(tmp_path / "derived")
    assert derived.keys() == before.keys() and same_bytes(derived["model.image_newline"], before["model.image_newline"])


def make_original_onevision(folder: Path, llm: Path, siglip: Path, **values: object) -> dict[str, torch.Tensor]:
    """lmms-lab's folder: SigLIP inside without its last layer and its pooling head, image_newline, larger grids."""
    before = make_original(folder, llm, siglip, "qwen2", pickled=False)
    last = f".layers.{json.loads((siglip / 'config.json').read_text())['num_hidden_layers'] - 1}."
    before = {name: tensor for name, tensor in before.items() if not ("vision_tower" in name and last in name)}
    before = {name: tensor for name, tensor in before.items() if ".vision_model.head." not in name}
    before["model.image_newline"] = torch.randn(64, generator=torch.Generator().manual_seed(5))
    save_file(before, str(folder / "model.safetensors"), metadata={"format": "pt"})
    grids = [[30 * rows, 30 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    values = {"image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": grids} | values
    values |= {"mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "bilinear", "vision_config": None}
    values |= {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "mm_vision_tower": "a/siglip"}
    edit_json(folder / "config.json", **values)
    return before


def test_onevision_in_the_original_layout(hub, tmp_path):
    """LLaVA-OneVision: the tower ends with the layer that is seen, the number of tiles is the folder's own, and every
    tensor is byte-equal in both layouts."""
    from transformers import LlavaOnevisionForConditionalGeneration, SiglipVisionModel

    siglip = make_tiny_siglip(tmp_path / "siglip")
    before = make_original_onevision(tmp_path / "onevision", hub("qwen2"), siglip)
    report = to_megatron(tmp_path / "onevision", siglip, tmp_path / "ckpt")
    assert any("IMAGE_ASPECT_RATIO=anyres" in note for note in report.notes)
    geometry = read_geometry_of(tmp_path / "ckpt/llava")
    assert (geometry.model_type, geometry.any_resolution.most_tiles) == ("llava_onevision", 4)
    assert len(geometry.any_resolution.candidates) == 9 and geometry.video_token_id == 321
    assert geometry.tower.running_layers == geometry.tower.layers == 3 and not geometry.tower.pooling_head

    report = export(tmp_path / "ckpt", tmp_path / "back", layout="original")
    assert not any("unfreeze_mm_vision_tower" in note for note in report.notes)
    assert_same(before, tensors_of(tmp_path / "back"))
    assert (tmp_path / "onevision/config.json").read_bytes() == (tmp_path / "back/config.json").read_bytes()

    export(tmp_path / "ckpt", tmp_path / "hub")
    # no AutoProcessor: that of OneVision needs torchvision
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "hub").eval()
    processor = json.loads((tmp_path / "hub/processor_config.json").read_text())
    assert model.config.vision_aspect_ratio == processor["vision_aspect_ratio"] == "anyres_max_4"
    pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = model.model.vision_tower(pixels, output_hidden_states=True)
        whole = SiglipVisionModel.from_pretrained(siglip).eval()(pixels, output_hidden_states=True)
    seen = ours.hidden_states[model.config.vision_feature_layer]
    torch.testing.assert_close(seen, whole.hidden_states[-2], rtol=0, atol=1e-6)

    to_megatron(tmp_path / "hub", None, tmp_path / "ckpt2")
    export(tmp_path / "ckpt2", tmp_path / "derived", layout="original", tower_name="a/siglip")
    values = json.loads((tmp_path / "derived/config.json").read_text())
    wanted = {"image_aspect_ratio": "anyres_max_4", "mm_vision_select_layer": -2, "mm_newline_position": "one_token"}
    assert {name: values[name] for name in wanted} == wanted
    edit_json(tmp_path / "derived/config.json", mm_newline_position="grid")
    report = to_megatron(tmp_path / "derived", siglip, tmp_path / "ckpt3")
    assert any(
        "mm_newline_position is 'grid': here a video ends with one image_newline" in note for note in report.notes
    )
    assert read_geometry_of(tmp_path / "ckpt3/llava") == read_geometry_of(tmp_path / "ckpt2/llava")
    export(tmp_path / "ckpt3", tmp_path / "hub3")
    assert_same(tensors_of(tmp_path / "hub"), tensors_of(tmp_path / "hub3"))


def test_grids_of_onevision_as_its_scripts_name_them(hub, tmp_path):
    siglip = make_tiny_siglip(tmp_path / "siglip")
    make_original_onevision(tmp_path / "source", hub("qwen2"), siglip, image_grid_pinpoints="(1x1),...,(6x6)")
    to_megatron(tmp_path / "source", siglip, tmp_path / "ckpt")
    candidates = read_geometry_of(tmp_path / "ckpt/llava").any_resolution.candidates
    assert len(candidates) == 36 and candidates[0] == (30, 30) and candidates[-1] == (180, 180)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_aspect_ratio": "anyres_max"}, "is 'anyres_max'; known: anyres, anyres_max_9"),
        (
            {"image_aspect_ratio": "anyres_max_9", "mm_spatial_pool_mode": "average"},
            "mm_spatial_pool_mode is 'average'; known: bilinear",
        ),
        (
            {"image_aspect_ratio": "pad"},
            "image_aspect_ratio of a model with mm_patch_merge_type spatial_unpad is 'pad'",
        ),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints is .*; wanted a list"),
        (
            {"image_grid_pinpoints": [[28, 60]]},
            r"image_grid_pinpoints holds \[28, 60\]; .* multiples of the tower's 28",
        ),
    ],
)
def test_grids_that_are_not_built_are_refused(hub, tmp_path, values, said):
    source, clip = tmp_path / "source", hub("clip")
    make_original(source, hub("mistral"), clip, "mistral")
    grids = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    edit_json(source / "config.json", **grids | {"image_grid_pinpoints": [[28, 56]]} | values)
    with pytest.raises(UserError, match=said):
        to_megatron(source, clip, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
