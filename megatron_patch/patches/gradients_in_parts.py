"""megatron-core 0.19.2, core/distributed/distributed_data_parallel.py:493: gradients in 16 bits are added by a copy.

torch adds a bf16 tensor to an fp32 one on a CPU by way of a whole fp32 copy: 108 MiB more at the peak, for the
embedding of a vocabulary of 49,152 and 576 channels.  Part by part the copy is small and stays in the cache.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor


def apply() -> None:
    """Have the hook of a parameter's gradient add it in parts."""
    module = "megatron.core.distributed.distributed_data_parallel"
    symbol = "DistributedDataParallel._make_backward_post_hook"
    touch_points.wrap(module, symbol, "patches.gradients_in_parts", _adding_in_parts)


def _adding_in_parts(make_hook: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_patch.kernels import gradient_buffer

    def make(model: Any, parameter: "Tensor") -> Callable[..., None]:
        hook = make_hook(model, parameter)

        def add_and_go_on(*unused: Any) -> None:
            added, twice = parameter.grad_added_to_main_grad, getattr(parameter, "zero_out_wgrad", False)
            gradient = parameter.grad
            if gradient is None or (added and not twice):
                hook(*unused)
                return
            gradient_buffer.add(parameter.main_grad, gradient, gradient_buffer.begin(parameter.main_grad))
            parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = True, False  # nothing is left to add
            hook(*unused)
            parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = added, twice

        return add_and_go_on

    return make
