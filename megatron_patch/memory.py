"""Bytes that a run needs: of a checkpoint, and of each rank's memory.

Counted from the numbers of the model; what torch, its allocator and the libraries hold beside it is not.
"""

import dataclasses
from dataclasses import dataclass

from megatron_patch.geometry import LlavaGeometry
from megatron_patch.lora import PARTS, layers_of
from megatron_patch.step_flop import Frozen
from megatron_patch.tile_plan import TILES_AT_ONCE

# Bytes of a parameter in memory and in a checkpoint, by PR: fp8 has its weights in 16 bits, too.
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
# Of Adam for a trained one: two moments in 32 bits, and a copy of the weight in 32 bits where it has fewer.
ADAM_BYTES = {"fp32": 8, "bf16": 12, "fp16": 12, "fp8": 12}


def parameters(geometry: LlavaGeometry) -> tuple[int, int, int]:
    """Of language model (image_newline with it, frozen as it is), vision tower (as far as it runs) and projector."""
    language = geometry.language.parameters + geometry.newline_parameters
    return language, geometry.tower.parameters, geometry.projector_parameters


def trained_parameters(geometry: LlavaGeometry, frozen: Frozen) -> int:
    """Those that an optimizer step changes."""
    kept = (frozen.language_model, frozen.vision_tower, frozen.projector)
    whole = sum(count for count, is_frozen in zip(parameters(geometry), kept, strict=True) if not is_frozen)
    return whole + sum(frozen.adapter_parameters(geometry, part) for part in PARTS)


def checkpoint_bytes(geometry: LlavaGeometry, frozen: Frozen, precision: str, optimizer: bool = True) -> int:
    """Of a checkpoint.  precision: PR of the launchers; optimizer: is its state in it?"""
    # with adapters the frozen weights stay in the base's checkpoint
    stored = trained_parameters(geometry, frozen) if frozen.lora else sum(parameters(geometry))
    weights = BYTES[precision] * stored
    return weights + ADAM_BYTES[precision] * trained_parameters(geometry, frozen) * optimizer


# ---------------------------------------------------------------- of a rank


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its peak, by what they are for."""

    program: int  # interpreter, libraries and their work space
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    images: int  # pixels and the vision tower's features and layers
    freed: int  # what the allocator keeps of freed tensors, where the device's memory is the host's

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def state(self) -> int:
        """What a run cannot do without, whatever its records: weights, gradients and the optimizer's."""
        return self.weights + self.gradients + self.optimizer

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Sizes:
    """Of a rank: its share of the model, and what it sees at once.  Names as the launchers' arguments."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    tokens: int = 2048  # of a micro-batch, padding included
    labels: int = 1024  # of them trained
    images: int = 1  # of a micro-batch; tiles are images of their own
    micro_batches: int = 1  # of a step, for those in flight in a pipeline
    precision: str = "bf16"
    recompute: str = "false"
    distributed_optimizer: bool = False
    fully_sharded: int = 1  # ranks over which weights, gradients and optimizer state are shared out


# Bytes of a process beside what is counted.  cpu: measured of a run of almost no weights; gpu: assumed, CUDA's context,
# the libraries' work space and NCCL's buffers.
PROGRAM = {"cpu": 760 << 20, "gpu": 2200 << 20}
FREED_BYTES = 4  # per trained parameter on a CPU, whose allocator keeps what is freed: 2 to 3.5 measured, up to 4 ranks
GRADIENT_BYTES = 4  # gradients are summed in 32 bits


def rank_memory(
    geometry: LlavaGeometry, frozen: Frozen, sizes: Sizes, stage: int = 0, device: str = "gpu"
) -> RankMemory:
    """Of a rank of a pipeline stage; device: a name of PROGRAM.

    Per token and decoder layer the backward pass keeps, in elements: the inputs of both norms (2 H), queries and
    attention's result (2 Q), keys and values (2 K), both halves of the gated MLP (2 F); where the layer's weights are
    trained Transformer Engine's layers also keep the inputs of their matrices (2 H + F), which local layers compute
    again.  As in Korthikanti et al., arXiv 2205.05198, section 4.1, for a gated MLP and attention that keeps no scores.
    Recomputing attention leaves out what only it needs; recomputing layers leaves H per layer, and one layer while it
    is recomputed.
    """
    language, tower = geometry.language, geometry.tower
    first, last = stage == 0, stage == sizes.pipeline - 1
    embedding = language.vocabulary * language.hidden
    layers = language.layers // sizes.pipeline
    body = language.parameters - embedding * (1 if language.tied_embeddings else 2)
    decoder = body * layers // language.layers
    decoder += embedding * (first + last if not (language.tied_embeddings and sizes.pipeline == 1) else 1)
    parts = (decoder, tower.parameters * first, geometry.projector_parameters * first)
    kept = (frozen.language_model, frozen.vision_tower, frozen.projector)
    own = [part / sizes.tensor for part in parts]
    adapters = _adapter_share(geometry, frozen, sizes, first)
    trained = sum(part for part, is_frozen in zip(own, kept, strict=True) if not is_frozen) + adapters
    shared = sizes.data * sizes.context if sizes.distributed_optimizer else 1
    value = BYTES[sizes.precision]
    gathered = 0.0
    if sizes.fully_sharded > 1:
        # whole are two layers, one computed with and one on its way, and what belongs to no layer of the decoder
        gathered = own[0] - body / sizes.tensor + 2 * body / language.layers / sizes.tensor + own[2] + adapters
        gathered += 2 * own[1] / max(1, tower.running_layers)
    tokens = sizes.tokens / sizes.context
    in_flight = min(sizes.pipeline - stage, sizes.micro_batches)
    query, key = language.heads * language.head_dim, language.groups * language.head_dim
    width, ffn = language.hidden, language.ffn_hidden
    of_layer = 2 * width + 2 * query + 2 * key + 2 * ffn
    if device == "gpu" and frozen.learns("language_model"):
        of_layer += 2 * width + ffn  # adapters look at the same inputs
    if sizes.recompute == "sel":
        of_layer -= query
    below = first and (frozen.learns("vision_tower") or frozen.learns("projector"))
    has_gradient = frozen.learns("language_model") or below or not first
    if sizes.recompute == "full":
        activations = in_flight * layers * width + of_layer
    else:
        activations = in_flight * layers * of_layer
    activations *= tokens * value / sizes.tensor if has_gradient else 0
    # logits of the trained positions, their softmax and its gradient
    logits = 3 * sizes.labels / sizes.context * language.vocabulary / sizes.tensor * 4 if last else 0
    return RankMemory(
        program=PROGRAM[device],
        weights=round((sum(own) + adapters) * value / sizes.fully_sharded + gathered * value),
        gradients=round(trained * (value if sizes.fully_sharded > 1 else GRADIENT_BYTES) / sizes.fully_sharded),
        optimizer=round(trained * ADAM_BYTES[sizes.precision] / shared / sizes.fully_sharded),
        activations=round(activations),
        logits=round(logits),
        images=round(_image_bytes(geometry, frozen, sizes)) if first else 0,
        freed=round(trained * FREED_BYTES) if device == "cpu" else 0,
    )


def _adapter_share(geometry: LlavaGeometry, frozen: Frozen, sizes: Sizes, first: bool) -> float:
    """Parameters of a rank's adapters: one matrix of each is cut by TP, the other is whole (model/adapters.py)."""
    if frozen.lora is None:
        return 0.0
    total = 0.0
    for part in frozen.lora.parts:
        layers = layers_of(geometry, part) / (sizes.pipeline if part == "language_model" else 1)
        if part != "language_model" and not first:
            continue
        for one in frozen.lora.linears(geometry, part):
            cut, whole = (one.inputs, one.outputs) if one.row_parallel else (one.outputs, one.inputs)
            total += layers * frozen.lora.rank * (cut / sizes.tensor + whole)
    return total


def _image_bytes(geometry: LlavaGeometry, frozen: Frozen, sizes: Sizes) -> float:
    """Pixels in 32 bits, features, and the tower's layers: all of them where it is trained, else one at a time.

    A layer keeps of each position, in elements: inputs and results of both norms (4 H), queries, keys and values (3 H),
    attention's result before and after its axes change places (2 H), the MLP's middle before and after its activation
    (2 F), and the sigmoid of quick_gelu (F).  A frozen tower of a model that sees images at any resolution has
    TILES_AT_ONCE tiles before it; the others wait as pixels of 8 bits.
    """
    tower, value = geometry.tower, BYTES[sizes.precision]
    learns = frozen.learns("vision_tower")
    chunked = geometry.any_resolution is not None and not learns
    at_once = min(sizes.images, TILES_AT_ONCE) if chunked else sizes.images
    pixels = 3 * tower.side_px**2
    middles = 3 if tower.activation == "quick_gelu" else 2
    of_layer = (9 * tower.hidden + middles * tower.ffn_hidden) / sizes.tensor
    layers = tower.running_layers if learns else 1
    features = sizes.images * tower.positions * value * 2 * tower.hidden
    return (
        features
        + at_once * (4 * pixels + tower.positions * value * layers * of_layer)
        + (sizes.images - at_once) * pixels
    )
