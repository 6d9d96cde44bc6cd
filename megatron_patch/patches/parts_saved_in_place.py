"""megatron-core 0.19.2, core/dist_checkpointing/strategies/filesystem_async.py:148: a save copies parts of tensors.

torch.save() writes the whole storage of what it is given, so every tensor that is a part of another is copied first:
the halves of each gated MLP with their optimizer state, all that lies in buffers of the distributed optimizer.
Training waits for it, and the copies are held together until all is written.  In a CPU's memory a part can have a
storage of its own without being moved.  An asynchronous save copies afterwards, once (async_save_copies.py).
"""

from collections.abc import Callable
from typing import Any

from megatron_patch.patches import touch_points


def apply() -> None:
    """Hand parts to the writer as tensors of their own."""
    module = "megatron.core.dist_checkpointing.strategies.torch"
    touch_points.wrap(module, "MCoreSavePlanner.transform_object", "patches.parts_saved_in_place", _of_their_own)


def _of_their_own(transform_object: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def transform(self: Any, write_item: Any, object: Any) -> Any:  # torch's name, passed by name as well
        found = transform_object(self, write_item, object)
        if not isinstance(found, torch.Tensor) or not found.is_cpu or not found.is_contiguous() or not found.numel():
            return found
        as_bytes = found.detach().view(-1).view(torch.uint8)
        return torch.from_numpy(as_bytes.numpy()).view(found.dtype).view(found.shape)

    return transform
