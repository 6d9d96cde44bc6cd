"""Every number about the model, read once from a LLaVA config as transformers writes it, checked and frozen.

Both the model and the conversion read these; it imports nothing but the standard library.  What families and kinds
of towers differ in stands in language_models.py and vision_towers.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import UserError
from megatron_patch.language_models import LANGUAGE_MODELS, LanguageModel
from megatron_patch.llava_kinds import LLAVA_KINDS, LlavaKind, most_tiles
from megatron_patch.tile_plan import AnyResolution, read_candidates
from megatron_patch.vision_towers import VISION_TOWERS, VisionTower

IGNORE_LABEL = -100  # torch's, Hugging Face's and LLaVA's own mark of a position that is not trained
VOCABULARY_STEP = 128  # Megatron pads the vocabulary to a multiple of this times TP


PROJECTOR_TYPES = ("mlp2x_gelu", "linear")
SELECT_STRATEGIES = ("default", "full")
# The rope scaling "llama3" that megatron-core's RotaryEmbedding._apply_scaling has built in; only its factor is free.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class LanguageGeometry:
    """The decoder.  Widths in elements; `vocabulary`: rows of the embedding as stored, without parallel padding."""

    model_type: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    groups: int  # of queries, each with one key and value head
    head_dim: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    rope_base: float
    qkv_bias: bool
    tied_embeddings: bool
    sliding_window: int | None
    qk_norm: bool = False
    rope_factor: float | None = None  # of the scaling "llama3"; None: no scaling

    @property
    def family(self) -> LanguageModel:
        """The row of this model_type."""
        return LANGUAGE_MODELS[self.model_type]

    @property
    def parameters(self) -> int:
        """Number of parameters: embedding (and head unless tied), attention, gated MLP, norms."""
        query, key = self.heads * self.head_dim, self.groups * self.head_dim
        attention = 2 * self.hidden * query + 2 * self.hidden * key + (query + 2 * key if self.qkv_bias else 0)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + 3 * self.hidden * self.ffn_hidden + norms
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)

    def too_long(self, length: int) -> str | None:
        """Why a sequence of so many tokens cannot be trained or asked, as what it must be; None: it can."""
        if length > self.max_positions:
            return f"must be at most {self.max_positions}: so many positions the language model has"
        if self.sliding_window is not None and length > self.sliding_window:
            return (
                f"must be at most {self.sliding_window}: the language model attends within a sliding window of so many "
                "tokens, which is not built here"
            )
        return None


@dataclass(frozen=True)
class TowerGeometry:
    """The vision tower.  `running_layers`: those below the selected hidden layer; the rest is only carried along."""

    model_type: str
    layers: int
    running_layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    side_px: int
    patch_px: int
    norm_epsilon: float
    activation: str
    pooling_head: bool  # behind the last layer: never run, carried along
    first_token_dropped: bool  # vision_feature_select_strategy: "default" drops it, "full" keeps all

    @property
    def kind(self) -> VisionTower:
        """The row of this model_type."""
        return VISION_TOWERS[self.model_type]

    @property
    def positions(self) -> int:
        """Rows of the position embedding: whole patches (384 px hold 27 x 27 of 14 px) and the class token."""
        return (self.side_px // self.patch_px) ** 2 + self.kind.class_token

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in the text."""
        return self.positions - self.first_token_dropped

    @property
    def parameters(self) -> int:
        """Number of parameters that run: embeddings, and the layers below the selected hidden one."""
        width, ffn = self.hidden, self.ffn_hidden
        layer = 4 * (width * width + width) + 2 * width * ffn + ffn + width + 4 * width
        patches = 3 * self.patch_px**2 * width + (width if self.kind.patch_bias else 0)
        around = (width if self.kind.class_token else 0) + (2 * width if self.kind.pre_norm else 0)
        return self.running_layers * layer + patches + self.positions * width + around


@dataclass(frozen=True)
class LlavaGeometry:
    """The whole model, plus the id of the `<image>` token."""

    language: LanguageGeometry
    tower: TowerGeometry
    projector_type: str
    image_token_id: int
    model_type: str = "llava"
    any_resolution: AnyResolution | None = None  # None: an image is one tile, as in LLaVA-1.5
    video_token_id: int | None = None  # None: the model knows no videos

    @property
    def kind(self) -> LlavaKind:
        """The row of this model_type."""
        return LLAVA_KINDS[self.model_type]

    @property
    def newline_parameters(self) -> int:
        """Number of parameters of image_newline; 0 where there is none."""
        return self.language.hidden if self.kind.any_resolution else 0

    @property
    def projector_parameters(self) -> int:
        """Number of parameters of the projector: one matrix, or two with GELU between, with biases."""
        width = self.language.hidden
        first = self.tower.hidden * width + width
        return first if self.projector_type == "linear" else first + width * width + width

    def uncut(
        self, tensor: int, pipeline: int, first_stage_layers: int | None = None, virtual_stages: int = 1
    ) -> Iterator[tuple[str, str]]:
        """Why the model cannot be cut so: the launchers' argument, and what is wrong with its value.

        Args:
            first_stage_layers: decoder layers of the first stage; None: as many as of the others.
            virtual_stages: virtual pipeline stages on each pipeline rank.
        """
        language, tower = self.language, self.tower
        cuts = [
            ("num_attention_heads of the LLM", language.heads),
            ("num_key_value_heads of the LLM", language.groups),
            ("intermediate_size of the LLM", language.ffn_hidden),
            ("hidden_size of the LLM", language.hidden),
            ("num_attention_heads of the vision tower", tower.heads),
            ("intermediate_size of the vision tower", tower.ffn_hidden),
        ]
        small = [name for degree, name in ((tensor, "TP"), (pipeline, "PP")) if degree < 1]
        if small:
            yield small[0], "is no degree; wanted a whole number of at least 1"
            return
        wrong = [f"{what} is {count}" for what, count in cuts if count % tensor]
        if wrong:
            yield "TP", f"cannot cut this model: {', '.join(wrong)}; pass a TP that divides them"
        if first_stage_layers is not None:
            rest = language.layers - first_stage_layers
            if pipeline < 2 or virtual_stages > 1 or rest < pipeline - 1 or rest % (pipeline - 1):
                yield (
                    "FIRST_STAGE_LAYERS",
                    f"leaves {rest} of {language.layers} layers for the other {pipeline - 1} stages; wanted a number "
                    "that "
                    "leaves them equal parts, PP above 1 and no virtual stages",
                )
        elif language.layers % (pipeline * virtual_stages):
            stages = f"x VIRTUAL_STAGES {virtual_stages} " if virtual_stages > 1 else ""
            yield "PP", f"{stages}does not divide the {language.layers} layers of the LLM; pass a PP that divides them"

    def check_parallel(
        self, tensor: int, pipeline: int, first_stage_layers: int | None = None, virtual_stages: int = 1
    ) -> None:
        """Refuse what uncut() finds, with its arguments.  Raises UserError: the config values that do not divide."""
        given = {"TP": tensor, "PP": pipeline, "FIRST_STAGE_LAYERS": first_stage_layers}
        found = list(self.uncut(tensor, pipeline, first_stage_layers, virtual_stages))
        if found:
            raise UserError("; ".join(f"{name} {given[name]} {text}" for name, text in found))


def check_known(what: str, got: object, known: Any) -> None:
    """Raise UserError, with the list of what is known, when `got` is not in it."""
    if got not in known:
        raise UserError(f"{what} is {got!r}; known: {', '.join(known)}; choose a model of that kind")


def running_layers(layers: int, feature_layer: object) -> int:
    """Tower layers needed for hidden_states[feature_layer] (entry 0 is the embedding): -2 of 24 layers needs 23."""
    if not isinstance(feature_layer, int) or not -layers - 1 <= feature_layer <= layers:
        raise UserError(
            f"vision_feature_layer is {feature_layer!r}; wanted one whole number from {-layers - 1} to {layers}"
        )
    return feature_layer if feature_layer >= 0 else layers + 1 + feature_layer


def _value(config: dict[str, Any], name: str, where: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"{where} lacks {name!r}; wanted a full config as transformers writes it")
    return config[name]


def _rope(config: dict[str, Any]) -> tuple[float, float | None]:
    """Base, and factor of the scaling "llama3" (None without scaling)."""
    # transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_known("text_config's rope_type", kind, ("default", "llama3"))
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "default":
        return base, None
    wrong = [
        f"{name} is {rope.get(name)}, not {value:g}" for name, value in LLAMA3_ROPE.items() if rope.get(name) != value
    ]
    if wrong:
        raise UserError(
            f"text_config's rope scaling llama3: {'; '.join(wrong)}; megatron-core knows Llama-3's own values only, "
            "choose a model with those"
        )
    return base, float(_value(rope, "factor", "text_config's rope scaling llama3"))


def _language(config: dict[str, Any]) -> LanguageGeometry:
    where, model_type = "text_config", config.get("model_type")
    check_known("model_type of the LLM", model_type, LANGUAGE_MODELS)
    check_known("hidden_act of the LLM", config.get("hidden_act", "silu"), ("silu",))
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag):
            raise UserError(f"text_config has {flag}=true, which is not built here; choose a model without")
    hidden, heads = _value(config, "hidden_size", where), _value(config, "num_attention_heads", where)
    rope_base, rope_factor = _rope(config)
    family, window = LANGUAGE_MODELS[model_type], config.get("sliding_window")
    if family.window_flag is not None and not config.get(family.window_flag):
        window = None
    return LanguageGeometry(
        model_type=model_type,
        layers=_value(config, "num_hidden_layers", where),
        hidden=hidden,
        ffn_hidden=_value(config, "intermediate_size", where),
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocabulary=_value(config, "vocab_size", where),
        max_positions=_value(config, "max_position_embeddings", where),
        norm_epsilon=_value(config, "rms_norm_eps", where),
        rope_base=rope_base,
        rope_factor=rope_factor,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=window,
    )


def _tower(config: dict[str, Any], feature_layer: object, strategy: str) -> TowerGeometry:
    where, model_type = "vision_config", config.get("model_type")
    check_known("model_type of the vision tower", model_type, VISION_TOWERS)
    kind, layers = VISION_TOWERS[model_type], _value(config, "num_hidden_layers", where)
    return TowerGeometry(
        model_type=model_type,
        layers=layers,
        running_layers=running_layers(layers, feature_layer),
        hidden=_value(config, "hidden_size", where),
        ffn_hidden=_value(config, "intermediate_size", where),
        heads=_value(config, "num_attention_heads", where),
        side_px=_value(config, "image_size", where),
        patch_px=_value(config, "patch_size", where),
        norm_epsilon=config.get("layer_norm_eps", kind.norm_epsilon),
        activation=config.get("hidden_act", kind.activation),
        pooling_head=kind.has_pooling_head(config),
        first_token_dropped=strategy == "default",
    )


def _any_resolution(config: dict[str, Any], kind: LlavaKind, tower: TowerGeometry) -> AnyResolution | None:
    if not kind.any_resolution:
        return None
    if not config.get("use_image_newline_parameter", True):
        raise UserError("use_image_newline_parameter is false; a model without image_newline is not built here")
    side, aspect = tower.side_px // tower.patch_px, config.get("vision_aspect_ratio", kind.aspect_ratio)
    if tower.image_tokens != side * side:
        raise UserError(
            f"the tower gives {tower.image_tokens} features for {side} x {side} patches, which no grid can be made of; "
            f"wanted vision_feature_select_strategy {tower.kind.select_strategy!r}"
        )
    most = most_tiles(aspect) if kind.aspect_ratio else None
    if kind.aspect_ratio and most is None:
        raise UserError(f"vision_aspect_ratio is {aspect!r}; wanted anyres_max_ and a number, as {kind.aspect_ratio}")
    try:
        candidates = read_candidates(config.get("image_grid_pinpoints"), tower.side_px)
    except ValueError as error:
        raise UserError(f"image_grid_pinpoints {error}") from None
    return AnyResolution(
        candidates,
        side_px=tower.side_px,
        patches=side,
        most_tiles=most,
        several_plain=kind.several_plain,
    )


def _video_token_id(config: dict[str, Any], kind: LlavaKind) -> int | None:
    """None also where a config of such a kind does not name it: then it is a model for images alone."""
    return config.get("video_token_index", config.get("video_token_id")) if kind.video_token else None


def read_geometry(config: dict[str, Any]) -> LlavaGeometry:
    """Geometry of a full LLaVA config.

    Raises:
        UserError: a number is missing, or the model is of a kind that is not known; named, with what is known.
    """
    model_type = config.get("model_type", "llava")
    check_known("model_type", model_type, LLAVA_KINDS)
    strategy = config.get("vision_feature_select_strategy", "default")
    check_known("vision_feature_select_strategy", strategy, SELECT_STRATEGIES)
    check_known("projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",))
    projector_type = config.get("mm_projector_type", "mlp2x_gelu")
    check_known("mm_projector_type", projector_type, PROJECTOR_TYPES)
    if not config.get("multimodal_projector_bias", True):
        raise UserError("multimodal_projector_bias is false; LLaVA-1.5's projector has biases")
    tower = _tower(_value(config, "vision_config", "config.json"), config.get("vision_feature_layer", -2), strategy)
    return LlavaGeometry(
        language=_language(_value(config, "text_config", "config.json")),
        tower=tower,
        model_type=model_type,
        any_resolution=_any_resolution(config, LLAVA_KINDS[model_type], tower),
        video_token_id=_video_token_id(config, LLAVA_KINDS[model_type]),
        projector_type=projector_type,
        image_token_id=_value(
            config, "image_token_index" if "image_token_index" in config else "image_token_id", "config.json"
        ),
    )


def read_geometry_of(llava_folder: Path) -> LlavaGeometry:
    """Geometry from `llava_folder/config.json`.

    Raises:
        UserError: the file is missing, or as in read_geometry().
    """
    where = Path(llava_folder) / "config.json"
    if not where.is_file():
        raise UserError(
            f"{where}: no such file; give a checkpoint that hf2mcore_convertor_llava.sh wrote (it has a llava/ folder)"
        )
    try:
        return read_geometry(json.loads(where.read_text()))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
