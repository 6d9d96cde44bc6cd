"""The one table of weights.  A row is (Megatron key, layout, hub tensors); both directions read the same rows.

Hub names are those of hub LLaVA files (`language_model.model.*`, `vision_tower.vision_model.*`,
`multi_modal_projector.*`); hub_weights.py turns other spellings into these.  Megatron keys are those of torch_dist
checkpoints: layers stacked along a new first axis, norms under their Transformer Engine names.

Letters: L layers, V vocabulary rows, h hidden, f ffn, q query heads, g groups, d head width, t tower width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_patch.conversion.geometry import LlavaGeometry, TextGeometry, VisionGeometry
from megatron_patch.conversion.layouts import Layout, QueryKeyValue, Reshaped, Rows, Same, Shape
from megatron_patch.errors import UserError


@dataclass(frozen=True)
class HubTensor:
    """A tensor of the hub files; `{layer}` in its name stands for the layer."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Row:
    """One Megatron tensor.  layers 0: stands alone; else stacked: shape [layers, *joined shape]."""

    key: str
    layout: Layout
    parts: tuple[HubTensor, ...]
    layers: int = 0

    @property
    def part_shapes(self) -> list[Shape]:
        return [part.shape for part in self.parts]

    @property
    def joined_shape(self) -> Shape:
        return self.layout.joined_shape(self.part_shapes)

    @property
    def shape(self) -> Shape:
        """Shape in the checkpoint."""
        return (self.layers, *self.joined_shape) if self.layers else self.joined_shape

    def slots(self) -> Iterator[tuple[int | None, list[str]]]:
        """(layer, hub names of that layer); (None, hub names) for a tensor that stands alone."""
        for layer in range(self.layers) if self.layers else [None]:
            yield layer, [part.name.format(layer=layer) for part in self.parts]


# Which LLMs the table knows, by HF model_type: does the QKV projection have a bias?
LLM_FAMILIES = {"llama": False, "mistral": False, "qwen2": True}
TOWER_FAMILIES = ("clip_vision_model",)
PROJECTORS = ("mlp2x_gelu", "linear")


def check_known(kind: str, name: object, known: object) -> None:
    """Refuse a model_type (or projector) the table has no rows for, with the list of those it has."""
    if name not in known:
        raise UserError(f"{kind} {name!r} is unknown to the table of weights; known: {', '.join(sorted(known))}")


def llm_rows(text: TextGeometry) -> list[Row]:
    """Rows of a Llama-like LLM: pre-norm, rotary, gated MLP, one norm at the end."""
    check_known("LLM model_type", text.family, LLM_FAMILIES)
    h, f, vocabulary = text.hidden, text.ffn, text.vocabulary
    query, key = text.heads * text.head_width, text.groups * text.head_width
    qkv = QueryKeyValue(text.heads, text.groups)
    ours, hub = "language_model.decoder.layers.", "language_model.model.layers.{layer}."

    def layer(name: str, layout: Layout, *parts: tuple[str, Shape]) -> Row:
        return Row(ours + name, layout, tuple(HubTensor(hub + part, shape) for part, shape in parts), text.layers)

    def alone(name: str, layout: Layout, part: str, shape: Shape) -> Row:
        return Row("language_model." + name, layout, (HubTensor("language_model." + part, shape),))

    rows = [
        alone("embedding.word_embeddings.weight", Same(0), "model.embed_tokens.weight", (vocabulary, h)),
        layer("self_attention.linear_qkv.layer_norm_weight", Same(), ("input_layernorm.weight", (h,))),
        layer(
            "self_attention.linear_qkv.weight",
            qkv,
            ("self_attn.q_proj.weight", (query, h)),
            ("self_attn.k_proj.weight", (key, h)),
            ("self_attn.v_proj.weight", (key, h)),
        ),
    ]
    if LLM_FAMILIES[text.family]:
        rows.append(
            layer(
                "self_attention.linear_qkv.bias",
                qkv,
                ("self_attn.q_proj.bias", (query,)),
                ("self_attn.k_proj.bias", (key,)),
                ("self_attn.v_proj.bias", (key,)),
            )
        )
    rows += [
        layer("self_attention.linear_proj.weight", Same(1), ("self_attn.o_proj.weight", (h, query))),
        layer("mlp.linear_fc1.layer_norm_weight", Same(), ("post_attention_layernorm.weight", (h,))),
        layer("mlp.linear_fc1.weight", Rows(), ("mlp.gate_proj.weight", (f, h)), ("mlp.up_proj.weight", (f, h))),
        layer("mlp.linear_fc2.weight", Same(1), ("mlp.down_proj.weight", (h, f))),
        alone("decoder.final_layernorm.weight", Same(), "model.norm.weight", (h,)),
    ]
    if not text.tied:
        rows.append(alone("output_layer.weight", Same(0), "lm_head.weight", (vocabulary, h)))
    return rows


def tower_rows(vision: VisionGeometry) -> list[Row]:
    """Rows of the CLIP tower's layers that run; see untrained_tower for the others."""
    check_known("vision tower model_type", vision.family, TOWER_FAMILIES)
    t, patch = vision.hidden, vision.patch_px
    qkv = QueryKeyValue(vision.heads, vision.heads)
    hub_tower = "vision_tower.vision_model."

    def alone(name: str, layout: Layout, part: str, shape: Shape) -> Row:
        return Row("vision_model." + name, layout, (HubTensor(hub_tower + part, shape),))

    def layer(name: str, layout: Layout, *parts: tuple[str, Shape]) -> Row:
        named = tuple(HubTensor(hub_tower + "encoder.layers.{layer}." + part, shape) for part, shape in parts)
        return Row("vision_model.decoder.layers." + name, layout, named, vision.running_layers)

    rows = [
        alone("class_token", Reshaped((1, 1, t)), "embeddings.class_embedding", (t,)),
        alone("conv1.weight", Same(), "embeddings.patch_embedding.weight", (t, 3, patch, patch)),
        alone("position_embeddings.weight", Same(), "embeddings.position_embedding.weight", (vision.patches + 1, t)),
        alone("ln_pre.weight", Same(), "pre_layrnorm.weight", (t,)),
        alone("ln_pre.bias", Same(), "pre_layrnorm.bias", (t,)),
    ]
    if not vision.running_layers:
        return rows
    for kind in ("weight", "bias"):
        matrix = (t,) if kind == "weight" else ()  # the second axis, which a bias does not have
        rows += [
            layer(f"self_attention.linear_qkv.layer_norm_{kind}", Same(), (f"layer_norm1.{kind}", (t,))),
            layer(
                f"self_attention.linear_qkv.{kind}",
                qkv,
                *((f"self_attn.{name}_proj.{kind}", (t, *matrix)) for name in "qkv"),
            ),
            layer(
                f"self_attention.linear_proj.{kind}",
                Same(1 if matrix else None),
                (f"self_attn.out_proj.{kind}", (t, *matrix)),
            ),
            layer(f"mlp.linear_fc1.layer_norm_{kind}", Same(), (f"layer_norm2.{kind}", (t,))),
            layer(f"mlp.linear_fc1.{kind}", Same(0), (f"mlp.fc1.{kind}", (vision.ffn, *matrix))),
            layer(
                f"mlp.linear_fc2.{kind}",
                Same(1 if matrix else None),
                (f"mlp.fc2.{kind}", (t, vision.ffn) if matrix else (t,)),
            ),
        ]
    return rows


def projector_rows(geometry: LlavaGeometry) -> list[Row]:
    """Rows of the projector: mlp2x_gelu is Linear(t, h), GELU, Linear(h, h); linear is Linear(t, h)."""
    check_known("projector", geometry.projector, PROJECTORS)
    t, h = geometry.vision.hidden, geometry.text.hidden
    ours, hub = "vision_projection.encoder.", "multi_modal_projector."

    def row(name: str, axis: int | None, part: str, shape: Shape) -> Row:
        return Row(ours + name, Same(axis), (HubTensor(hub + part, shape),))

    if geometry.projector == "linear":
        return [row("weight", 0, "linear_1.weight", (h, t)), row("bias", 0, "linear_1.bias", (h,))]
    return [
        row("linear_fc1.weight", 0, "linear_1.weight", (h, t)),
        row("linear_fc1.bias", 0, "linear_1.bias", (h,)),
        row("linear_fc2.weight", 1, "linear_2.weight", (h, h)),
        row("linear_fc2.bias", None, "linear_2.bias", (h,)),
    ]


def table_of_weights(geometry: LlavaGeometry) -> list[Row]:
    """All rows of a LLaVA.

    Raises:
        UserError: a family or projector without rows, with the list of known ones.
    """
    return llm_rows(geometry.text) + tower_rows(geometry.vision) + projector_rows(geometry)


def untrained_tower(vision: VisionGeometry) -> list[HubTensor]:
    """Hub tensors of the tower that no row holds: layers behind the selected one, the final norm."""
    whole = tower_rows(replace(vision, running_layers=vision.layers))
    layer_parts = [part for row in whole if row.layers for part in row.parts]
    layers = [
        HubTensor(part.name.format(layer=layer), part.shape)
        for layer in range(vision.running_layers, vision.layers)
        for part in layer_parts
    ]
    norm = "vision_tower.vision_model.post_layernorm."
    return [*layers, HubTensor(norm + "weight", (vision.hidden,)), HubTensor(norm + "bias", (vision.hidden,))]


def extra_states(rows: list[Row]) -> dict[str, int]:
    """Keys of the (empty) `_extra_state` objects beside the weights -> number of shards.

    Megatron's linear layers ask for one each; Transformer Engine's attention and norms do so too.  A superset is
    harmless: Megatron ignores what it did not ask for, and refuses to load when one it asked for is missing.
    """
    modules: dict[str, int] = {}
    for row in rows:
        module, _, _ = row.key.rpartition(".")
        if module.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "final_layernorm", "ln_pre")):
            modules[module] = row.layers
        if module.endswith("self_attention.linear_qkv"):
            modules[module.replace("linear_qkv", "core_attention")] = row.layers
        if module == "vision_projection.encoder":
            modules[module] = row.layers
    return {f"{module}._extra_state": layers or 1 for module, layers in modules.items()}
