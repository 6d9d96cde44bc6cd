"""Tiny random Hugging Face models with the real structure, written as ordinary hub folders.

Every size divides by two where tensor or pipeline parallelism cuts it: 4 heads, 2 groups, even widths, even layers.
Weights are drawn wide (std 1/sqrt(row length)) so that logits are far from flat; same arguments, same bytes.
"""

import json
import math
from pathlib import Path

import torch

from megatron_patch.llava_kinds import LLAVA_KINDS

FAMILIES = ("llama", "mistral", "qwen2")  # one of each kind that most tests go through
# The others, each with what sets it apart: rope scaling, GQA, 9 heads in 3 groups, a window of 48 tokens, an untied
# head beside QKV biases, norms of queries and keys with heads wider than hidden / heads.
MORE_FAMILIES = ("llama3", "tinyllama", "smollm2", "mistral_window", "qwen2_untied", "qwen3")
TOWERS = ("clip", "clip_b32", "siglip", "siglip_last")
IMAGE_SIDE_PX = 28
PATCH_PX = 7
IMAGE_TOKENS = (IMAGE_SIDE_PX // PATCH_PX) ** 2
TOKENIZER_SIZE = 320
LLM_VOCAB = {"llama": 320, "mistral": 320, "qwen2": 352}  # qwen2: rows the tokenizer does not use, as in the real one
LLAVA_VOCAB = 336  # hub LLaVAs hold more rows than their tokenizer has tokens

_CORPUS = [
    "The digit is three. The digit is seven. The digit is one. What digit is this? It is a nine.",
    "What colour is the ink? The ink is red. What colour is the background? The background is blue.",
    "USER: What is in the picture? ASSISTANT: A green five on a yellow ground. zero two four six eight",
    "a small picture of a number, painted in white, black, purple and orange; please answer the question.",
]


def make_tiny_tokenizer(folder: str | Path, family: str = "llama", image_token: bool = False):
    """Byte-level BPE of 320 tokens (321 with `<image>`); llama and mistral prepend `<s>`, qwen2 prepends nothing.

    llama and mistral have no pad token, like the real ones; qwen2 pads with `<|endoftext|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    chatml = family.startswith("qwen")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chatml else ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=TOKENIZER_SIZE,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if chatml:
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    assert len(fast) == TOKENIZER_SIZE, len(fast)
    if image_token:
        fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.save_pretrained(str(folder))
    return fast


def text_config(family: str, vocab_size: int | None = None, tied: bool | None = None):
    """Configuration of a 4-layer LLM of width 64: Llama (MHA), Mistral (GQA), Qwen2 (GQA, QKV bias, tied), and more."""
    import transformers

    sizes = {
        "vocab_size": vocab_size or LLM_VOCAB["qwen2" if family.startswith("qwen") else "llama"],
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    if family == "llama":
        return transformers.LlamaConfig(
            **sizes,
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=bool(tied),
        )
    if family == "mistral":
        return transformers.MistralConfig(
            **sizes,
            num_key_value_heads=2,
            rope_theta=1e6,
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=bool(tied),
        )
    if family == "qwen2":
        return transformers.Qwen2Config(
            **sizes,
            num_key_value_heads=2,
            rope_theta=1e6,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True if tied is None else tied,
        )
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    if family == "mistral_window":
        return transformers.MistralConfig(**sizes, **tokens, num_key_value_heads=2, sliding_window=48)
    if family == "tinyllama":
        return transformers.LlamaConfig(**sizes, **tokens, num_key_value_heads=2)
    if family == "smollm2":
        sizes |= {"hidden_size": 72, "intermediate_size": 192, "num_attention_heads": 9}
        return transformers.LlamaConfig(
            **sizes, **tokens, num_key_value_heads=3, rope_theta=1e5, tie_word_embeddings=True
        )
    if family == "llama3":
        sizes["max_position_embeddings"] = 16384
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        return transformers.LlamaConfig(**sizes, **tokens, num_key_value_heads=2, rope_parameters=scaling)
    tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    if family == "qwen2_untied":
        return transformers.Qwen2Config(
            **sizes, **tokens, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=False
        )
    if family == "qwen3":
        return transformers.Qwen3Config(
            **sizes, **tokens, num_key_value_heads=2, head_dim=24, rope_theta=1e6, tie_word_embeddings=bool(tied)
        )
    raise ValueError(f"family {family!r}: wanted one of {FAMILIES + MORE_FAMILIES}")


def vision_config(layers: int = 4, tower: str = "clip"):
    """Tower of width 48.

    clip: 28 px, patch 7 (16 image tokens and a class token), quick_gelu, as OpenAI's CLIP.
    clip_b32: patch 14 (4 image tokens), three heads, gelu, as LAION's CLIP.
    siglip: 30 px, patch 7 (16 image tokens, two pixels left over as in 384 px of patch 14), pooling head.
    siglip_last: the same with 28 px and without pooling head.
    """
    import transformers

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE_PX,
        "patch_size": PATCH_PX,
    }
    if tower == "clip":
        return transformers.CLIPVisionConfig(**sizes, projection_dim=32)
    if tower == "clip_b32":
        sizes |= {"patch_size": 14, "num_attention_heads": 6}
        return transformers.CLIPVisionConfig(**sizes, projection_dim=32, hidden_act="gelu")
    if tower == "siglip":
        return transformers.SiglipVisionConfig(**sizes | {"image_size": 30})
    if tower == "siglip_last":
        return transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
    raise ValueError(f"tower {tower!r}: wanted one of {TOWERS}")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Redraw every parameter: matrices and embeddings std 1/sqrt(row length), norms around one, biases std 0.1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                noise /= math.sqrt(parameter[0].numel())
            elif name.endswith("bias") or "class_embedding" in name:
                noise *= 0.1
            else:
                noise = 1.0 + 0.1 * noise
            parameter.copy_(noise)


def _rename_and_save(model: torch.nn.Module, folder: Path, rename) -> None:
    """save_pretrained, then the tensor names of hub files instead of those transformers 5 writes."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    model.save_pretrained(str(folder))
    path = folder / "model.safetensors"
    with safe_open(str(path), "pt") as source:
        tensors = {rename(name): source.get_tensor(name).clone() for name in source.keys()}  # noqa: SIM118
    save_file(tensors, str(path), metadata={"format": "pt"})


def make_tiny_llm(
    folder: str | Path,
    family: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    tied: bool | None = None,
) -> Path:
    """A causal LM with its tokenizer as a hub folder: about 0.2M parameters."""
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    model = AutoModelForCausalLM.from_config(text_config(family, vocab_size, tied))
    randomize(model, seed)
    model.to(dtype).save_pretrained(str(folder))
    make_tiny_tokenizer(folder, family)
    return folder


def _save_image_processor(folder: Path, tower: str = "clip") -> None:
    side = IMAGE_SIDE_PX
    if tower.startswith("siglip"):
        side = vision_config(tower=tower).image_size
        values = {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": 3 if tower == "siglip" else 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")
        return
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def make_tiny_clip(
    folder: str | Path,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    layers: int = 4,
    full_model: bool = False,
    hub_prefix: bool = True,
) -> Path:
    """A CLIP tower as a hub folder.

    Args:
        full_model: write a CLIPModel (with text tower and projections), as openai/clip-vit-large-patch14-336 is.
        hub_prefix: tensor names begin with `vision_model.`, as in hub files; transformers 5 itself writes none for a
            CLIPVisionModel.
    """
    import transformers

    folder = Path(folder)
    vision = vision_config(layers)
    if full_model:
        text = transformers.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=100,
            bos_token_id=98,
            eos_token_id=99,
        )
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
        )
    else:
        model = transformers.CLIPVisionModel(vision)
    randomize(model, seed)
    model.to(dtype)
    prefix = "vision_model." if hub_prefix and not full_model else ""
    _rename_and_save(model, folder, lambda name: prefix + name)
    _save_image_processor(folder)
    return folder


def make_tiny_siglip(
    folder: str | Path, seed: int = 1, dtype: torch.dtype = torch.float32, full_model: bool = False
) -> Path:
    """A SigLIP tower under hub names as a hub folder; full_model: a SiglipModel, as google/siglip-* are."""
    import transformers

    folder = Path(folder)
    vision = vision_config(tower="siglip")
    if full_model:
        text = transformers.SiglipTextConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=100,
            bos_token_id=98,
            eos_token_id=99,
        )
        config = transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
        model = transformers.SiglipModel(config)
    else:
        model = transformers.SiglipVisionModel(vision)
    randomize(model, seed)
    model.to(dtype)
    prefix = "" if full_model else "vision_model."
    _rename_and_save(model, folder, lambda name: name if name.startswith("vision_model.") else prefix + name)
    _save_image_processor(folder, "siglip")
    return folder


def make_tiny_llava(
    folder: str | Path,
    family: str = "llama",
    seed: int = 2,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    layers: int = 4,
    tower: str = "clip",
    kind: str = "llava",
) -> Path:
    """A whole LLaVA in the hub layout with tokenizer and processor: `LlavaForConditionalGeneration`, `AutoProcessor`.

    kind: of llava_kinds.LLAVA_KINDS; with its own grids of tiles, and at most 2 tiles' features in place of 9.
    The text vocabulary has 336 rows (352 for qwen); `<image>` is token 320.  siglip_last takes the last layer's
    features, the others the last but one's; SigLIP keeps all tokens.
    """
    import transformers

    folder = Path(folder)
    vocab = LLM_VOCAB["qwen2"] if family.startswith("qwen") else LLAVA_VOCAB
    text = text_config(family, vocab, tied)
    vision = vision_config(layers, tower)
    strategy = "default" if tower.startswith("clip") else "full"
    row, own = LLAVA_KINDS[kind], {"image_seq_length": (vision.image_size // vision.patch_size) ** 2}
    if row.any_resolution:
        own = {"image_grid_pinpoints": row.pinpoints(vision.image_size)}
    if row.video_token:
        own |= {"vision_aspect_ratio": "anyres_max_2", "video_token_index": TOKENIZER_SIZE + 1}
    config = transformers.AutoConfig.for_model(
        kind,
        vision_config=vision,
        text_config=text,
        image_token_index=TOKENIZER_SIZE,
        **own,
        vision_feature_layer=-1 if tower == "siglip_last" else -2,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = getattr(transformers, row.architecture)(config)
    randomize(model, seed)

    def hub_name(name: str) -> str:
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)

    _rename_and_save(model.to(dtype), folder, hub_name)
    tokenizer = make_tiny_tokenizer(folder, family, image_token=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
        tokenizer.save_pretrained(str(folder))
    if row.video_token:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
        tokenizer.save_pretrained(str(folder))
    _save_image_processor(folder, tower)
    if row.any_resolution:
        images = json.loads((folder / "preprocessor_config.json").read_text())
        images |= {"image_processor_type": row.image_processor, "image_grid_pinpoints": config.image_grid_pinpoints}
        (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    processor = {
        "processor_class": row.processor,
        "image_token": "<image>",
        "vision_feature_select_strategy": strategy,
    }
    if row.video_token:
        patches = vision.image_size // vision.patch_size
        processor |= {"num_image_tokens": patches**2, "vision_aspect_ratio": "anyres_max_2"}
    else:
        additional = 1 if strategy == "default" else 0
        processor |= {"patch_size": vision.patch_size, "num_additional_image_tokens": additional}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder
