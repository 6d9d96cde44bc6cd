"""LoRA (Hu et al., arXiv 2106.09685): which linear layers carry adapters, and what a checkpoint of adapters records.

The adapter of a frozen layer W [out, in] is A [r, in] and B [out, r]; the layer computes W x + s * B (A x) with
s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732).  As in peft each linear
layer of the Hugging Face model has an adapter of its own, where Megatron holds several of them in one matrix.

A checkpoint of such a run holds what is trained: adapters, a trained projector, the optimizer's state.  `llava/` beside
it has this record in lora.json: the adapters' numbers, and the base by its path and hash.

Standard library only.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry

VERSION = 1  # of lora.json; raise it when a reader of today would misunderstand the file
ALL = "all"
# Part of the model as options call it -> module of LlavaModel, by which its adapters are named.
PARTS = {"language_model": "language_model", "vision_tower": "vision_model", "projector": "vision_projection"}
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # files of a folder that peft saves
ADAPTERS = "adapters"  # module of LlavaModel that holds them all


@dataclass(frozen=True)
class Linear:
    """A linear layer of the Hugging Face model, y [out] = W [out, in] x [in]."""

    megatron: str  # the layer of Megatron that holds it, below its transformer layer: self_attention.linear_qkv
    path: str  # below the transformer layer of the Hugging Face model, in Llama's and CLIP's words: self_attn.q_proj
    inputs: int
    outputs: int

    @property
    def target(self) -> str:
        """Name for LORA_TARGETS, and for peft's target_modules."""
        return self.path.rpartition(".")[2]

    @property
    def row_parallel(self) -> bool:
        """Does tensor parallelism cut the inputs?  Else it cuts the outputs."""
        return self.megatron.endswith(("linear_proj", "linear_fc2"))


def linears_of(geometry: LlavaGeometry, part: str) -> tuple[Linear, ...]:
    """The linear layers in one transformer layer of a part of PARTS; those of the whole projector."""
    language, tower = geometry.language, geometry.tower
    if part == "projector":
        return (
            Linear("linear_fc1", "linear_1", tower.hidden, language.hidden),
            Linear("linear_fc2", "linear_2", language.hidden, language.hidden),
        )
    if part == "vision_tower":
        width = query = key = tower.hidden
        out, first, second = "out_proj", ("fc1",), "fc2"
        ffn = tower.ffn_hidden
    else:
        width, ffn = language.hidden, language.ffn_hidden
        query, key = language.heads * language.head_dim, language.groups * language.head_dim
        out, first, second = "o_proj", ("gate_proj", "up_proj"), "down_proj"
    return (
        Linear("self_attention.linear_qkv", "self_attn.q_proj", width, query),
        Linear("self_attention.linear_qkv", "self_attn.k_proj", width, key),
        Linear("self_attention.linear_qkv", "self_attn.v_proj", width, key),
        Linear("self_attention.linear_proj", f"self_attn.{out}", query, width),
        *(Linear("mlp.linear_fc1", f"mlp.{name}", width, ffn) for name in first),
        Linear("mlp.linear_fc2", f"mlp.{second}", ffn, width),
    )


def layers_of(geometry: LlavaGeometry, part: str) -> int:
    """Transformer layers of a part; 1 for the projector."""
    return {
        "language_model": geometry.language.layers,
        "vision_tower": geometry.tower.running_layers,
        "projector": 1,
    }[part]


@dataclass(frozen=True)
class LoraConfig:
    """Numbers of a run's adapters.  Names as peft's LoraConfig has them; in capitals the launchers' LORA_ options."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL,)
    parts: tuple[str, ...] = ("language_model",)  # of PARTS
    rslora: bool = False

    @classmethod
    def asked(cls, rank: int, alpha: float | None, *rest: Any) -> "LoraConfig | None":
        """What the options ask for, in the fields' order: of rank 0 nothing; without alpha it is twice the rank."""
        return cls(rank, 2.0 * rank if alpha is None else alpha, *rest) if rank else None

    @property
    def scaling(self) -> float:
        """What B (A x) is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def linears(self, geometry: LlavaGeometry, part: str) -> tuple[Linear, ...]:
        """Those of a part's layer that carry an adapter."""
        if part not in self.parts:
            return ()
        return tuple(one for one in linears_of(geometry, part) if self.targets == (ALL,) or one.target in self.targets)

    def problem(self, geometry: LlavaGeometry) -> tuple[str, str] | None:
        """(field, what it must be) when the model cannot have these adapters; None: it can."""
        known = {one.target for part in self.parts for one in linears_of(geometry, part)}
        strange = [] if self.targets == (ALL,) else [name for name in self.targets if name not in known]
        if strange:
            return "targets", f"must be of {' '.join(sorted(known))} in {' '.join(self.parts)}, or all"
        if "projector" in self.parts and geometry.projector_type != "mlp2x_gelu":
            return "parts", "must not name the projector: adapters are for mlp2x_gelu, and this one is linear"
        return None

    def parameters(self, geometry: LlavaGeometry, part: str) -> int:
        """Number of the adapters' parameters in a part."""
        each = sum(self.rank * (one.inputs + one.outputs) for one in self.linears(geometry, part))
        return layers_of(geometry, part) * each

    def places(self, geometry: LlavaGeometry) -> Iterator[tuple[str, int, Linear]]:
        """(part, layer from 0, linear layer) of every adapter."""
        for part in self.parts:
            for layer in range(layers_of(geometry, part)):
                for one in self.linears(geometry, part):
                    yield part, layer, one

    def shapes(self, geometry: LlavaGeometry) -> dict[str, tuple[int, int]]:
        """Name -> shape of every matrix of the adapters, whole."""
        return {
            weight_name(part, layer, one, matrix): shape
            for part, layer, one in self.places(geometry)
            for matrix, shape in (("A", (self.rank, one.inputs)), ("B", (one.outputs, self.rank)))
        }

    def spelled(self, name: str) -> str:
        """A field as the launchers take it."""
        value = getattr(self, name)
        if isinstance(value, tuple):
            return ",".join(value)
        return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def weight_name(part: str, layer: int, linear: Linear, matrix: str) -> str:
    """Name of an adapter's matrix, `A` or `B`, in LlavaModel and in checkpoints."""
    module = linear.megatron.rpartition(".")[2]
    return f"{ADAPTERS}.{PARTS[part]}.{layer}.{module}.lora_{matrix}.{linear.target}"


def hub_path(geometry: LlavaGeometry, part: str, layer: int, linear: Linear) -> str:
    """Name of a linear layer in the Hugging Face model, from `layers.` or the projector on."""
    if part == "projector":
        return f"multi_modal_projector.{linear.path}"
    names = (geometry.language.family if part == "language_model" else geometry.tower.kind).tensor_names
    return f"layers.{layer}.{names.get(linear.path, linear.path)}"


@dataclass(frozen=True)
class LoraRecord:
    """lora.json: the adapters' numbers, and the frozen weights they were trained on."""

    config: LoraConfig
    trained: tuple[str, ...]  # parts whose own weights are trained beside the adapters, and lie in the checkpoint
    base: str  # folder of the base checkpoint, absolute, where training found it
    iteration: str  # the base's: release or iter_0000010
    sha256: str  # checkpoint_files.fingerprint of that iteration

    def as_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def of_json(cls, value: dict[str, Any], file: object) -> "LoraRecord":
        """The record of a JSON object.  Raises UserError, which names the file: damaged, or of a later version."""
        if value.get("version") != VERSION:
            raise UserError(
                f"{file}: its version is {value.get('version')!r}, wanted {VERSION}; read this checkpoint with the "
                "toolkit that wrote it or a newer one"
            )
        try:
            numbers = dict(value["config"])
            for name in ("targets", "parts"):
                numbers[name] = tuple(map(str, numbers[name]))
            config = LoraConfig(**numbers)
            if config.rank < 1 or not set(config.parts) <= PARTS.keys() or not config.parts:
                raise ValueError(f"rank {config.rank}, parts {config.parts}")
            trained = tuple(map(str, value["trained"]))
            if not set(trained) <= PARTS.keys():
                raise ValueError(f"trained {trained}")
            return cls(config, trained, str(value["base"]), str(value["iteration"]), str(value["sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}); copy it again from its source") from None
