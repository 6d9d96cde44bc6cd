"""What a device can do at best, as its maker says, and what training reaches of it.  Data.

Speeds are of dense matrix products, bandwidths in one direction and per device.  The share of the peak that training
reaches is one number per precision for all GPUs, from one published row each (EFFICIENCY); the other published rows are
predictions (toolkits/benchmark/step_time.py --published).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Shares of the peak that matrix products reach within a training step, everything between them included.
# bf16: Qwen2.5-7B, LoRA on a frozen model, one H100: 14,110 tokens/s.
# fp8: Llama-3-8B, 8 H100: 14,451 tokens/s and GPU (Megatron-Bridge, performance summary, container 25.11).
# fp32: no row is known to us; taken as bf16.
EFFICIENCY = {"bf16": 0.436, "fp16": 0.436, "fp32": 0.436, "fp8": 0.40}


@dataclass(frozen=True)
class Card:
    """One device and its neighbours."""

    name: str
    peak: Mapping[str, float]  # FLOP/s by precision
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    node_bandwidth: float  # bytes/s to the other devices of a node
    network_bandwidth: float  # bytes/s to other nodes, this device's share
    devices_per_node: int = 8
    node_latency_s: float = 10e-6  # of one hop of a collective within a node
    network_latency_s: float = 25e-6
    cores: int = 12  # CPU cores per device
    efficiency: Mapping[str, float] = field(default_factory=lambda: EFFICIENCY)
    # On a CPU: processes share these cores, and each layer of a micro-batch costs the interpreter's time as well.
    shared_cores: int | None = None
    layer_s: float = 0.0  # per decoder layer and micro-batch
    step_s: float = 0.0  # per step: the loop's own

    def rate(self, precision: str) -> float:
        """FLOP/s of one device in training."""
        return self.peak[precision] * self.efficiency[precision]


GIGA, TERA = 1e9, 1e12


def _peak(bf16: float, fp8: float | None, fp32: float) -> dict[str, float]:
    """TFLOP/s -> FLOP/s by precision."""
    return {"bf16": bf16 * TERA, "fp16": bf16 * TERA, "fp32": fp32 * TERA} | ({"fp8": fp8 * TERA} if fp8 else {})


_HOPPER = _peak(989.4, 1978.9, 66.9)
# Data sheets; node: NVLink or PCIe x16; network: one adapter per GPU of 400 (Hopper), 200 Gb/s (others).
CARDS = {
    card.name: card
    for card in (
        Card("H200", _HOPPER, 141 * GIGA, 4.8 * TERA, 450 * GIGA, 50 * GIGA),
        Card("H100", _HOPPER, 80 * GIGA, 3.35 * TERA, 450 * GIGA, 50 * GIGA),
        Card("H100-NVL", _peak(835.5, 1670.5, 60.0), 94 * GIGA, 3.9 * TERA, 64 * GIGA, 50 * GIGA),
        Card("H800", _HOPPER, 80 * GIGA, 3.35 * TERA, 200 * GIGA, 50 * GIGA),
        Card("A100-80", _peak(312.0, None, 19.5), 80 * GIGA, 2.039 * TERA, 300 * GIGA, 25 * GIGA),
        Card("A100-40", _peak(312.0, None, 19.5), 40 * GIGA, 1.555 * TERA, 300 * GIGA, 25 * GIGA),
        Card("L40S", _peak(362.0, 733.0, 91.6), 48 * GIGA, 0.864 * TERA, 32 * GIGA, 25 * GIGA),
        Card("RTX4090", _peak(165.2, 330.3, 82.6), 24 * GIGA, 1.008 * TERA, 20 * GIGA, 12.5 * GIGA),
    )
}


def cpu_card(
    flops: float,
    memory_bandwidth: float,
    bandwidth: float,
    latency_s: float,
    cores: int,
    layer_s: float = 0.0,
    step_s: float = 0.0,
    memory_bytes: float = 16 * GIGA,
) -> Card:
    """A CPU as measured: processes of one thread each, over gloo.

    Args:
        flops: FLOP/s that one process reaches in training.
        memory_bandwidth: bytes/s of one process.
        bandwidth: bytes/s of gloo between two processes.
        latency_s: of one hop of gloo's collectives.
        cores: that all processes share.
        layer_s: seconds of the interpreter per decoder layer and micro-batch.
        step_s: seconds per step beside the model's.
    """
    return Card(
        "cpu",
        dict.fromkeys(("fp32", "bf16"), flops),
        memory_bytes,
        memory_bandwidth,
        bandwidth,
        bandwidth,
        devices_per_node=4096,
        node_latency_s=latency_s,
        network_latency_s=latency_s,
        cores=1,
        efficiency=dict.fromkeys(("fp32", "bf16"), 1.0),
        shared_cores=cores,
        layer_s=layer_s,
        step_s=step_s,
    )
