"""megatron-core 0.19.2, core/utils.py:1337: clipping copies every gradient twice.

Without Transformer Engine and Apex the gradients are clipped by `dst.copy_(src * scale)`, where both are one tensor: a
temporary, and three passes over memory more than scaling in place.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor


def apply() -> None:
    """Scale gradients in place."""
    module = "megatron.core.optimizer.clip_grads"
    touch_points.wrap(module, "multi_tensor_scale_impl", "patches.scale_in_place", _in_place)


def _in_place(multi_tensor_scale: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from megatron.core.utils import local_multi_tensor_scale

    if multi_tensor_scale is not local_multi_tensor_scale:
        return multi_tensor_scale

    def scale_in_place(chunk_size: int, noop_flag: "Tensor", tensor_lists: list[list["Tensor"]], scale: float) -> None:
        """As amp_C.multi_tensor_scale: the second list becomes the first times `scale`."""
        source, target = tensor_lists
        if source is target:  # as clipping asks
            torch._foreach_mul_(target, scale)
        else:
            multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale)

    return scale_in_place
