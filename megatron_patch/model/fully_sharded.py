"""The model's checkpoint entries where torch's FSDP2 has shared its weights out: each rank its piece of each weight.

A weight is then a DTensor over the data-parallel ranks, cut along one axis (patches/torch_fsdp2.py says which).
Megatron makes the entries as if it were whole on every rank, and each is narrowed here to this rank's piece.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local_part(value: Any) -> Any:
    """This rank's piece of a DTensor, the very tensor that it holds; anything else as it is."""
    return value._local_tensor if isinstance(value, DTensor) else value


def _cut(value: DTensor) -> tuple[int, int, int, bool]:
    """(axis, number of this rank's piece, pieces, is this rank the one to write it?)"""
    mesh, coordinates = value.device_mesh, value.device_mesh.get_coordinate()
    ((place, placement),) = [
        (number, placement) for number, placement in enumerate(value.placements) if isinstance(placement, Shard)
    ]
    writes = all(coordinates[number] == 0 for number in range(mesh.ndim) if number != place)
    return placement.dim, coordinates[place], mesh.size(place), writes


def piece_of(weight: Tensor, whole: Tensor) -> Tensor:
    """Of the whole of a weight, what this rank holds."""
    if not isinstance(weight, DTensor):
        return whole
    axis, number, pieces, _ = _cut(weight)
    return whole.chunk(pieces, dim=axis)[number]


def of_this_rank(state: ShardedStateDict) -> ShardedStateDict:
    """The entries of a model's state, each narrowed to what this rank holds."""
    return {name: _narrowed(entry) for name, entry in state.items()}


def _narrowed(entry: Any) -> Any:
    if not isinstance(getattr(entry, "data", None), DTensor):
        return entry
    value: DTensor = entry.data
    axis, number, pieces, writes = _cut(value)
    replica = (*entry.replica_id[:-1], 0 if writes else 1)
    if isinstance(entry, ShardedTensorFactory):
        # gate and up, which lie behind each other along axis 0 and are cut along another
        assert axis != 0, f"{entry.key} is cut along axis 0"
        build = _of_pieces(entry.build_fn, axis, number, pieces)
        return dataclasses.replace(entry, data=local_part(value), build_fn=build, replica_id=replica)
    at = axis + entry.prepend_axis_num
    size = local_part(value).shape[axis]
    offset, fragments = list(entry.global_offset), list(entry.axis_fragmentations)
    offset[at] += number * size
    fragments[at] *= pieces
    return dataclasses.replace(
        entry,
        data=local_part(value),
        local_shape=tuple(local_part(value).shape),
        global_offset=tuple(offset),
        axis_fragmentations=tuple(fragments),
        replica_id=replica,
    )


def _of_pieces(
    build: Callable[..., list[ShardedTensor]], axis: int, number: int, pieces: int
) -> Callable[..., list[ShardedTensor]]:
    """What a factory builds of a piece, in its place in the whole."""

    def place(entry: ShardedTensor) -> ShardedTensor:
        at = axis + entry.prepend_axis_num
        shape, offset, fragments = list(entry.global_shape), list(entry.global_offset), list(entry.axis_fragmentations)
        offset[at] = number * entry.local_shape[axis]
        shape[at] *= pieces
        fragments[at] *= pieces
        return dataclasses.replace(
            entry, global_shape=tuple(shape), global_offset=tuple(offset), axis_fragmentations=tuple(fragments)
        )

    def build_pieces(key: str, value: Tensor, *rest: Any, **named: Any) -> list[ShardedTensor]:
        return [place(entry) for entry in build(key, value, *rest, **named)]

    return build_pieces
