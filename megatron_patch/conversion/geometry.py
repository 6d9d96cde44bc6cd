"""The numbers the table of weights needs, read once from a full LLaVA config (llava/config.json) and frozen."""

from dataclasses import dataclass

from megatron_patch.errors import UserError


@dataclass(frozen=True)
class TextGeometry:
    """Sizes of the LLM.  vocabulary: rows of the embedding as stored (no tensor-parallel padding)."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_width: int
    vocabulary: int
    tied: bool

    def parameters(self, qkv_bias: bool) -> int:
        """Number of parameters: embedding (and head unless tied), attention, gated MLP, norms."""
        query, key = self.heads * self.head_width, self.groups * self.head_width
        attention = 2 * self.hidden * query + 2 * self.hidden * key + (query + 2 * key if qkv_bias else 0)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class VisionGeometry:
    """Sizes of the tower.  running_layers: those the selected feature layer needs; the rest is carried along."""

    family: str
    layers: int
    running_layers: int
    hidden: int
    ffn: int
    heads: int
    image_px: int
    patch_px: int

    @property
    def patches(self) -> int:
        return (self.image_px // self.patch_px) ** 2


@dataclass(frozen=True)
class LlavaGeometry:
    text: TextGeometry
    vision: VisionGeometry
    projector: str  # mlp2x_gelu or linear

    def check_parallel(self, tensor: int, pipeline: int) -> None:
        """Refuse a TP or PP that the model cannot be cut into.

        Raises:
            UserError: naming the config value that does not divide.
        """
        text, vision = self.text, self.vision
        cuts = [
            ("num_attention_heads of the LLM", text.heads),
            ("num_key_value_heads of the LLM", text.groups),
            ("intermediate_size of the LLM", text.ffn),
            ("hidden_size of the LLM", text.hidden),
            ("num_attention_heads of the vision tower", vision.heads),
            ("intermediate_size of the vision tower", vision.ffn),
        ]
        for degree, name in ((tensor, "TP"), (pipeline, "PP")):
            if degree < 1:
                raise UserError(f"{name} is {degree}; wanted a whole number of at least 1")
        wrong = [f"{what} is {count}" for what, count in cuts if count % tensor]
        if wrong:
            raise UserError(f"TP {tensor} cannot cut this model: {', '.join(wrong)}; pass a TP that divides them")
        if text.layers % pipeline:
            raise UserError(
                f"PP {pipeline} does not divide the {text.layers} layers of the LLM; pass a PP that divides them"
            )


def running_layers(layers: int, feature_layer: object) -> int:
    """Tower layers needed for hidden_states[feature_layer] (entry 0 is the embedding): -2 of 24 layers needs 23."""
    if not isinstance(feature_layer, int) or not -layers - 1 <= feature_layer <= layers:
        raise UserError(
            f"vision_feature_layer is {feature_layer!r}; wanted one whole number from {-layers - 1} to {layers}"
        )
    return feature_layer if feature_layer >= 0 else layers + 1 + feature_layer


def _value(config: dict, name: str, where: str):
    if config.get(name) is None:
        raise UserError(f"{where} lacks {name!r}; wanted a full config as transformers writes it")
    return config[name]


def read_geometry(config: dict) -> LlavaGeometry:
    """Geometry of a full LLaVA config.

    Raises:
        UserError: a number is missing, or the config asks for something the table has no weights for.
    """
    text, vision = _value(config, "text_config", "config.json"), _value(config, "vision_config", "config.json")
    for name in ("attention_bias", "mlp_bias"):
        if text.get(name):
            raise UserError(f"text_config has {name}=true, which the table of weights has no rows for")
    heads = _value(text, "num_attention_heads", "text_config")
    hidden = _value(text, "hidden_size", "text_config")
    layers = _value(vision, "num_hidden_layers", "vision_config")
    projector = config.get("mm_projector_type", "mlp2x_gelu")
    if not config.get("multimodal_projector_bias", True):
        raise UserError("multimodal_projector_bias is false; LLaVA-1.5's projector has biases")
    return LlavaGeometry(
        text=TextGeometry(
            family=_value(text, "model_type", "text_config"),
            layers=_value(text, "num_hidden_layers", "text_config"),
            hidden=hidden,
            ffn=_value(text, "intermediate_size", "text_config"),
            heads=heads,
            groups=text.get("num_key_value_heads") or heads,
            head_width=text.get("head_dim") or hidden // heads,
            vocabulary=_value(text, "vocab_size", "text_config"),
            tied=bool(text.get("tie_word_embeddings", False)),
        ),
        vision=VisionGeometry(
            family=_value(vision, "model_type", "vision_config"),
            layers=layers,
            running_layers=running_layers(layers, config.get("vision_feature_layer", -2)),
            hidden=_value(vision, "hidden_size", "vision_config"),
            ffn=_value(vision, "intermediate_size", "vision_config"),
            heads=_value(vision, "num_attention_heads", "vision_config"),
            image_px=_value(vision, "image_size", "vision_config"),
            patch_px=_value(vision, "patch_size", "vision_config"),
        ),
        projector=projector,
    )
