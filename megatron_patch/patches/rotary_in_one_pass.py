"""megatron-core 0.19.2, core/models/common/embeddings/rope_utils.py:92: rotary positions in ten operators.

Without Transformer Engine's kernel every layer takes sines and cosines of the same angles again, negates, joins and
copies whole queries and keys, and does so record by record in a packed row.  Here the angles are looked up once per
micro-batch, and a turn writes its result once.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor


def apply() -> None:
    """Have attention turn queries and keys here, where no kernel of Transformer Engine does it."""
    module = "megatron.core.transformer.attention"
    touch_points.wrap(module, "apply_rotary_pos_emb", "patches.rotary_in_one_pass", _in_one_pass)


def _in_one_pass(apply_rotary_pos_emb: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    from megatron_patch import kernels

    class Rotation(torch.autograd.Function):
        """states [S, ..., heads, d], cosine and sine [S, ..., 1, d / 2]: halves of a head turned against each other."""

        @staticmethod
        def forward(ctx: Any, states: "Tensor", cosine: "Tensor", sine: "Tensor") -> "Tensor":
            ctx.save_for_backward(cosine, sine)
            return turned(states, cosine, sine, 1)

        @staticmethod
        def backward(ctx: Any, gradient: "Tensor") -> tuple["Tensor", None, None]:
            return turned(gradient, *ctx.saved_tensors, -1), None, None

    def turned(states: "Tensor", cosine: "Tensor", sine: "Tensor", direction: int) -> "Tensor":
        records = states if states.dim() == 4 else states[:, None]  # a packed row is one record
        compiled = kernels.rotate(records, cosine, sine, direction)
        if compiled is not None:
            return compiled.view(states.shape)
        found = torch.empty(states.shape, dtype=states.dtype, device=states.device)
        (first, second), (new_first, new_second) = states.chunk(2, -1), found.chunk(2, -1)
        torch.mul(first, cosine, out=new_first).addcmul_(second, sine, value=-direction)
        torch.mul(second, cosine, out=new_second).addcmul_(first, sine, value=direction)
        return found

    @functools.lru_cache(maxsize=1)  # all layers of a micro-batch ask alike
    def of_packed(angles: "Tensor", cu_seqlens: "Tensor", size: int, rank: int) -> "Tensor":
        """Angles of each token of a packed row, whose positions start anew in each record."""
        lengths = ((cu_seqlens[1:] - cu_seqlens[:-1]) // size).tolist()
        states = angles.new_empty(sum(lengths), 0)
        parts = [_get_thd_freqs_on_this_cp_rank(rank, size, part, angles) for part in states.split(lengths)]
        return torch.cat(parts)[:, 0]

    def apply_in_one_pass(
        t: "Tensor",
        freqs: "Tensor",
        config: Any,
        cu_seqlens: "Tensor | None" = None,
        mscale: float = 1.0,
        cp_group: Any = None,
        mla_rotary_interleaved: bool = False,
    ) -> "Tensor":
        """t [S, B, heads, d], or of a packed row [T, heads, d]; freqs [S or longest record, 1, 1, d], angles."""
        of_others = config.apply_rope_fusion or config.rotary_interleaved or mla_rotary_interleaved
        if of_others or mscale != 1.0 or config.mrope_section is not None or freqs.shape[-1] != t.shape[-1]:
            return apply_rotary_pos_emb(t, freqs, config, cu_seqlens, mscale, cp_group, mla_rotary_interleaved)
        if cu_seqlens is not None:
            freqs = of_packed(freqs, cu_seqlens, cp_group.size(), cp_group.rank())
        return Rotation.apply(t, *kernels.rotation_tables(freqs, t.dtype))

    return apply_in_one_pass
