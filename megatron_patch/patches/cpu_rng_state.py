"""megatron-core 0.19.2, core/tensor_parallel/random.py:135: _set_cuda_rng_state defers its work to CUDA's start.

Without CUDA that start never comes, so the tracker's fork() would leave dropout and initialisation in the wrong state.
Remove when test_rng_tracker_restores_the_state passes without this file.
"""

TARGETS = (("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"),)


def applies(backend: str) -> bool:
    """Only without CUDA."""
    return backend == "cpu"


def apply() -> None:
    """Set the CPU generator's state instead."""
    import logging

    import torch
    from megatron.core.tensor_parallel import random

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        del device, graph_safe
        torch.set_rng_state(new_state)

    random._set_cuda_rng_state = set_rng_state
    # fork() warns whenever "the CPU state changed within a GPU context"; here the two are one
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
