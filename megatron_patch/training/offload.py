"""OPTIMIZER_OFFLOAD: how much of Adam's state goes to host memory."""

from megatron_patch import device
from megatron_patch.errors import UserError
from megatron_patch.geometry import LanguageGeometry

WORKING_SHARE = 0.35  # of the device's memory, kept for activations, buffers of communication and fragmentation
STATE_BYTES = 12  # per trained parameter: fp32 master weight and both moments
RESIDENT_BYTES = 2 + 4  # per parameter: half-precision weight and fp32 gradient


def offload_fraction(parameters: int, data_parallel: int, device_bytes: int) -> float:
    """Share of the optimizer state that does not fit on the device, in steps of 0.05.

    Args:
        parameters: of one tensor- and pipeline-parallel rank.
        data_parallel: ranks that share the state (distributed optimizer).
        device_bytes: memory of the device.
    """
    state = parameters * STATE_BYTES / data_parallel
    room = device_bytes * (1 - WORKING_SHARE) - parameters * RESIDENT_BYTES
    missing = min(max((state - room) / state, 0.0), 1.0)
    return min(-(-missing // 0.05) * 0.05, 1.0)


def offload_arguments(
    policy: str, language: LanguageGeometry, tensor: int, pipeline: int, world_size: int, context: int
) -> list[str]:
    """Megatron's arguments for `false`, `static` (all of the state) or `auto` (what does not fit).

    Raises:
        UserError: the accelerator has no such offload, or it needs Transformer Engine.
    """
    if policy == "false":
        return []
    here = device.backend()
    why = here.REFUSED.get(f"OPTIMIZER_OFFLOAD={policy}")
    if why is not None:
        raise UserError(f"OPTIMIZER_OFFLOAD is {policy}, which {why}; pass false")
    fraction = 1.0
    if policy == "auto":
        model_parallel = tensor * pipeline
        fraction = offload_fraction(
            language.parameters // model_parallel, max(1, world_size // (model_parallel * context)), here.memory()
        )
    arguments = here.optimizer_offload(fraction) if fraction > 0.0 else []
    if "--optimizer-cpu-offload" in arguments and not device.have_transformer_engine():
        # hybrid_optimizer.py:369 (megatron-core 0.19.2) asks the states of torch's Adam for a `master_param`
        raise UserError(
            f"OPTIMIZER_OFFLOAD is {policy}, and without Transformer Engine no run resumes with it; install that, or "
            "pass false"
        )
    return arguments
