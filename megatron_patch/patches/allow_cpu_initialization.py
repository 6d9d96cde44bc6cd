"""megatron-core 0.19.2, training/initialize.py:66: `assert torch.cuda.is_available()` unless allow_no_cuda is passed.

pretrain() does not pass it.  Needed on a machine without CUDA, where torch.cuda.is_available() stays False.
Remove when pretrain() takes the switch: then tests/training passes without this file.
"""

import functools

TARGETS = (("megatron.training.training", "initialize_megatron"),)


def applies(backend: str) -> bool:
    """Only without CUDA."""
    return backend == "cpu"


def apply() -> None:
    """Pass allow_no_cuda=True."""
    from megatron.training import training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
