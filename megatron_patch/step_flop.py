"""What a step costs in floating-point operations (FLOP), counted from its useful tokens.

Counted as for the "model FLOPs utilisation" of PaLM (arXiv 2204.02311, appendix B): what the model asks for, whatever
the implementation does beside it.  Padding and recomputed activations are therefore no work.  Per token and weight of a
matrix product 2 FLOP forward, 2 for the gradient of its inputs, 2 for that of its weights (arXiv 2001.08361, table 1).
Where LLaVA differs from a plain language model:

- weights that are frozen have no gradient, and below the lowest trained part nothing has one at all;
- attention between two tokens costs 4 FLOP per layer and element of the queries' width (scores and mixing), only for
  pairs of which one sees the other: within a record, and for the decoder half of all pairs;
- the head works at trained positions only, since no other position has a loss;
- adapters are linear layers beside frozen ones, through which gradients pass to what lies below;
- norms, activations, softmax and the embedding are left out, as everybody does (below 1%).
"""

import dataclasses
from typing import TYPE_CHECKING

from megatron_patch.geometry import LanguageGeometry, LlavaGeometry, TowerGeometry

if TYPE_CHECKING:
    from megatron_patch.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Which parts keep their weights, and the adapters that are trained beside some of them."""

    language_model: bool = False
    vision_tower: bool = False
    projector: bool = False
    lora: "LoraConfig | None" = None

    def with_adapters(self, lora: "LoraConfig | None") -> "Frozen":
        """The same, and the parts with adapters frozen."""
        kept = dict.fromkeys(lora.parts, True) if lora else {}
        return dataclasses.replace(self, lora=lora, **kept)

    def learns(self, part: str) -> bool:
        """Is a part of lora.PARTS trained, by itself or by adapters?"""
        return not getattr(self, part) or (self.lora is not None and part in self.lora.parts)

    def adapter_parameters(self, geometry: LlavaGeometry, part: str) -> int:
        """Number of parameters of a part's adapters."""
        return self.lora.parameters(geometry, part) if self.lora else 0


@dataclasses.dataclass(frozen=True)
class Work:
    """Of some batches.  Names as in the loaders' counters (data/loading/loader.py, WORK)."""

    records: int = 0
    tokens: int = 0  # of images and text, without padding
    labels: int = 0  # trained tokens
    images: int = 0  # tiles are images of their own
    pairs: int = 0  # of tokens of a record, the one at or before the other
    cached: int = 0  # images whose features are cached: the tower does not see them

    def __sub__(self, other: "Work") -> "Work":
        return Work(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Which of the three matrix products of a part are run."""

    inputs_gradient: bool
    weights_gradient: bool

    def linear(self, weights: int, tokens: int) -> int:
        """FLOP of matrices with so many weights over so many tokens."""
        return 2 * weights * tokens * (1 + self.inputs_gradient + self.weights_gradient)

    def attention(self, width: int, pairs: int) -> int:
        """FLOP of one layer's scores and mixing: products of two activations, so backward costs twice forward."""
        return 4 * width * pairs * (3 if self.inputs_gradient else 1)


@dataclasses.dataclass(frozen=True)
class Parts:
    """FLOP by part of the model."""

    tower: int
    projector: int
    decoder: int  # the language model's layers
    head: int

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.tower + self.projector + self.decoder + self.head


def step_flop(geometry: LlavaGeometry, frozen: Frozen, work: Work) -> int:
    """FLOP of forward and backward for `work`, over all devices."""
    return flop_of_parts(geometry, frozen, work).total


def flop_of_parts(geometry: LlavaGeometry, frozen: Frozen, work: Work) -> Parts:
    """FLOP of forward and backward for `work`; with everything frozen there is no backward."""
    tower_learns, projector_learns = frozen.learns("vision_tower"), frozen.learns("projector")
    below = tower_learns or projector_learns
    tower = _Passes(tower_learns, not frozen.vision_tower)
    first = _Passes(tower_learns, not frozen.projector)  # of the projector's layers: below it lies the tower
    second = _Passes(below, not frozen.projector)
    language = _Passes(below or frozen.learns("language_model"), not frozen.language_model)
    trained = _Passes(True, True)
    seen = work.images - work.cached

    def adapters(part: str, tokens: int) -> int:
        return trained.linear(frozen.adapter_parameters(geometry, part), tokens)

    features = work.images * geometry.tower.image_tokens
    return Parts(
        _tower_flop(geometry.tower, tower, seen) + adapters("vision_tower", seen * geometry.tower.positions),
        _projector_flop(geometry, first, second, features) + adapters("projector", features),
        _decoder_flop(geometry.language, language, work) + adapters("language_model", work.tokens),
        language.linear(geometry.language.hidden * geometry.language.vocabulary, work.labels),
    )


def _tower_flop(tower: TowerGeometry, passes: _Passes, images: int) -> int:
    """Bidirectional: every patch sees every other.  Only the layers below the chosen features run."""
    patches = tower.positions - tower.kind.class_token
    layer = 4 * tower.hidden**2 + 2 * tower.hidden * tower.ffn_hidden
    of_image = (
        _Passes(False, passes.weights_gradient).linear(3 * tower.patch_px**2 * tower.hidden, patches)
        + tower.running_layers * passes.linear(layer, tower.positions)
        + tower.running_layers * passes.attention(tower.hidden, tower.positions**2)
    )
    return images * of_image


def _projector_flop(geometry: LlavaGeometry, first: _Passes, second: _Passes, tokens: int) -> int:
    hidden = geometry.language.hidden
    flop = first.linear(geometry.tower.hidden * hidden, tokens)
    return flop + (second.linear(hidden**2, tokens) if geometry.projector_type == "mlp2x_gelu" else 0)


def _decoder_flop(language: LanguageGeometry, passes: _Passes, work: Work) -> int:
    query, key = language.heads * language.head_dim, language.groups * language.head_dim
    layer = language.hidden * (2 * query + 2 * key + 3 * language.ffn_hidden)
    return language.layers * (passes.linear(layer, work.tokens) + passes.attention(query, work.pairs))
