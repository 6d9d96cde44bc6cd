"""megatron-core 0.19.2, core/tensor_parallel/random.py:135: _set_cuda_rng_state defers its work to CUDA's start.

Without CUDA that start never comes, so the tracker's fork() would leave dropout and initialisation in the wrong state.
"""

from megatron_patch.patches import touch_points

RANDOM = "megatron.core.tensor_parallel.random"


def apply() -> None:
    """Set the CPU generator's state instead."""
    import logging

    import torch

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        del device, graph_safe
        torch.set_rng_state(new_state)

    touch_points.replace(RANDOM, "_set_cuda_rng_state", "patches.cpu_rng_state", set_rng_state)
    # fork() warns whenever "the CPU state changed within a GPU context"; here the two are one
    logging.getLogger(RANDOM).setLevel(logging.ERROR)
