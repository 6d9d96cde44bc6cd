"""Keys and values of the tokens so far, so that each new token costs one position only.

Not Megatron's StaticInferenceContext: it stores keys before their rotary embedding, and so rotates all of them again
for each token and layer; its positions are those of the row, padding included; and no decode step has a mask there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """One batch, all layers of this process.  B rows, S tokens of this call, T tokens so far, L of each row at most.

    Args:
        real: bool [B, S] of the prompts, which stand at the right: False at the padding before the shorter ones.
        most_new: tokens behind the prompts, at most.
    """

    def __init__(self, real: Tensor, most_new: int) -> None:
        self._real = F.pad(real, (0, most_new), value=True)  # [B, L]
        self._positions = (self._real.cumsum(1) - 1).clamp(min=0)
        self._is_padded = not bool(real.all())
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = 0  # T before this call
        self._mask: Tensor | None = None  # of this call

    @property
    def most_tokens(self) -> int:
        """L."""
        return self._real.shape[1]

    def begin(self, count: int) -> Tensor:
        """S tokens are to follow in each row -> their positions int64 [S, B], from 0 at each row's first token."""
        end = self._length + count
        self._mask = None
        if self._is_padded:
            self._mask = self._real[:, None, None, :end]
            if count > 1:
                now = torch.arange(self._length, end, device=self._real.device)[:, None]
                then = torch.arange(end, device=self._real.device)
                # padding sees itself: without any key it would become NaN, which no mask can take back
                self._mask = (self._mask & (then <= now)) | (then == now)
        return self._positions[:, self._length : end].T

    def end(self, count: int) -> None:
        """They have gone through all layers."""
        self._length += count

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [S, B, heads, d], key and value [S, B, groups, d] of these tokens -> [S, B, heads * d]."""
        keys, values = self._append(layer, key, value)
        count, rows, heads, width = query.shape
        groups = key.shape[2]
        if count == 1:  # the heads of a group become queries of its one key head, and keys need not be repeated
            query = query.view(rows, groups, heads // groups, width)
            context = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask, scale=scale)
            return context.reshape(1, rows, heads * width)
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            *(states.repeat_interleave(heads // groups, 1) for states in (keys, values)),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=scale,
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[S, B, groups, d] -> all so far [B, groups, T + S, d]."""
        count, rows, groups, width = key.shape
        if layer not in self._layers:
            room = (rows, groups, self.most_tokens, width)
            self._layers[layer] = key.new_empty(room), value.new_empty(room)
        stored = []
        for states, new in zip(self._layers[layer], (key, value), strict=True):
            states[:, :, self._length : self._length + count] = new.permute(1, 2, 0, 3)
            stored.append(states[:, :, : self._length + count])
        return stored[0], stored[1]
