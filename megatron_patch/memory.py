"""Bytes that a run needs: of a checkpoint, and of each rank's memory.

Counted from the numbers of the model; what torch, its allocator and the libraries hold beside it is not.
"""

from megatron_patch.geometry import LlavaGeometry
from megatron_patch.step_flop import Frozen

# Bytes of a parameter in memory and in a checkpoint, by PR: fp8 has its weights in 16 bits, too.
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
# Of Adam for a trained one: two moments in 32 bits, and a copy of the weight in 32 bits where it has fewer.
ADAM_BYTES = {"fp32": 8, "bf16": 12, "fp16": 12, "fp8": 12}


def parameters(geometry: LlavaGeometry) -> tuple[int, int, int]:
    """Of language model, vision tower (as far as it runs) and projector."""
    return geometry.language.parameters, geometry.tower.parameters, geometry.projector_parameters


def trained_parameters(geometry: LlavaGeometry, frozen: Frozen) -> int:
    """Those that an optimizer step changes."""
    kept = (frozen.language_model, frozen.vision_tower, frozen.projector)
    return sum(count for count, is_frozen in zip(parameters(geometry), kept, strict=True) if not is_frozen)


def checkpoint_bytes(geometry: LlavaGeometry, frozen: Frozen, precision: str) -> int:
    """Of a checkpoint with its optimizer state.  precision: PR of the launchers."""
    weights = BYTES[precision] * sum(parameters(geometry))
    return weights + ADAM_BYTES[precision] * trained_parameters(geometry, frozen)
