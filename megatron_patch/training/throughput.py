"""What was done per second: samples, tokens, and the floating-point operations (FLOP) that step_flop.py counts."""

import dataclasses

from megatron_patch.step_flop import Work


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What was done per second."""

    samples: float
    samples_per_device: float
    tokens: float
    labels: float
    flop_per_device: float

    @classmethod
    def of(cls, work: Work, flop: int, seconds: float, devices: int) -> "Throughput":
        """`work` and `flop` of all devices in so many seconds."""
        samples = work.records / seconds
        return cls(samples, samples / devices, work.tokens / seconds, work.labels / seconds, flop / seconds / devices)

    def sentence(self) -> str:
        """For the log."""
        return (
            f"samples/s: {self.samples:.2f} | per device: {self.samples_per_device:.2f} | "
            f"tokens/s: {self.tokens:.0f} | trained: {self.labels:.0f} | "
            f"TFLOP/s per device: {self.flop_per_device / 1e12:.4g}"
        )

    def scalars(self) -> dict[str, float]:
        """By name, for TensorBoard and summary.json."""
        return {
            "samples per second": self.samples,
            "samples per second and device": self.samples_per_device,
            "tokens per second": self.tokens,
            "trained tokens per second": self.labels,
            "TFLOP per second and device": self.flop_per_device / 1e12,
        }
