"""Numbers of models that published rows are about, as their config.json files say."""

from typing import Any

from megatron_patch.geometry import LlavaGeometry, read_geometry
from megatron_patch.llava_kinds import LLAVA_KINDS

# layers, hidden, ffn, heads, groups, vocabulary
LANGUAGE_MODELS = {
    "llama-7b": (32, 4096, 11008, 32, 32, 32000),  # also Vicuna-7B
    "llama-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama3-8b": (32, 4096, 14336, 32, 8, 128256),
    "llama3-70b": (80, 8192, 28672, 64, 8, 128256),
    # 126 layers; embedding and head count as one each when its stages are cut, so that 128 are
    "llama3-405b": (128, 16384, 53248, 128, 8, 128256),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-32b": (64, 5120, 27648, 40, 8, 152064),
    "internlm2.5-7b": (32, 4096, 14336, 32, 8, 92553),
}


def llava(language: str = "llama-7b", side_px: int = 336, kind: str = "llava") -> LlavaGeometry:
    """One of these with CLIP-L/14 at that side, as LLaVA-1.5 and NeXT have it; kind: of LLAVA_KINDS.

    KeyError: not one of them.
    """
    layers, hidden, ffn, heads, groups, vocabulary = LANGUAGE_MODELS[language]
    text: dict[str, Any] = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    }
    vision = {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "image_size": side_px,
        "patch_size": 14,
    }
    own = {"model_type": kind, "image_grid_pinpoints": LLAVA_KINDS[kind].pinpoints(side_px)}
    return read_geometry({"text_config": text, "vision_config": vision, "image_token_index": vocabulary} | own)
