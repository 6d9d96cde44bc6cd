"""megatron-core 0.19.2, core/tensor_parallel/layers.py:1070: no output layer without Apex where fusion is on.

`gradient_accumulation_fusion` is one setting for two kinds of layers.  Transformer Engine's bring their own kernel for
it; Megatron's need Apex's fused_weight_gradient_mlp_cuda, and without it refuse to be built.  The output layer and a
linear projector are Megatron's even among Transformer Engine's layers, so without Apex these alone do without.
"""

import copy
from collections.abc import Callable

from megatron_patch.patches import touch_points


def apply() -> None:
    """Build Megatron's column-parallel layers without the fusion where its extension does not import."""
    module = "megatron.core.tensor_parallel.layers"
    touch_points.wrap(module, "ColumnParallelLinear.__init__", "patches.unfused_weight_gradients", _without_fusion)


def _without_fusion(build: Callable) -> Callable:
    from megatron.core.tensor_parallel import layers

    def build_unfused(self: object, *args: object, config: object, **kwargs: object) -> None:
        if config.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
            config = copy.copy(config)  # the other layers keep theirs
            config.gradient_accumulation_fusion = False
        build(self, *args, config=config, **kwargs)

    return build_unfused
