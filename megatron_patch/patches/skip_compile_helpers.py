"""megatron-core 0.19.2, core/datasets/utils.py:20: compile_helpers() runs `make` in a folder without a Makefile.

The wheel ships the compiled helpers and no Makefile, so pretrain() would exit with 1 on every machine, GPUs included.
Our data do not use these helpers at all.  Remove when the wheel ships the Makefile or checks for the compiled file.
"""

TARGETS = (("megatron.core.datasets.utils", "compile_helpers"),)


def applies(backend: str) -> bool:
    """Everywhere: this is not about the device."""
    del backend
    return True


def apply() -> None:
    """Compile nothing."""
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None
