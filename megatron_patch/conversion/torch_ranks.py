"""Megatron's older format `torch`: one file per tensor-parallel and pipeline-parallel rank, written and read in place.

    CKPT/release/mp_rank_XX/model_optim_rng.pt          PP 1: two digits of the tensor-parallel rank
    CKPT/release/mp_rank_XX_YYY/model_optim_rng.pt      PP above 1: and three of the pipeline-parallel rank

A file is one torch.save of {"model": {name: tensor}, ...} with the tensors as that rank holds them: layers counted from
the stage's first, cut along the row's tensor-parallel axis, the vocabulary padded to a multiple of 128 x TP (Megatron's
--make-vocab-size-divisible-by).  Norms carry their Transformer Engine names; the model itself finds its own spelling
(LlavaModel.load_state_dict).  A tied head stands in the last stage's file as well when there is more than one stage.

Writing: torch.save lays the file out without data (torch.serialization.skip_data), then every tensor's bytes go to
their places, so nothing but the current block is in memory.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from megatron_patch.checkpoint_files import (
    RANK_FILE,
    PlacedTensor,
    checkpoint_format,
    rank_folder_name,
    rank_folders,
    read_rank_file,
)
from megatron_patch.conversion.hub_weights import pread_into
from megatron_patch.conversion.output import ahead, start_writing_back
from megatron_patch.conversion.table import Row
from megatron_patch.conversion.torch_dist import CheckpointReader, Chunk
from megatron_patch.conversion.transforms import Rows, Shape
from megatron_patch.errors import UserError
from megatron_patch.geometry import VOCABULARY_STEP
from megatron_patch.weight_names import EMBEDDING, HEAD, with_transformer_engine_norms

_LAST_STAGE = ("language_model.decoder.final_layernorm.", "language_model.output_layer.")


@dataclass(frozen=True)
class RowRange:
    """`count` rows (or columns) that stand together both in the whole tensor and in a rank's part of it."""

    whole: int
    local: int
    count: int


def ranges_of_rank(row: Row, rank: int, degree: int) -> tuple[int, list[RowRange]]:
    """(axis, ranges along it) of one layer's tensor on one tensor-parallel rank; uncut: one range on axis 0."""
    axis, shape = row.transform.tensor_parallel_axis, row.joined_shape
    if axis is None or degree == 1:
        if row.key in (EMBEDDING, HEAD):
            return 0, [RowRange(0, 0, padded_rows(shape[0], degree))]
        return 0, [RowRange(0, 0, shape[0])]
    if row.key in (EMBEDDING, HEAD):
        count = padded_rows(shape[0], degree) // degree
        return 0, [RowRange(rank * count, 0, count)]
    parts = [part[0] for part in row.part_shapes] if isinstance(row.transform, Rows) else [shape[axis]]
    ranges, whole, local = [], 0, 0
    for size in parts:
        count = size // degree
        ranges.append(RowRange(whole + rank * count, local, count))
        whole, local = whole + size, local + count
    return axis, ranges


def padded_rows(vocabulary: int, degree: int) -> int:
    """Rows of the embedding as Megatron pads it."""
    step = VOCABULARY_STEP * degree
    return -(-vocabulary // step) * step


def _local_shape(row: Row, rank: int, degree: int) -> Shape:
    axis, ranges = ranges_of_rank(row, rank, degree)
    shape = list(row.joined_shape)
    shape[axis] = sum(part.count for part in ranges)
    return tuple(shape)


def _stage(row: Row, layer: int | None, stages: int) -> tuple[int, int | None]:
    """(pipeline stage, layer within it) of a row's layer.  Tower and projector live on the first stage."""
    if layer is not None and row.key.startswith("language_model."):
        per_stage = row.layers // stages
        return layer // per_stage, layer % per_stage
    return (stages - 1 if row.key.startswith(_LAST_STAGE) else 0), layer


def _name(key: str, layer: int | None) -> str:
    return key if layer is None else key.replace(".layers.", f".layers.{layer}.", 1)


def _copies(rows: Sequence[Row], stages: int) -> Iterator[tuple[Row, int | None, int, str]]:
    """(row, layer, stage, name in that stage's file) of everything that lies in the files."""
    tied = all(row.key != HEAD for row in rows)
    for row in rows:
        for layer, _ in row.slots():
            stage, local = _stage(row, layer, stages)
            yield row, layer, stage, _name(row.key, local)
        if row.key == EMBEDDING and tied and stages > 1:
            yield row, None, stages - 1, HEAD


# ---------------------------------------------------------------- writing


def _write_at(descriptor: int, tensor: Tensor, position: int) -> None:
    view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    while view:
        count = os.pwrite(descriptor, view, position)
        start_writing_back(descriptor, position, count)
        view, position = view[count:], position + count


class RanksWriter:
    """Writes the files of every rank, chunk by chunk; the same interface as CheckpointWriter."""

    def __init__(self, folder: Path, dtype: torch.dtype, rows: Sequence[Row], tensor: int, pipeline: int) -> None:
        self._rows = {row.key: row for row in rows}
        self._tensor, self._dtype = tensor, dtype
        self._targets: dict[tuple[str, int | None], list[tuple[int, str]]] = {}
        states: list[list[tuple[Row, str]]] = [[] for _ in range(pipeline)]
        for row, layer, stage, name in _copies(rows, pipeline):
            self._targets.setdefault((row.key, layer), []).append((stage, name))
            states[stage].append((row, name))
        self._files: dict[tuple[int, int], tuple[int, dict[str, PlacedTensor]]] = {}
        for stage, members in enumerate(states):
            for rank in range(tensor):
                path = folder / rank_folder_name(rank, stage, pipeline > 1) / RANK_FILE
                path.parent.mkdir(parents=True)
                # never touched, so these take no memory
                state = {name: torch.empty(_local_shape(row, rank, tensor), dtype=dtype) for row, name in members}
                with torch.serialization.skip_data():
                    torch.save({"model": state, "checkpoint_version": 3.0, "iteration": 0}, path)
                self._files[rank, stage] = (os.open(path, os.O_RDWR), read_rank_file(path))

    def __enter__(self) -> "RanksWriter":
        return self

    def __exit__(self, *failure: object) -> None:
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def add_tensor(
        self, key: str, shape: Shape, chunks: Sequence[Chunk], advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Write a tensor [*shape], whose chunks tile it and hold whole rows."""
        row = self._rows[key]
        for chunk, made in zip(chunks, ahead(chunk.make() for chunk in chunks), strict=True):
            layer = chunk.offset[0] if row.layers else None
            offset, size = (chunk.offset[1:], chunk.size[1:]) if row.layers else (chunk.offset, chunk.size)
            tensor = made.reshape(size)
            assert tensor.dtype == self._dtype, f"{key}: {tensor.dtype}"
            for stage, name in self._targets[key, layer]:
                for rank in range(self._tensor):
                    descriptor, places = self._files[rank, stage]
                    axis, ranges = ranges_of_rank(row, rank, self._tensor)
                    self._put(descriptor, places[name], tensor, offset[0], axis, ranges)
            advance(tensor.nbytes)

    @staticmethod
    def _put(
        descriptor: int, place: PlacedTensor, tensor: Tensor, first: int, axis: int, ranges: Sequence[RowRange]
    ) -> None:
        """Write the parts of rows [first, first + len(tensor)) that belong to a rank."""
        row_bytes = math.prod(place.shape[1:]) * place.dtype.itemsize
        if axis == 1:
            (part,) = ranges
            columns = tensor[:, part.whole : part.whole + part.count]
            _write_at(descriptor, columns, place.position + first * row_bytes)
            return
        for part in ranges:
            low, high = max(part.whole, first), min(part.whole + part.count, first + len(tensor))
            if low < high:
                position = place.position + (part.local + low - part.whole) * row_bytes
                _write_at(descriptor, tensor[low - first : high - first], position)

    def add_object(self, key: str, value: object, shard: int = 0, shards: int = 1) -> None:
        """Extra states are not written: all are empty, and the model does without."""

    def finish(self) -> None:
        for descriptor, _ in self._files.values():
            os.fsync(descriptor)


# ---------------------------------------------------------------- reading


class RanksReader:
    """Reads boxes of whole tensors out of the files of all ranks; the same interface as CheckpointReader."""

    objects: tuple[str, ...] = ()

    def __init__(self, iteration: Path, rows: Sequence[Row]) -> None:
        self._iteration = iteration
        paths = rank_folders(iteration)
        self.tensor, self.pipeline = (max(numbers) + 1 for numbers in zip(*paths, strict=True))
        self._check_layout(rows)
        self._rows = {row.key: row for row in rows}
        self._files = {ranks: read_rank_file(path) for ranks, path in paths.items()}
        self._files = {
            ranks: {with_transformer_engine_norms(name): place for name, place in places.items()}
            for ranks, places in self._files.items()
        }
        self.tensors: dict[str, dcp.TensorStorageMetadata] = {}
        self._collect(rows)
        with ExitStack() as stack:
            self._descriptors = {}
            for ranks, path in paths.items():
                self._descriptors[ranks] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, self._descriptors[ranks])
            self._closing = stack.pop_all()

    def _check_layout(self, rows: Sequence[Row]) -> None:
        for row in rows:
            axis = row.transform.tensor_parallel_axis
            cut = axis is not None and row.key not in (EMBEDDING, HEAD)
            if cut and row.joined_shape[axis] % self.tensor:
                raise UserError(
                    f"{self._iteration} has {self.tensor} tensor-parallel ranks, which do not cut {row.key} "
                    f"{list(row.joined_shape)}; its llava/config.json is another model's"
                )
            if row.key.startswith("language_model.") and row.layers % self.pipeline:
                raise UserError(
                    f"{self._iteration} has {self.pipeline} pipeline ranks for {row.layers} layers; "
                    "unequal stages are not read here"
                )

    def _collect(self, rows: Sequence[Row]) -> None:
        """Whole shapes from the ranks' shapes; names that no row has stay as they are, for the caller's lists."""
        claimed: dict[int, set[str]] = {stage: set() for stage in range(self.pipeline)}
        stored: dict[str, list[PlacedTensor]] = {}
        absent: dict[str, str] = {}
        for row, _, stage, name in _copies(rows, self.pipeline):
            claimed[stage].add(name)
            places = [self._files[rank, stage].get(name) for rank in range(self.tensor)]
            if None in places:
                absent[row.key] = f"stage {stage} lacks {name}"
                continue
            if any((place.dtype, place.shape) != (places[0].dtype, places[0].shape) for place in places):
                raise UserError(f"{self._iteration}: the ranks hold {name} in different shapes")
            stored.setdefault(row.key, places)
        for key, (place, *_) in stored.items():
            if key in absent:
                raise UserError(f"{self._iteration} is not whole: {absent[key]}; write the checkpoint again")
            row = self._rows[key]
            shape = list(place.shape)
            if row.transform.tensor_parallel_axis is not None:
                shape[row.transform.tensor_parallel_axis] *= self.tensor
            self._add(key, place.dtype, ([row.layers] if row.layers else []) + shape)
        for (_, stage), places in self._files.items():
            for name in places.keys() - claimed[stage]:
                self._add(name.replace(".layers.", ".layer "), places[name].dtype, places[name].shape)

    def _add(self, key: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.tensors[key] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(shape), [])

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> "RanksReader":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def read(self, key: str, offset: Shape, size: Shape) -> Tensor:
        """Rows [offset, offset + size) of a tensor, of one layer when it is stacked."""
        row = self._rows[key]
        layer = offset[0] if row.layers else None
        first, count = (offset[1], size[1]) if row.layers else (offset[0], size[0])
        rest = row.joined_shape[1:]
        assert tuple(size[-len(rest) :] if rest else ()) == tuple(rest), f"{key}: whole rows are read, not {size}"
        stage, local = _stage(row, layer, self.pipeline)
        name, dtype = _name(key, local), self.tensors[key].properties.dtype
        result = torch.empty((count, *rest), dtype=dtype)
        for rank in range(self.tensor):
            place, descriptor = self._files[rank, stage][name], self._descriptors[rank, stage]
            axis, ranges = ranges_of_rank(row, rank, self.tensor)
            row_bytes = math.prod(place.shape[1:]) * dtype.itemsize
            if axis == 1:
                (part,) = ranges
                columns = pread_into(descriptor, place.position + first * row_bytes, (count, *place.shape[1:]), dtype)
                result[:, part.whole : part.whole + part.count] = columns
                continue
            for part in ranges:
                low, high = max(part.whole, first), min(part.whole + part.count, first + count)
                if low < high:
                    position = place.position + (part.local + low - part.whole) * row_bytes
                    result[low - first : high - first] = pread_into(descriptor, position, (high - low, *rest), dtype)
            if row.transform.tensor_parallel_axis is None:
                break  # every rank has the same
        return result.reshape(tuple(size))


def open_checkpoint(iteration: Path, rows: Sequence[Row]) -> CheckpointReader | RanksReader:
    """The reader that fits the folder's format.

    Raises:
        UserError: the folder is not whole.
    """
    return RanksReader(iteration, rows) if checkpoint_format(iteration) == "torch" else CheckpointReader(iteration)
