"""Attention on a CPU: in a compiled kernel, or by plain matrix products in 32 bits where there is no compiler.

torch's fused kernel does without the [S, S] scores, which saves nothing while they stay in the cache, and its backward
pass in bf16 multiplies in small pieces: at 56 tokens it takes ten times as long as the compiled one, at 577 twice.
"""

import functools

import torch
from torch import Tensor

from megatron_patch import kernels
from megatron_patch.kernels import PackedRow

# Tokens of a record.  The kernel holds two tables of S x S floats in each thread, 8 MiB at its most.
LONGEST_COMPILED = 1024
# The scores of a record are then no larger than its queries, of heads of 64, twice.
LONGEST_MULTIPLIED = 128


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor | None:
    """softmax(query key^T scale) value, of each record and head; None where torch's own is faster.

    query [S, B, heads, d], key and value [S, B, groups, d] -> [S, B, heads * d] in the dtype of the query; the rest as
    kernels.attention() says.
    """
    length = query.shape[0]
    if takes_compiled(length, query.dtype):
        grouped = query.unflatten(2, (key.shape[2], -1))
        return _CompiledAttention.apply(grouped, key, value, scale, causal, None).flatten(2)
    if length <= LONGEST_MULTIPLIED:
        return _MultipliedAttention.apply(query, key, value, scale, causal)
    return None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, cu_seqlens: Tensor) -> Tensor | None:
    """The same of a packed row's records, causal; None where the kernel does not attend them.

    query [T, heads, d], key and value [T, groups, d], cu_seqlens [records + 1] -> [T, heads * d].
    """
    packed = kernels.packed_row(cu_seqlens)
    if not takes_compiled(packed.longest, query.dtype):
        return None
    grouped = query.unflatten(1, (key.shape[1], -1))[:, None]
    return _CompiledAttention.apply(grouped, key[:, None], value[:, None], scale, True, packed)[:, 0].flatten(1)


def takes_compiled(length: int, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel attends records of `length` tokens."""
    return length <= LONGEST_COMPILED and dtype in kernels.DTYPES and kernels.library() is not None


def attention_of_mixed(
    mixed: Tensor,
    groups: int,
    width: int,
    scale: float,
    causal: bool,
    angles: Tensor | None,
    packed: PackedRow | None = None,
) -> Tensor:
    """attention() straight from the projection to queries, keys and values, and its gradient straight back to it.

    Only where takes_compiled().

    Args:
        mixed: [S, B, groups * (heads of a group + 2) * width], of each group its queries, its key and its value.
        groups, width: of keys and values; of a head.
        scale, causal: as kernels.attention() says.
        angles: [S, 1, 1, width] of rotary positions, both halves alike; None: queries and keys are not turned.
        packed: the records of a packed row, whose mixed is [T, 1, ...] and whose S is the longest one's.

    Returns:
        [S, B, heads * width].
    """
    rotation = None if angles is None else kernels.rotation_tables(angles, mixed.dtype)
    mixed = mixed.view(*mixed.shape[:2], groups, -1, width)
    return _MixedAttention.apply(mixed, scale, causal, rotation, packed).flatten(2)


class _MixedAttention(torch.autograd.Function):
    """mixed [S, B, groups, heads of a group + 2, d]."""

    @staticmethod
    def forward(
        ctx,
        mixed: Tensor,
        scale: float,
        causal: bool,
        rotation: tuple[Tensor, Tensor] | None,
        packed: PackedRow | None,
    ) -> Tensor:
        found, logarithms = kernels.attention(*_parts(mixed), scale, causal, rotation, packed)
        ctx.save_for_backward(mixed, logarithms)
        ctx.asked = scale, causal, rotation  # its tables are those of all layers, and no part of the graph
        ctx.packed = packed
        return found

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mixed, logarithms = ctx.saved_tensors
        found = torch.empty_like(mixed)
        kernels.attention_backward(*_parts(mixed), *ctx.asked, logarithms, gradient, _parts(found), ctx.packed)
        return found, None, None, None, None


def _parts(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of _MixedAttention."""
    return mixed[..., :-2, :], mixed[..., -2, :], mixed[..., -1, :]


class _CompiledAttention(torch.autograd.Function):
    """query [S, B, groups, heads of a group, d], key and value [S, B, groups, d]."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, packed: PackedRow | None
    ) -> Tensor:
        value = value.contiguous()  # a part of what holds the queries and keys as well, which nobody else keeps
        found, logarithms = kernels.attention(query, key, value, scale, causal, None, packed)
        ctx.save_for_backward(query, key, value, logarithms)
        ctx.scale, ctx.causal, ctx.packed = scale, causal, packed
        return found

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *states, logarithms = ctx.saved_tensors
        found = [torch.empty(state.shape, dtype=state.dtype) for state in states]
        kernels.attention_backward(*states, ctx.scale, ctx.causal, None, logarithms, gradient, found, ctx.packed)
        return *found, None, None, None


class _MultipliedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        groups = key.shape[2]
        query_rows, key_rows, value_rows = (_rows_of_groups(states, groups) for states in (query, key, value))
        mask = _mask(query.shape[0], query.shape[2] // groups, causal)
        scores = torch.baddbmm(mask, query_rows, key_rows.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(query_rows, key_rows, value_rows, weights)
        ctx.scale, ctx.heads, ctx.groups = scale, query.shape[2], groups
        return _states(torch.bmm(weights, value_rows), query.shape[2], query).flatten(2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query_rows, key_rows, value_rows, weights = ctx.saved_tensors
        rows = _rows_of_groups(gradient.unflatten(2, (ctx.heads, -1)), ctx.groups)
        of_value = torch.bmm(weights.transpose(1, 2), rows)
        of_weights = torch.bmm(rows, value_rows.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        of_query, of_key = torch.bmm(of_scores, key_rows), torch.bmm(of_scores.transpose(1, 2), query_rows)
        found = ((of_query, ctx.heads), (of_key, ctx.groups), (of_value, ctx.groups))
        return *(_states(states, heads, gradient) for states, heads in found), None, None


def _rows_of_groups(states: Tensor, groups: int) -> Tensor:
    """[S, B, heads, d] -> float32 [B * groups, heads / groups * S, d]."""
    length, records, heads, width = states.shape
    rows = torch.empty(records, heads, length, width, dtype=torch.float32, device=states.device)
    return rows.copy_(states.permute(1, 2, 0, 3)).view(records * groups, -1, width)


def _states(rows: Tensor, heads: int, like: Tensor) -> Tensor:
    """[B * groups, heads / groups * S, d] -> [S, B, heads, d] in the dtype of `like` [S, B, ...]."""
    length, records = like.shape[:2]
    states = torch.empty(length, records, heads, rows.shape[-1], dtype=like.dtype, device=like.device)
    return states.copy_(rows.view(records, heads, length, -1).permute(2, 0, 1, 3))


@functools.lru_cache(maxsize=8)
def _mask(length: int, heads: int, causal: bool) -> Tensor:
    """What is added to the scores of a group: [heads * length, length], -inf where a token may not look."""
    allowed = torch.zeros(length, length)
    if causal:
        allowed = allowed.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu_(1), float("-inf"))
    return allowed.repeat(heads, 1)
