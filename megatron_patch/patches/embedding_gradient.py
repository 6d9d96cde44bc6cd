"""megatron-core 0.19.2, core/tensor_parallel/layers.py:358: an embedding's gradient is as large as its weight.

torch makes a tensor of zeros of it, of which a batch fills some hundred rows, and Megatron adds all of it to its
buffer: 108 MiB at the peak of a step, and five passes over them, for a vocabulary of 49,152 and 576 channels in fp32.
Here the rows go to the buffer themselves.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor


def apply() -> None:
    """Add the gradient of each token to its row."""
    module = "megatron.core.tensor_parallel.layers"
    touch_points.wrap(module, "VocabParallelEmbedding.forward", "patches.embedding_gradient", _into_rows)


def _into_rows(forward: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
    import torch
    import torch.nn.functional as F

    from megatron_patch.kernels import gradient_buffer

    class Lookup(torch.autograd.Function):
        """tokens [B, S], weight [V, H] -> [B, S, H]."""

        @staticmethod
        def forward(ctx: Any, tokens: "Tensor", weight: "Tensor") -> "Tensor":
            ctx.save_for_backward(tokens)
            ctx.weight = weight
            return F.embedding(tokens, weight)

        @staticmethod
        def backward(ctx: Any, gradient: "Tensor") -> tuple[None, None]:
            (tokens,) = ctx.saved_tensors
            buffer = gradient_buffer.fill(ctx.weight.main_grad)
            buffer.index_add_(0, tokens.flatten(), gradient.flatten(0, -2).to(buffer.dtype))
            return None, None  # the hook of the weight runs all the same, and finds nothing to add

    def look_up(self: Any, tokens: "Tensor") -> "Tensor":
        in_parts = self.tp_group.size() > 1 or self.gtp_remat_size > 1 or self.reduce_scatter_embeddings
        if in_parts or not getattr(self.weight, "hook_needs_no_gradient", False):
            return forward(self, tokens)
        return Lookup.apply(tokens, self.weight)

    return look_up
