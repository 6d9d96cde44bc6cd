"""megatron-core 0.19.2, core/distributed/distributed_data_parallel.py:475: no parameter says what its hook asks of it.

An operator that has added a gradient to Megatron's buffer hands none on to torch; the hook runs all the same.  Where
reductions overlap with the backward pass it refuses a parameter without a gradient, and the operator must not.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor


def apply() -> None:
    """Mark each parameter that has a buffer: `hook_needs_no_gradient`."""
    module = "megatron.core.distributed.distributed_data_parallel"
    touch_points.wrap(
        module, "DistributedDataParallel._make_backward_post_hook", "patches.hooks_without_gradients", _noting
    )


def _noting(make_hook: Callable[..., Any]) -> Callable[..., Any]:
    def make(model: Any, parameter: "Tensor") -> Callable[..., None]:
        parameter.hook_needs_no_gradient = not model.ddp_config.overlap_grad_reduce
        return make_hook(model, parameter)

    return make
