"""Tiny LLaVAs in liuhaotian's layout, put together from the folders of their parts as his code saves them."""

import io
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
CLASSES = {
    "llama": ("llava", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}


def projector_weights(
    hidden: int = 64, tower: int = 48, linear: bool = False, seed: int = 9
) -> dict[str, torch.Tensor]:
    """What stage 1 saves as mm_projector.bin."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.mm_projector.0.": (hidden, tower), "model.mm_projector.2.": (hidden, hidden)}
    if linear:
        shapes = {"model.mm_projector.": (hidden, tower)}
    return {
        name + kind: torch.randn(shape if kind == "weight" else shape[:1], generator=generator)
        for name, shape in shapes.items()
        for kind in ("weight", "bias")
    }


def make_original(
    folder: Path, llm: Path, clip: Path, family: str, inside: bool = True, linear: bool = False, pickled: bool = True
) -> dict[str, torch.Tensor]:
    """Write the folder; returns its tensors.  The LLM's files are taken as they are, weights and config rewritten."""
    folder.mkdir()
    for path in llm.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    weights = load_file(str(llm / "model.safetensors")) | projector_weights(linear=linear)
    if inside:
        tower = load_file(str(clip / "model.safetensors"))
        weights |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    if pickled:
        names = sorted(weights)
        index = {}
        for number in (1, 2):
            file = f"pytorch_model-{number:05}-of-00002.bin"
            part = names[: len(names) // 2] if number == 1 else names[len(names) // 2 :]
            torch.save({name: weights[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_config(folder, llm, family, linear)
    return weights


def write_config(folder: Path, llm: Path, family: str, linear: bool = False) -> None:
    """config.json with the fields of llava-v1.5-7b, rope in the spelling of that time."""
    text = json.loads((llm / "config.json").read_text())
    rope = text.pop("rope_parameters")
    for name in ("dtype", "transformers_version", "architectures", "model_type"):
        text.pop(name)
    model_type, name = CLASSES[family]
    values = {"_name_or_path": "llava-v1.5-7b", "architectures": [name]} | text
    values |= {
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "image_aspect_ratio": "pad",
        "max_length": 4096,
        "mm_hidden_size": 48,
        "mm_projector_type": "linear" if linear else "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": model_type,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2))  # without the last newline, to be kept as it is


def use_sentencepiece(folder: Path, sentences: list[str]) -> bytes:
    """Replace the tokenizer by tokenizer.model and the two files beside it that Llama-2 and llava-v1.5-7b have."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    plain = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    values = {f"{name}_token": plain | {"content": text} for name, text in SPECIAL.items()}
    values |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 2048}
    values |= {"pad_token": None, "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2))
    values = {f"{name}_token": text for name, text in SPECIAL.items()} | {"pad_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(values, indent=2))
    return model.getvalue()
