"""Published throughput, and what the model of step_time.py says of the same run.

Two rows set the one efficiency of their precision (device_cards.py); the others are predictions.  An older program
than today's Megatron reaches less of the card: NeVA's first row says how much less, for all of NeVA's.  What a source
does not say stands in `assumed`.
"""

from dataclasses import dataclass

from megatron_patch.device_cards import CARDS
from megatron_patch.length_mix import LengthMix, even
from megatron_patch.step_flop import Frozen
from megatron_patch.step_time import Plan, predict
from toolkits.benchmark.known_models import llava

FULL, STAGE_1, STAGE_2 = Frozen(False, True, True), Frozen(True, True), Frozen(vision_tower=True)
LORA = STAGE_1  # as of a model that is frozen: gradients of inputs alone, and next to no weights
MEGATRON = frozenset({"tensor", "context", "data"})  # Megatron-Bridge's recipes hide all of it
TEXT_8K, TEXT_4K = even(8192, 0, 1.0), even(4096, 0, 1.0)


@dataclass(frozen=True)
class Row:
    """One published figure."""

    name: str
    source: str
    published: float
    unit: str  # "tokens" or "samples", per second and GPU
    model: str
    card: str
    plan: Plan
    mix: LengthMix
    side_px: int = 336
    assumed: str = ""
    calibrates: bool = False
    share_of: str = ""  # the row that says which share of the prediction this row's program reaches

    def predicted(self) -> float:
        """In the row's unit."""
        step = predict(llava(self.model, self.side_px), self.plan, CARDS[self.card], self.mix)
        found = step.tokens_per_second_and_device if self.unit == "tokens" else step.samples_per_second / step.devices
        if not self.share_of:
            return found
        first = next(row for row in ROWS if row.name == self.share_of)
        return found * first.published / first.predicted()


BRIDGE = "Megatron-Bridge, performance summary"
NEVA = "NVIDIA, NeVA 7B"
NEVA_FIRST = "NeVA 7B, stage 1, 256 + 40, H100 NVL, bf16"
LLAVA = "LLaVA's README: 3.5 and 10 hours on 8 A100 of 80 GB"


def _text(global_batch: int, **layout: object) -> Plan:
    """Megatron-Bridge's fp8 pretraining rows on DGX-H100, 8,192 tokens."""
    return Plan(
        global_batch, precision="fp8", frozen=FULL, distributed_optimizer=True, hidden=MEGATRON, longest=8192, **layout
    )


ROWS = (
    Row(
        "Qwen2.5-7B, LoRA, 1 H100, bf16",
        "NeMo AutoModel, performance summary",
        *(14110, "tokens", "qwen2.5-7b", "H100"),
        Plan(32, frozen=LORA, longest=4096),
        TEXT_4K,
        calibrates=True,
    ),
    Row(
        "Llama-3-8B, 8 H100, fp8",
        f"{BRIDGE}, 25.11",
        *(14451, "tokens", "llama3-8b", "H100"),
        _text(128, data=8),
        TEXT_8K,
        calibrates=True,
        assumed="weights whole on every GPU in place of FSDP",
    ),
    Row(
        "Llama-3-70B, 64 H100, TP4 PP8 VP5, 128 a step",
        f"{BRIDGE}, 25.11",
        *(1602, "tokens", "llama3-70b", "H100"),
        _text(128, tensor=4, pipeline=8, virtual_stages=5, data=2),
        TEXT_8K,
    ),
    Row(
        "Llama-3-70B, 64 H100, TP4 PP8 VP5, 256 a step",
        f"{BRIDGE}, 26.02",
        *(1621, "tokens", "llama3-70b", "H100"),
        _text(256, tensor=4, pipeline=8, virtual_stages=5, data=2),
        TEXT_8K,
    ),
    Row(
        "Llama-3.1-405B, 1,024 H100, TP8 PP8 VP8 CP2, 512",
        f"{BRIDGE}, 25.11",
        *(292, "tokens", "llama3-405b", "H100"),
        _text(512, tensor=8, pipeline=8, virtual_stages=8, context=2, data=8),
        TEXT_8K,
    ),
    Row(
        "Llama-3.1-405B, 1,024 H100, TP8 PP8 VP8 CP2, 1,536",
        f"{BRIDGE}, 26.02",
        *(311, "tokens", "llama3-405b", "H100"),
        _text(1536, tensor=8, pipeline=8, virtual_stages=8, context=2, data=8),
        TEXT_8K,
    ),
    Row(
        "Llama-3-70B, LoRA, 8 H100, TP2 PP4 VP10, bf16",
        "NeMo AutoModel, performance summary (PyTorch, no Megatron)",
        *(608, "tokens", "llama3-70b", "H100"),
        Plan(32, tensor=2, pipeline=4, virtual_stages=10, frozen=LORA, longest=4096),
        TEXT_4K,
        assumed="nothing recomputed",
    ),
    Row(
        "LLaVA 7B, stage 1, 576 + 40, 8 A100, bf16",
        LLAVA,
        *(5.54, "samples", "llama-7b", "A100-80"),
        Plan(256, micro_batch=32, data=8, frozen=STAGE_1, recompute="full"),
        even(40, 1, 0.9),
        assumed="layers recomputed, as LLaVA's scripts do",
    ),
    Row(
        "LLaVA 7B, stage 2, 576 + 300, 8 A100, bf16",
        LLAVA,
        *(2.31, "samples", "llama-7b", "A100-80"),
        Plan(128, micro_batch=16, data=8, frozen=STAGE_2, recompute="full"),
        even(300),
        assumed="layers recomputed, as LLaVA's scripts do; weights whole on every GPU in place of ZeRO-3",
    ),
    Row(
        NEVA_FIRST,
        NEVA,
        *(29.19, "samples", "llama-7b", "H100-NVL"),
        Plan(256, micro_batch=32, data=8, frozen=STAGE_1),
        even(40, 1, 0.9),
        side_px=224,
        assumed="no padding, TP1, nothing recomputed",
    ),
    Row(
        "NeVA 7B, stage 1, 256 + 40, H100 NVL, fp8",
        NEVA,
        *(52.52, "samples", "llama-7b", "H100-NVL"),
        Plan(256, micro_batch=32, data=8, frozen=STAGE_1, precision="fp8"),
        even(40, 1, 0.9),
        side_px=224,
        share_of=NEVA_FIRST,
        assumed="no padding, TP1, nothing recomputed",
    ),
    Row(
        "NeVA 7B, stage 1, 256 + 40, H800, bf16",
        NEVA,
        *(24.24, "samples", "llama-7b", "H800"),
        Plan(256, micro_batch=32, data=8, frozen=STAGE_1),
        even(40, 1, 0.9),
        side_px=224,
        share_of=NEVA_FIRST,
        assumed="no padding, TP1, nothing recomputed",
    ),
    Row(
        "NeVA 7B, stage 2, 256 + 300, H100 NVL, TP2, bf16",
        NEVA,
        *(6.5, "samples", "llama-7b", "H100-NVL"),
        Plan(128, micro_batch=8, tensor=2, data=4, frozen=STAGE_2),
        even(300),
        side_px=224,
        share_of=NEVA_FIRST,
        assumed="no padding, 8 GPUs on PCIe, nothing recomputed",
    ),
    Row(
        "NeVA 7B, stage 2, 256 + 300, H100 NVL, TP2, fp8",
        NEVA,
        *(7.5, "samples", "llama-7b", "H100-NVL"),
        Plan(128, micro_batch=8, tensor=2, data=4, frozen=STAGE_2, precision="fp8"),
        even(300),
        side_px=224,
        share_of=NEVA_FIRST,
        assumed="no padding, 8 GPUs on PCIe, nothing recomputed",
    ),
    Row(
        "InternVL2.5-8B, all trained, bf16",
        "published for an H100; conditions not known to us",
        *(5544, "tokens", "internlm2.5-7b", "H100"),
        Plan(128, data=8, frozen=FULL, longest=4096, distributed_optimizer=True),
        TEXT_4K,
        assumed="full rows of 4,096, the tower left out, nothing recomputed",
    ),
)
