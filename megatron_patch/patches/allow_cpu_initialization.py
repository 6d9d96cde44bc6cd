"""megatron-core 0.19.2, training/initialize.py:66: `assert torch.cuda.is_available()` unless allow_no_cuda is passed.

pretrain() does not pass it.  Needed on a machine without CUDA, where torch.cuda.is_available() stays False.
"""

import functools

from megatron_patch.patches import touch_points


def apply() -> None:
    """Pass allow_no_cuda=True."""
    touch_points.wrap(
        touch_points.LOOP,
        "initialize_megatron",
        "patches.allow_cpu_initialization",
        lambda initialize: functools.partial(initialize, allow_no_cuda=True),
    )
