"""Every number about the model, read once from the Hugging Face config in a checkpoint's `llava/` folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import UserError

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
VISION_TOWERS = ("clip_vision_model",)
PROJECTOR_TYPES = ("mlp2x_gelu", "linear")


@dataclass(frozen=True)
class LanguageGeometry:
    """The decoder.  Widths in elements; `rope_base` is the period's base, `norm_epsilon` RMSNorm's."""

    model_type: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    rope_base: float
    qkv_bias: bool
    tied_embeddings: bool
    sliding_window: int | None


@dataclass(frozen=True)
class TowerGeometry:
    """The vision tower.  `layers` counts those that run: up to the selected hidden layer."""

    model_type: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    side_px: int
    patch_px: int
    norm_epsilon: float
    activation: str

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture: its patches; the class token is dropped."""
        return (self.side_px // self.patch_px) ** 2


@dataclass(frozen=True)
class LlavaGeometry:
    """The whole model, plus the id of the `<image>` token."""

    language: LanguageGeometry
    tower: TowerGeometry
    projector_type: str
    image_token_id: int


def _require(config: dict[str, Any], key: str, where: Path) -> Any:
    if config.get(key) is None:
        raise UserError(f"{where}: no `{key}`; take the config.json that Hugging Face ships with the model")
    return config[key]


def _refuse(where: Path, key: str, got: object, wanted: object) -> None:
    raise UserError(f"{where}: {key} is {got!r}, this toolkit knows {wanted}; choose a model of that kind")


def _rope_base(config: dict[str, Any], where: Path) -> float:
    # transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        _refuse(where, "text_config.rope_parameters.rope_type", kind, "default (no rope scaling)")
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _language(config: dict[str, Any], where: Path) -> LanguageGeometry:
    model_type = config.get("model_type")
    if model_type not in LANGUAGE_MODELS:
        _refuse(where, "text_config.model_type", model_type, ", ".join(LANGUAGE_MODELS))
    if config.get("hidden_act", "silu") != "silu":
        _refuse(where, "text_config.hidden_act", config["hidden_act"], "silu")
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag):
            _refuse(where, f"text_config.{flag}", True, "false")
    hidden, heads = _require(config, "hidden_size", where), _require(config, "num_attention_heads", where)
    window = config.get("sliding_window")
    if model_type == "qwen2" and not config.get("use_sliding_window"):
        window = None
    return LanguageGeometry(
        model_type=model_type,
        layers=_require(config, "num_hidden_layers", where),
        hidden=hidden,
        ffn_hidden=_require(config, "intermediate_size", where),
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocabulary=_require(config, "vocab_size", where),
        max_positions=_require(config, "max_position_embeddings", where),
        norm_epsilon=_require(config, "rms_norm_eps", where),
        rope_base=_rope_base(config, where),
        qkv_bias=model_type == "qwen2",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=window,
    )


def _tower(config: dict[str, Any], feature_layer: int, where: Path) -> TowerGeometry:
    model_type = config.get("model_type")
    if model_type not in VISION_TOWERS:
        _refuse(where, "vision_config.model_type", model_type, ", ".join(VISION_TOWERS))
    all_layers = _require(config, "num_hidden_layers", where)
    running = all_layers + 1 + feature_layer if feature_layer < 0 else feature_layer
    if not 0 < running <= all_layers:
        _refuse(where, "vision_feature_layer", feature_layer, f"a layer of the tower's {all_layers}")
    side_px, patch_px = _require(config, "image_size", where), _require(config, "patch_size", where)
    if side_px % patch_px:
        _refuse(where, "vision_config.image_size", side_px, f"a multiple of patch_size {patch_px}")
    return TowerGeometry(
        model_type=model_type,
        layers=running,
        hidden=_require(config, "hidden_size", where),
        ffn_hidden=_require(config, "intermediate_size", where),
        heads=_require(config, "num_attention_heads", where),
        side_px=side_px,
        patch_px=patch_px,
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        activation=config.get("hidden_act", "quick_gelu"),
    )


def read_geometry(llava_folder: Path) -> LlavaGeometry:
    """Geometry from `llava_folder/config.json` (a LlavaConfig as transformers writes it).

    Raises:
        UserError: the file is missing, a number is missing, or the model is of a kind that is not known; named.
    """
    where = Path(llava_folder) / "config.json"
    if not where.is_file():
        raise UserError(
            f"{where}: no such file; give a checkpoint that hf2mcore_convertor_llava.sh wrote (it has a llava/ folder)"
        )
    config = json.loads(where.read_text())
    if config.get("model_type") != "llava":
        _refuse(where, "model_type", config.get("model_type"), "llava")
    if config.get("vision_feature_select_strategy", "default") != "default":
        _refuse(where, "vision_feature_select_strategy", config["vision_feature_select_strategy"], "default")
    if config.get("projector_hidden_act", "gelu") not in ("gelu", "linear"):
        _refuse(where, "projector_hidden_act", config["projector_hidden_act"], "gelu")
    projector_type = config.get("mm_projector_type", "mlp2x_gelu")
    if projector_type not in PROJECTOR_TYPES:
        _refuse(where, "mm_projector_type", projector_type, ", ".join(PROJECTOR_TYPES))
    # transformers leaves numbers that equal its class's defaults in, since save_pretrained writes full sub-configs
    text = {**_require(config, "text_config", where)}
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return LlavaGeometry(
        language=_language(text, where),
        tower=_tower(_require(config, "vision_config", where), config.get("vision_feature_layer", -2), where),
        projector_type=projector_type,
        image_token_id=_require(config, "image_token_index" if "image_token_index" in config else "image_token_id", where),
    )


def megatron_words(language: LanguageGeometry, decoder_seq_len: int) -> list[str]:
    """The decoder's numbers as words for Megatron's parser.

    Raises:
        UserError: `decoder_seq_len` (tokens) exceeds the positions or the attention window the model was trained with.
    """
    if decoder_seq_len > language.max_positions:
        raise UserError(
            f"DECODER_SEQ_LEN is {decoder_seq_len}, the language model has {language.max_positions} positions; "
            f"choose at most {language.max_positions}"
        )
    if language.sliding_window is not None and decoder_seq_len > language.sliding_window:
        raise UserError(
            f"DECODER_SEQ_LEN is {decoder_seq_len}, the language model attends within a sliding window of "
            f"{language.sliding_window} tokens, which is not built here; choose at most {language.sliding_window}"
        )
    words = [
        *("--num-layers", language.layers, "--hidden-size", language.hidden),
        *("--ffn-hidden-size", language.ffn_hidden, "--num-attention-heads", language.heads),
        *("--kv-channels", language.head_dim, "--max-position-embeddings", language.max_positions),
        *("--normalization", "RMSNorm", "--norm-epsilon", language.norm_epsilon),
        *("--position-embedding-type", "rope", "--rotary-base", int(language.rope_base)),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", language.vocabulary),
        *("--swiglu", "--disable-bias-linear"),
    ]
    if language.groups != language.heads:
        words += ["--group-query-attention", "--num-query-groups", language.groups]
    if language.qkv_bias:
        words.append("--add-qkv-bias")
    if not language.tied_embeddings:
        words.append("--untie-embeddings-and-output-weights")
    return [str(word) for word in words]
