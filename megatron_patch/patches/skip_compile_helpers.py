"""megatron-core 0.19.2, core/datasets/utils.py:20: compile_helpers() runs `make` in a folder without a Makefile.

The wheel ships the compiled helpers and no Makefile, so pretrain() would exit with 1 on every machine, GPUs included.
Our data do not use these helpers at all.
"""

from megatron_patch.patches import touch_points


def apply() -> None:
    """Compile nothing."""
    where = "megatron.core.datasets.utils", "compile_helpers"
    touch_points.replace(*where, "patches.skip_compile_helpers", lambda: None)
