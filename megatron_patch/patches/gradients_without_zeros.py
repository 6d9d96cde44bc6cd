"""megatron-core 0.19.2, core/distributed/param_and_grad_buffer.py:1611: gradients are added to zeros.

Each iteration fills the buffer, as large as the weights in fp32, with zeros, to which the first micro-batch adds its
gradients.  Here those are written (kernels/gradient_buffer.py), and zeros only where no gradient came before the
buffer is read.  Where reductions overlap with the backward pass everything stays as it is, and beside Transformer
Engine, whose products add to the buffer themselves.
"""

from collections.abc import Callable
from typing import Any

from megatron_patch.kernels import gradient_buffer
from megatron_patch.patches import touch_points

WHO = "patches.gradients_without_zeros"


def apply() -> None:
    """Have an iteration forget the gradients of the last, and fill what got none before ranks exchange them."""
    from megatron.core import fp8_utils

    if fp8_utils.HAVE_TE:
        return
    module = "megatron.core.distributed.param_and_grad_buffer"
    touch_points.wrap(module, "_ParamAndGradBuffer.reset", WHO, _forgetting)
    touch_points.wrap(module, "_ParamAndGradBucketGroup.start_grad_sync", WHO, _filling)


def _forgetting(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    def forget(self: Any) -> None:
        if self.ddp_config.overlap_grad_reduce or self.extra_main_grads:
            reset(self)
            return
        for parameter in self.params:
            gradient_buffer.empty(parameter.main_grad)

    return forget


def _filling(start: Callable[..., Any]) -> Callable[..., Any]:
    def fill_and_start(self: Any, *args: Any, **kwargs: Any) -> Any:
        for parameter in self.params:
            gradient_buffer.fill(parameter.main_grad)
        return start(self, *args, **kwargs)

    return fill_and_start
