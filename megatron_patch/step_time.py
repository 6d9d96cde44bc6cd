"""How long a step takes on some devices, on paper: useful work, traffic, bubbles, and waiting for each other.

A model and not a measurement.  What it leaves out: kernels that do little work (a GPU runs them at the one efficiency
of its precision), contention on the network, and stragglers.  How far it is off: toolkits/benchmark/README.md.

B: records of a micro-batch, S: its padded length, H: the decoder's width; t, p, v, c, d: sizes of tensor, pipeline,
virtual pipeline, context and data parallelism; m: micro-batches of a rank in a step.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.device_cards import Card
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.length_mix import LengthMix, RecordSize
from megatron_patch.step_balance import Layout, RecordCost, balanced, in_turn, rank_costs
from megatron_patch.step_flop import Frozen, Parts, Work, flop_of_parts, step_flop
from megatron_patch.tile_plan import TilePlan

# Seconds of one core for one image: 0.25 cores at 58 images/s, 1.1 at 245 (JPEG of 640 x 480 to 336 x 336 pixels).
IMAGE_S = 4.4e-3
# Of each further tile, as a share of that: decoding the same JPEG and cutting 5 tiles of it takes 2.8 times as long.
TILE_SHARE = 0.45
MEMORY_SHARE = 0.8  # of the memory bandwidth that an optimizer reaches, which reads and writes and does little else
SAMPLED_STEPS, SAMPLED_RECORDS = 16, 65_536  # of the mix, for padding and imbalance
RECOMPUTES = ("false", "sel", "full")
NOTHING_FROZEN, ALL_FROZEN = Frozen(), Frozen(True, True, True)


@dataclass(frozen=True)
class Plan:
    """How a run is laid out; names and values as the launchers' arguments."""

    global_batch: int
    micro_batch: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    context: int = 1
    data: int = 1
    precision: str = "bf16"
    recompute: str = "false"
    distributed_optimizer: bool = False
    frozen: Frozen = NOTHING_FROZEN
    balanced: bool = False  # BALANCE_COST
    packed: bool = False  # rows are full: neither padding nor imbalance
    longest: int = 2048  # DECODER_SEQ_LEN
    workers: int = 2  # loader processes per rank
    fully_sharded: int = 1  # ranks over which FSDP shares out weights, gradients and optimizer state
    hidden: frozenset[str] = frozenset({"context"})  # traffic behind work, of "tensor", "context", "data"
    image: TilePlan | None = None  # each of the mix's images; None: one tile

    def __post_init__(self) -> None:
        """Refuse what no run could be."""
        for name in ("global_batch", "micro_batch", "tensor", "pipeline", "virtual_stages", "context", "data"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, wanted at least 1")
        if self.recompute not in RECOMPUTES:
            raise UserError(f"recompute is {self.recompute!r}, wanted one of {', '.join(RECOMPUTES)}")
        if self.global_batch % (self.micro_batch * self.data):
            raise UserError(
                f"a global batch of {self.global_batch} cannot be shared out over {self.data} data-parallel ranks in "
                f"micro-batches of {self.micro_batch}; make it a multiple of {self.micro_batch * self.data}"
            )
        if self.image is not None and self.image.tokens >= self.longest:
            raise UserError(
                f"an image takes {self.image.tokens} tokens, which leaves no room for text within {self.longest}; "
                "raise DECODER_SEQ_LEN, or plan with smaller images (--image-size)"
            )
        if self.virtual_stages > 1 and (self.pipeline == 1 or self.micro_batches % self.pipeline):
            raise UserError(
                f"{self.virtual_stages} virtual stages need more than one pipeline stage, and micro-batches in "
                f"multiples of their number; pipeline is {self.pipeline}, micro-batches are {self.micro_batches}"
            )

    @property
    def micro_batches(self) -> int:
        """Of a data-parallel rank in a step."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def devices(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def tiles(self) -> int:
        """Of an image."""
        return self.image.tiles if self.image is not None else 1

    @property
    def layout(self) -> Layout:
        """For step_balance."""
        return Layout(self.data, self.micro_batches, self.micro_batch)


@dataclass(frozen=True)
class Lengths:
    """What a mix comes to under a plan, means over sampled steps.  FLOP without the head's."""

    of_record: Work  # sums over `records`
    records: int
    padding: float  # FLOP spent on padding, as a share of the useful ones
    imbalance: float  # what the slowest rank has to do more than the mean, as a share of that
    micro_batch_tokens: float  # padded, B x S

    def work(self, records: int) -> Work:
        """Of so many records on average."""
        return Work(*(round(value * records / self.records) for value in dataclasses.astuple(self.of_record)))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go for; a process's mean over the pipeline stages where these differ."""

    tower: float
    projector: float
    decoder: float
    head: float
    recompute: float
    padding: float
    host: float  # the interpreter's, on a CPU
    tensor_traffic: float
    context_traffic: float
    pipeline_traffic: float
    uneven_stages: float  # waiting for the stage that has most to do
    pipeline_bubble: float  # filling and draining
    imbalance: float  # waiting for the data-parallel rank that has most to do
    data_traffic: float  # gradients, and with the distributed optimizer weights
    optimizer: float
    shared_cores: float  # on a CPU: waiting for a core
    loading: float  # waiting for data
    # what was done in it
    samples: int
    tokens: int  # without padding
    flop: int  # useful
    devices: int
    peak: float  # FLOP/s of one device

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names[: names.index("samples")]}

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def samples_per_second(self) -> float:
        """Of all devices."""
        return self.samples / self.seconds

    @property
    def tokens_per_second_and_device(self) -> float:
        """Tokens without padding."""
        return self.tokens / self.seconds / self.devices

    @property
    def utilisation(self) -> float:
        """MFU: useful FLOP/s as a share of the peak."""
        return self.flop / self.seconds / self.devices / self.peak


def look_at(geometry: LlavaGeometry, plan: Plan, mix: LengthMix, seed: int = 0) -> Lengths:
    """Padding and imbalance of a mix: steps are drawn and dealt to ranks as a run does it (step_balance.py)."""
    # what does not change the answer, for the cache
    plain = {"tensor": 1, "pipeline": 1, "virtual_stages": 1, "context": 1, "recompute": "false", "precision": "bf16"}
    plain |= {"distributed_optimizer": False, "workers": 1, "hidden": frozenset()}
    return _look_at(geometry, dataclasses.replace(plan, **plain), mix, seed)


@functools.lru_cache(64)
def _look_at(geometry: LlavaGeometry, plan: Plan, mix: LengthMix, seed: int) -> Lengths:
    steps = max(1, min(SAMPLED_STEPS, SAMPLED_RECORDS // plan.global_batch))
    image_tokens = plan.image.tokens if plan.image is not None else geometry.tower.image_tokens
    records = mix.sample(steps * plan.global_batch, image_tokens, plan.longest, seed, plan.tiles)
    units = Work(tokens=1), Work(pairs=1), Work(images=1)
    cost = RecordCost(*(step_flop(geometry, plan.frozen, unit) for unit in units))
    of_record = _work(records)
    useful = sum(cost.text(record.tokens) + cost.image * record.images for record in records)
    if plan.packed:
        tokens = of_record.tokens / len(records)
        return Lengths(of_record, len(records), 0.0, 0.0, tokens * plan.micro_batch)
    padded = slowest = places = 0
    for start in range(0, len(records), plan.global_batch):
        step = records[start : start + plan.global_batch]
        tokens, images = [record.tokens for record in step], [record.images for record in step]
        dealt = balanced(tokens, images, cost, plan.layout) if plan.balanced else in_turn(plan.layout)
        costs = rank_costs(dealt, tokens, images, cost)
        padded += sum(costs)
        slowest += max(costs)
        places += sum(len(batch) * max(tokens[place] for place in batch) for rank in dealt for batch in rank)
    return Lengths(
        of_record,
        len(records),
        padding=padded / useful - 1,
        imbalance=slowest * plan.data / padded - 1,
        micro_batch_tokens=places / len(records) * plan.micro_batch,
    )


def _work(records: Sequence[RecordSize]) -> Work:
    return Work(
        len(records),
        sum(record.tokens for record in records),
        sum(record.labels for record in records),
        sum(record.images for record in records),
        sum(record.tokens * (record.tokens + 1) // 2 for record in records),
    )


def predict(geometry: LlavaGeometry, plan: Plan, card: Card, mix: LengthMix) -> StepTime:
    """Seconds of a step.

    A pipeline takes m times its slowest stage, and once the others to fill and drain, 1/v of that where a rank holds v
    virtual stages: with equal stages the bubble is (p - 1) / (m v) of the work (Narayanan et al., arXiv 2104.04473,
    section 2.2).

    Raises:
        UserError: the model cannot be cut so, or the device has no such precision.
    """
    geometry.check_parallel(plan.tensor, plan.pipeline, None, plan.virtual_stages)
    if plan.precision not in card.peak:
        raise UserError(f"{card.name} has no {plan.precision}; it has {', '.join(card.peak)}")
    lengths = look_at(geometry, plan, mix)
    p, m = plan.pipeline, plan.micro_batches
    compute = _compute(geometry, plan, card, lengths)  # of a micro-batch, on the devices of one model
    traffic = _Traffic(geometry, plan, card, lengths)
    decoder = (compute.decoder + compute.padding + compute.recompute) / (plan.tensor * plan.context * p)
    tensor, context, between = traffic.tensor(), traffic.context(), traffic.pipeline()
    if "tensor" in plan.hidden:
        tensor = max(0.0, tensor - decoder)
    if "context" in plan.hidden:
        context = max(0.0, context - traffic.attention_s())
    host = card.layer_s * geometry.language.layers / p
    first = (compute.tower + compute.projector) / plan.tensor
    last = compute.head / (plan.tensor * plan.context)
    stages = [decoder + tensor + context + between + host] * p
    stages[0] += first
    stages[-1] += last
    mean, slowest = sum(stages) / p, max(stages)
    bubble = (sum(stages) - slowest) / plan.virtual_stages
    pipeline = m * slowest + bubble
    imbalance = lengths.imbalance * pipeline
    weights = _trained_weights(geometry, plan)
    data = traffic.data(weights, backward_s=slowest * 2 / 3)
    optimizer = _optimizer(weights, plan, card) + card.step_s
    busy = m * mean + data + optimizer  # of a process, on average
    total = pipeline + imbalance + data + optimizer
    waiting = max(0.0, busy * plan.devices / card.shared_cores - total) if card.shared_cores else 0.0
    total += waiting
    work = lengths.work(plan.global_batch)
    readers = max(1, min(plan.workers, card.cores * plan.tensor * p * plan.context))
    image_s = IMAGE_S * (1 + TILE_SHARE * (plan.tiles - 1))
    loading = max(0.0, work.images / plan.tiles / plan.data * image_s / readers - total)
    per_stage = m / (plan.tensor * p)
    return StepTime(
        tower=compute.tower * per_stage,
        projector=compute.projector * per_stage,
        decoder=compute.decoder * per_stage / plan.context,
        head=compute.head * per_stage / plan.context,
        recompute=compute.recompute * per_stage / plan.context,
        padding=compute.padding * per_stage / plan.context,
        host=m * host,
        tensor_traffic=m * tensor,
        context_traffic=m * context,
        pipeline_traffic=m * between,
        uneven_stages=m * (slowest - mean),
        pipeline_bubble=bubble,
        imbalance=imbalance,
        data_traffic=data,
        optimizer=optimizer,
        shared_cores=waiting,
        loading=loading,
        samples=plan.global_batch,
        tokens=work.tokens,
        flop=step_flop(geometry, plan.frozen, work),
        devices=plan.devices,
        peak=card.peak[plan.precision],
    )


@dataclass(frozen=True)
class _Compute:
    """Seconds of a micro-batch on one device, forward and backward."""

    tower: float
    projector: float
    decoder: float
    head: float
    recompute: float
    padding: float


def _compute(geometry: LlavaGeometry, plan: Plan, card: Card, lengths: Lengths) -> _Compute:
    """FLOP by step_flop.py; PR=fp8 holds for the decoder's layers, bf16 around them."""
    around = card.rate("bf16" if plan.precision == "fp8" else plan.precision)
    within = card.rate(plan.precision)
    records = 1000  # so that rounding of a micro-batch's means does not count
    share = plan.micro_batch / records
    work = lengths.work(records)
    parts = flop_of_parts(geometry, plan.frozen, work)
    useful = parts.tower + parts.projector + parts.decoder
    return _Compute(
        tower=parts.tower * share / around,
        projector=parts.projector * share / around,
        decoder=parts.decoder * share / within,
        head=parts.head * share / around,
        recompute=_recomputed(geometry, plan, work, parts) * share / within,
        padding=lengths.padding * useful * share / within,
    )


def _recomputed(geometry: LlavaGeometry, plan: Plan, work: Work, parts: Parts) -> int:
    """FLOP of the decoder's second forward pass: of its layers, or of their attention alone (arXiv 2205.05198)."""
    if plan.recompute == "false" or parts.decoder == flop_of_parts(geometry, ALL_FROZEN, work).decoder:
        return 0  # no backward pass
    again = Work(tokens=work.tokens if plan.recompute == "full" else 0, pairs=work.pairs)
    return flop_of_parts(geometry, ALL_FROZEN, again).decoder


class _Traffic:
    """Seconds of communication of one device.

    A ring of n moves (n - 1) / n of the bytes for a gather or a reduce-scatter, twice that for a sum on every device
    (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009), in n - 1 or 2 (n - 1) hops.
    """

    def __init__(self, geometry: LlavaGeometry, plan: Plan, card: Card, lengths: Lengths) -> None:
        self._geometry, self._plan, self._card = geometry, plan, card
        self._tokens = lengths.micro_batch_tokens
        self._images = lengths.of_record.images / lengths.records * plan.micro_batch  # of a micro-batch
        self._bytes = 4 if plan.precision == "fp32" else 2  # of an activation or a weight
        self._decoder_backward = plan.frozen != ALL_FROZEN

    def tensor(self) -> float:
        """Of a micro-batch.  Sequence parallelism: two gathers and two reduce-scatters of [S / c, B, H] per layer and
        direction, and two gathers of inputs more for gradients of weights (arXiv 2205.05198, section 4.2); the tower
        has two sums per layer and direction instead.  Hidden states are gathered once more for the head.
        """
        plan, language, tower = self._plan, self._geometry.language, self._geometry.tower
        t = plan.tensor
        if t == 1:
            return 0.0
        layers = language.layers / plan.pipeline
        backward = self._decoder_backward * (4 + 2 * (not plan.frozen.language_model))
        passes = 4 + backward + 4 * (plan.recompute == "full")
        hidden = self._tokens / plan.context * language.hidden * self._bytes
        seconds = (layers * passes + (1 + self._decoder_backward) / plan.pipeline) * self._moved(hidden, t, t)
        features = self._images * tower.positions * tower.hidden * self._bytes
        sums = tower.running_layers * (2 + 2 * (not plan.frozen.vision_tower)) / plan.pipeline
        return seconds + sums * 2 * self._moved(features, t, t)

    def context(self) -> float:
        """Of a micro-batch: keys and values pass around the ring, and backward their gradients too (arXiv
        2310.01889).
        """
        plan, language = self._plan, self._geometry.language
        c = plan.context
        if c == 1:
            return 0.0
        states = 2 * self._tokens * language.groups * language.head_dim * self._bytes / plan.tensor
        passes = 1 + 2 * self._decoder_backward + (plan.recompute != "false")
        return language.layers / plan.pipeline * passes * self._moved(states, c, plan.tensor * c)

    def attention_s(self) -> float:
        """Seconds of a micro-batch's attention, behind which the traffic of its keys and values can hide."""
        plan = self._plan
        pairs = round(self._tokens * (self._tokens / plan.micro_batch + 1) / 2)
        flop = flop_of_parts(self._geometry, plan.frozen, Work(pairs=pairs)).decoder
        return flop / self._card.rate(plan.precision) / (plan.tensor * plan.context * plan.pipeline)

    def pipeline(self) -> float:
        """Of a micro-batch: hidden states to the next stage, their gradients back, as often as a rank has stages; with
        virtual stages they pass while another micro-batch is at work.
        """
        plan = self._plan
        if plan.pipeline == 1 or plan.virtual_stages > 1:
            return 0.0
        width = self._geometry.language.hidden * self._bytes
        inner = plan.tensor * plan.context * plan.data
        bandwidth, latency = self._link(2, inner * 2)
        moved = self._tokens / plan.context * width / plan.tensor
        return (1 + self._decoder_backward) * (moved / bandwidth + latency)

    def data(self, weights: float, backward_s: float) -> float:
        """Of a step: gradients in fp32 are summed; with the distributed optimizer reduce-scattered, and weights
        gathered (arXiv 1910.02054).

        Args:
            weights: trained, of one device.
            backward_s: of the last micro-batch, behind which gradients can hide; weights behind half of it.
        """
        plan = self._plan
        n = plan.data * plan.context
        if n == 1 or not weights:
            return 0.0
        reach = plan.tensor * n
        if plan.fully_sharded > 1:
            # every micro-batch gathers weights for forward and backward and scatters gradients, all of it behind work
            moved = 3 * self._moved(self._bytes * weights, n, reach)
            return plan.micro_batches * max(0.0, moved - (backward_s if "data" in plan.hidden else 0.0))
        gradients = self._moved(4 * weights, n, reach)
        gathered = self._moved(self._bytes * weights, n, reach) if plan.distributed_optimizer else gradients
        if "data" not in plan.hidden:
            return gradients + gathered
        if plan.distributed_optimizer:
            return max(0.0, gradients - backward_s) + max(0.0, gathered - backward_s / 2)
        return max(0.0, gradients + gathered - backward_s)

    def _moved(self, amount: float, n: int, reach: int) -> float:
        """Seconds in which a ring of n gathers or scatters so many bytes; it spans `reach` neighbouring devices."""
        bandwidth, latency = self._link(n, reach)
        return (n - 1) / n * amount / bandwidth + (n - 1) * latency

    def _link(self, n: int, reach: int) -> tuple[float, float]:
        """Bytes/s and seconds of a hop.  Between nodes a ring uses the adapters of all its devices of a node."""
        card = self._card
        if reach <= card.devices_per_node:
            return card.node_bandwidth, card.node_latency_s
        in_node = max(1, card.devices_per_node * n // reach)
        return min(card.node_bandwidth, in_node * card.network_bandwidth), card.network_latency_s


def _trained_weights(geometry: LlavaGeometry, plan: Plan) -> float:
    """Of the device that has most of them: one of the first stage, which holds embedding, tower and projector."""
    language, tower, frozen = geometry.language, geometry.tower, plan.frozen
    table = language.vocabulary * language.hidden
    layers = language.parameters - table * (1 if language.tied_embeddings else 2)
    found = frozen.adapter_parameters(geometry, "language_model") / plan.pipeline
    if not frozen.language_model:
        with_head = plan.pipeline == 1 and not language.tied_embeddings  # one of its own
        found += layers / plan.pipeline + table * (2 if with_head else 1)
    if not frozen.vision_tower:
        block = 4 * tower.hidden**2 + 2 * tower.hidden * tower.ffn_hidden
        found += tower.running_layers * block + 3 * tower.patch_px**2 * tower.hidden
    if not frozen.projector:
        found += tower.hidden * language.hidden
        found += language.hidden**2 if geometry.projector_type == "mlp2x_gelu" else 0
    found += sum(frozen.adapter_parameters(geometry, part) for part in ("vision_tower", "projector"))
    return found / plan.tensor


def _optimizer(weights: float, plan: Plan, card: Card) -> float:
    """Seconds of AdamW: limited by memory.

    Bytes per weight: gradient read for the norm and for the step (8), both moments and the fp32 weight read and written
    (24), and the 16-bit weight written (2).
    """
    shared = max(plan.fully_sharded, plan.data * plan.context if plan.distributed_optimizer else 1)
    bytes_each = 32 if plan.precision == "fp32" else 34
    return weights / shared * bytes_each / (card.memory_bandwidth * MEMORY_SHARE)
