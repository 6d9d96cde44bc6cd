"""megatron-core 0.19.2, core/utils.py:1330: the norm of a large gradient comes out too small on a CPU.

torch.norm sums the squares of a whole tensor in 32 bits, one after the other in each lane of the processor: 0.16% are
lost for the embedding of a vocabulary of 49,152 and 576 channels, 1.3% for one of 32,000 and 4,096.  So clipping would
depend on how the optimizer's shards cut the gradients.  Here 32 bits sum parts, and 64 bits the parts: within 1e-6.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor

PART = 1 << 18  # elements, without the compiled kernel; a quarter of it takes half as long again


def apply() -> None:
    """Sum the squares of gradients in parts."""
    touch_points.wrap("megatron.core.optimizer.clip_grads", "l2_norm_impl", "patches.gradient_norm", _in_parts)


def _squares(tensor: "Tensor") -> "Tensor":
    """Of parts of a tensor [N]: float32 [parts]."""
    import torch

    from megatron_patch import kernels

    found = kernels.squares(tensor)
    if found is not None:
        return found
    return torch.stack([torch.dot(part, part) for part in map(torch.Tensor.float, tensor.split(PART))])


def _in_parts(l2_norm: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from megatron.core.utils import local_multi_tensor_l2_norm

    if l2_norm is not local_multi_tensor_l2_norm:  # Transformer Engine's or Apex's
        return l2_norm

    def norm(chunk_size: int, noop_flag: "Tensor", tensor_lists: list[list["Tensor"]], *asked: Any) -> tuple:
        """As amp_C.multi_tensor_l2norm without norms of each tensor: float32 [1] over all of the lists, and None."""
        squares = torch.cat([_squares(tensor.reshape(-1)) for tensors in tensor_lists for tensor in tensors])
        return squares.double().sum().sqrt().float().view(1), None

    return norm
