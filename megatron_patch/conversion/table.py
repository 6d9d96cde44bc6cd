"""The one table of weights.  A row is (Megatron key, transform, hub tensors); both directions read the same rows.

Hub names are those of hub LLaVA files (`language_model.model.*`, `vision_tower.vision_model.*`,
`multi_modal_projector.*`, `image_newline`); hub_weights.py turns other spellings into these.  Those of Llama and CLIP
stand here, a family's or tower's own in its row of language_models.py or vision_towers.py.  Megatron keys are those of
torch_dist checkpoints: layers stacked along a new first axis, norms under their Transformer Engine names.

Letters: L layers, V vocabulary rows, h hidden, f ffn, q query heads, g groups, d head width, t tower width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_patch.conversion.transforms import QueryKeyValue, Reshaped, Rows, Same, Shape, Transform
from megatron_patch.geometry import LanguageGeometry, LlavaGeometry, TowerGeometry
from megatron_patch.llava_kinds import NEWLINE


@dataclass(frozen=True)
class HubTensor:
    """A tensor of the hub files; `{layer}` in its name stands for the layer."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Row:
    """One Megatron tensor.  layers 0: stands alone; else stacked: shape [layers, *joined shape]."""

    key: str
    transform: Transform
    parts: tuple[HubTensor, ...]
    layers: int = 0

    @property
    def part_shapes(self) -> list[Shape]:
        return [part.shape for part in self.parts]

    @property
    def joined_shape(self) -> Shape:
        return self.transform.joined_shape(self.part_shapes)

    @property
    def shape(self) -> Shape:
        """Shape in the checkpoint."""
        return (self.layers, *self.joined_shape) if self.layers else self.joined_shape

    def slots(self) -> Iterator[tuple[int | None, list[str]]]:
        """(layer, hub names of that layer); (None, hub names) for a tensor that stands alone."""
        for layer in range(self.layers) if self.layers else [None]:
            yield layer, [part.name.format(layer=layer) for part in self.parts]


def llm_rows(language: LanguageGeometry) -> list[Row]:
    """Rows of a Llama-like LLM: pre-norm, rotary, gated MLP, one norm at the end."""
    h, f, vocabulary = language.hidden, language.ffn_hidden, language.vocabulary
    query, key = language.heads * language.head_dim, language.groups * language.head_dim
    qkv = QueryKeyValue(language.heads, language.groups)
    ours, hub = "language_model.decoder.layers.", "language_model.model.layers.{layer}."

    def layer(name: str, transform: Transform, *parts: tuple[str, Shape]) -> Row:
        return Row(
            ours + name,
            transform,
            tuple(HubTensor(hub + language.family.tensor_name(part), shape) for part, shape in parts),
            language.layers,
        )

    def alone(name: str, transform: Transform, part: str, shape: Shape) -> Row:
        return Row("language_model." + name, transform, (HubTensor("language_model." + part, shape),))

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
    if language.qkv_bias:
        rows.append(
            layer(
                "self_attention.linear_qkv.bias",
                qkv,
                ("self_attn.q_proj.bias", (query,)),
                ("self_attn.k_proj.bias", (key,)),
                ("self_attn.v_proj.bias", (key,)),
            )
        )
    if language.qk_norm:
        width = (language.head_dim,)
        rows += [
            layer("self_attention.q_layernorm.weight", Same(), ("self_attn.q_norm.weight", width)),
            layer("self_attention.k_layernorm.weight", Same(), ("self_attn.k_norm.weight", width)),
        ]
    rows += [
        layer("self_attention.linear_proj.weight", Same(1), ("self_attn.o_proj.weight", (h, query))),
        layer("mlp.linear_fc1.layer_norm_weight", Same(), ("post_attention_layernorm.weight", (h,))),
        layer("mlp.linear_fc1.weight", Rows(), ("mlp.gate_proj.weight", (f, h)), ("mlp.up_proj.weight", (f, h))),
        layer("mlp.linear_fc2.weight", Same(1), ("mlp.down_proj.weight", (h, f))),
        alone("decoder.final_layernorm.weight", Same(), "model.norm.weight", (h,)),
    ]
    if not language.tied_embeddings:
        rows.append(alone("output_layer.weight", Same(0), "lm_head.weight", (vocabulary, h)))
    return rows


def tower_rows(tower: TowerGeometry) -> list[Row]:
    """Rows of the tower's embedding and of its layers that run; see untrained_tower for the rest."""
    t, patch = tower.hidden, tower.patch_px
    qkv = QueryKeyValue(tower.heads, tower.heads)
    hub_tower = "vision_tower.vision_model."

    def alone(name: str, transform: Transform, part: str, shape: Shape) -> Row:
        return Row("vision_model." + name, transform, (HubTensor(hub_tower + tower.kind.tensor_name(part), shape),))

    def layer(name: str, transform: Transform, *parts: tuple[str, Shape]) -> Row:
        hub = hub_tower + "encoder.layers.{layer}."
        named = tuple(HubTensor(hub + tower.kind.tensor_name(part), shape) for part, shape in parts)
        return Row("vision_model.decoder.layers." + name, transform, named, tower.running_layers)

    rows = [alone("conv1.weight", Same(), "embeddings.patch_embedding.weight", (t, 3, patch, patch))]
    if tower.kind.patch_bias:
        rows.append(alone("conv1.bias", Same(), "embeddings.patch_embedding.bias", (t,)))
    if tower.kind.class_token:
        rows.append(alone("class_token", Reshaped((1, 1, t)), "embeddings.class_embedding", (t,)))
    positions = (tower.positions, t)
    rows.append(alone("position_embeddings.weight", Same(), "embeddings.position_embedding.weight", positions))
    if tower.kind.pre_norm:
        rows += [
            alone("ln_pre.weight", Same(), "pre_layrnorm.weight", (t,)),
            alone("ln_pre.bias", Same(), "pre_layrnorm.bias", (t,)),
        ]
    if not tower.running_layers:
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
            layer(f"mlp.linear_fc1.{kind}", Same(0), (f"mlp.fc1.{kind}", (tower.ffn_hidden, *matrix))),
            layer(
                f"mlp.linear_fc2.{kind}",
                Same(1 if matrix else None),
                (f"mlp.fc2.{kind}", (t, tower.ffn_hidden) if matrix else (t,)),
            ),
        ]
    return rows


def projector_rows(geometry: LlavaGeometry) -> list[Row]:
    """Rows of the projector: mlp2x_gelu is Linear(t, h), GELU, Linear(h, h); linear is Linear(t, h)."""
    t, h = geometry.tower.hidden, geometry.language.hidden
    ours, hub = "vision_projection.encoder.", "multi_modal_projector."

    def row(name: str, axis: int | None, part: str, shape: Shape) -> Row:
        return Row(ours + name, Same(axis), (HubTensor(hub + part, shape),))

    if geometry.projector_type == "linear":
        return [row("weight", 0, "linear_1.weight", (h, t)), row("bias", 0, "linear_1.bias", (h,))]
    return [
        row("linear_fc1.weight", 0, "linear_1.weight", (h, t)),
        row("linear_fc1.bias", 0, "linear_1.bias", (h,)),
        row("linear_fc2.weight", 1, "linear_2.weight", (h, h)),
        row("linear_fc2.bias", None, "linear_2.bias", (h,)),
    ]


def table_of_weights(geometry: LlavaGeometry) -> list[Row]:
    """All rows of a LLaVA."""
    rows = llm_rows(geometry.language) + tower_rows(geometry.tower) + projector_rows(geometry)
    if geometry.kind.any_resolution:
        rows.append(Row(f"{NEWLINE}.weight", Same(), (HubTensor(NEWLINE, (geometry.language.hidden,)),)))
    return rows


def untrained_tower(tower: TowerGeometry) -> list[HubTensor]:
    """Hub tensors of the tower that no row holds: layers behind the selected one, final norm, pooling head."""
    whole = tower_rows(replace(tower, running_layers=tower.layers))
    layer_parts = [part for row in whole if row.layers for part in row.parts]
    layers = [
        HubTensor(part.name.format(layer=layer), part.shape)
        for layer in range(tower.running_layers, tower.layers)
        for part in layer_parts
    ]
    behind = [HubTensor(name, shape) for name, shape in _behind_the_layers(tower)]
    return layers + behind


def _behind_the_layers(tower: TowerGeometry) -> Iterator[tuple[str, Shape]]:
    t, f = tower.hidden, tower.ffn_hidden
    modules: dict[str, tuple[Shape, Shape]] = {"post_layernorm.": ((t,), (t,))}  # shapes of weight and bias
    if tower.pooling_head:
        yield "vision_tower.vision_model.head.probe", (1, 1, t)
        modules |= {
            "head.attention.in_proj_": ((3 * t, t), (3 * t,)),
            "head.attention.out_proj.": ((t, t), (t,)),
            "head.layernorm.": ((t,), (t,)),
            "head.mlp.fc1.": ((f, t), (f,)),
            "head.mlp.fc2.": ((t, f), (t,)),
        }
    for module, (weight, bias) in modules.items():
        yield "vision_tower.vision_model." + tower.kind.tensor_name(f"{module}weight"), weight
        yield "vision_tower.vision_model." + tower.kind.tensor_name(f"{module}bias"), bias


def extra_states(rows: list[Row]) -> dict[str, int]:
    """Keys of the (empty) `_extra_state` objects beside the weights -> number of shards.

    Megatron's linear layers ask for one each; Transformer Engine's attention and norms do so too.  A superset is
    harmless: Megatron ignores what it did not ask for, and refuses to load when one it asked for is missing.
    """
    modules: dict[str, int] = {}
    for row in rows:
        module, _, _ = row.key.rpartition(".")
        if module.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "_layernorm", "ln_pre")):
            modules[module] = row.layers
        if module.endswith("self_attention.linear_qkv"):
            modules[module.replace("linear_qkv", "core_attention")] = row.layers
        if module == "vision_projection.encoder":
            modules[module] = row.layers
    return {f"{module}._extra_state": layers or 1 for module, layers in modules.items()}
