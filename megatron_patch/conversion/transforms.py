"""How one Megatron tensor is made of hub tensors.

A transform is a join, its exact inverse, and the one axis that tensor parallelism cuts.  Shapes are those of a single
layer; the stacking over layers is the row's business (table.py).

Letters: h hidden width, q query heads, g query groups (key/value heads), d head width, r = q / g, f ffn width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Same:
    """One hub tensor, unchanged."""

    tensor_parallel_axis: int | None = None

    def joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(shapes[0])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def split(self, joined: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [joined]

    def first_row(self, part: int, shapes: Sequence[Shape]) -> int | None:
        return 0


@dataclass(frozen=True)
class Reshaped:
    """One hub tensor under another shape: CLIP's class embedding [h] is Megatron's class token [1, 1, h]."""

    shape: Shape
    tensor_parallel_axis: int | None = None

    def joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.shape

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(self.shape)

    def split(self, joined: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [joined.reshape(tuple(shapes[0]))]

    def first_row(self, part: int, shapes: Sequence[Shape]) -> int | None:
        return None


@dataclass(frozen=True)
class Rows:
    """Hub tensors below each other: gate [f, h] and up [f, h] are Megatron's gated fc1 [2f, h].

    Tensor parallelism cuts every part for itself, then joins: rank 0 holds [gate_0; up_0].
    """

    tensor_parallel_axis: int | None = 0

    def joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, joined: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return list(joined.split([shape[0] for shape in shapes]))

    def first_row(self, part: int, shapes: Sequence[Shape]) -> int | None:
        return sum(shape[0] for shape in shapes[:part])


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value interleaved per query group: [q_0..q_r-1, k, v] of group 0, then of group 1, ...

    Parts: query [q*d, ...], key [g*d, ...], value [g*d, ...]; weight and bias alike.  Source of the order:
    megatron.core.transformer.attention.SelfAttention.get_query_key_value_tensors.  Tensor parallelism cuts groups.
    """

    heads: int
    groups: int
    tensor_parallel_axis: int | None = 0

    def joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        rest = parts[0].shape[1:]
        per_group = [part.reshape(self.groups, -1, *rest) for part in parts]
        return torch.cat(per_group, dim=1).reshape(-1, *rest)

    def split(self, joined: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        rows = [shape[0] // self.groups for shape in shapes]
        parts = joined.reshape(self.groups, sum(rows), *joined.shape[1:]).split(rows, dim=1)
        return [part.reshape(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]

    def first_row(self, part: int, shapes: Sequence[Shape]) -> int | None:
        return None

    def runs(self, part: int, shapes: Sequence[Shape]) -> list[tuple[int, int]]:
        """(first row in the joined tensor, rows) of the pieces that make up a part, in the part's order."""
        rows = [shape[0] // self.groups for shape in shapes]
        return [(group * sum(rows) + sum(rows[:part]), rows[part]) for group in range(self.groups)]


# first_row: the row of the joined tensor where a part begins, when the part lies there as unbroken rows (it can then
# be streamed in blocks); None when the parts are mixed.
Transform = Same | Reshaped | Rows | QueryKeyValue
