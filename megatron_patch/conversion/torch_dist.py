"""Megatron's torch_dist checkpoints, written and read without a model, a process group or Megatron.

A checkpoint is a folder with `metadata.json` (the format's name), `.metadata` (a pickle of torch's distributed
checkpoint metadata: every tensor's global shape and its chunks) and `.distcp` files, in which every chunk is the
output of one torch.save.  Megatron 0.19 keeps what is not a tensor in byte entries of the same files.
"""

import io
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from megatron_patch.checkpoint_files import STRANGE, TensorArchive, read_metadata
from megatron_patch.conversion.hub_weights import FileSpan, pread_into
from megatron_patch.conversion.output import ahead, start_writing_back
from megatron_patch.conversion.transforms import Shape
from megatron_patch.errors import UserError

DATA_FILE = "__0_0.distcp"


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the function that makes it; make() returns a tensor of this size."""

    offset: Shape
    size: Shape
    make: Callable[[], Tensor]


@contextmanager
def _without_crc() -> Iterator[None]:
    """torch.save without CRC-32 of every record: computing it takes half the time on a fast disk."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class CheckpointWriter:
    """Writes one checkpoint folder, chunk by chunk; finish() makes it readable."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        folder.mkdir(parents=True)
        self._folder, self._dtype = folder, dtype
        self._file = open(folder / DATA_FILE, "wb")  # noqa: SIM115 - closed by finish() and __exit__
        self._entries: dict[str, dcp.STORAGE_TYPES] = {}
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()

    def _record(self, index: dcp.MetadataIndex, save: Callable[[], None]) -> None:
        begin = self._file.tell()
        try:
            save()
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch.save hides a full disk behind its own failed check
                raise error.__context__ from None
            raise
        end = self._file.tell()
        self._places[index] = _StorageInfo(DATA_FILE, begin, end - begin)
        start_writing_back(self._file.fileno(), begin, end - begin)

    def add_tensor(
        self, key: str, shape: Shape, chunks: Sequence[Chunk], advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Write a tensor [*shape], whose chunks tile it."""
        boxes = []
        with _without_crc():
            for chunk, tensor in zip(chunks, ahead(chunk.make() for chunk in chunks), strict=True):
                tensor = tensor.reshape(chunk.size)
                assert tensor.dtype == self._dtype, f"{key}: {tensor.dtype}"
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # torch.save of a view stores the whole storage
                boxes.append(dcp.ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)))
                index = dcp.MetadataIndex(key, chunk.offset)
                self._record(index, lambda tensor=tensor: torch.save(tensor, self._file))
                advance(tensor.nbytes)
        assert sum(math.prod(box.sizes) for box in boxes) == math.prod(shape), f"{key}: chunks do not tile {shape}"
        properties = dcp.TensorProperties(dtype=self._dtype)
        self._entries[key] = dcp.TensorStorageMetadata(properties, torch.Size(shape), boxes)

    def add_object(self, key: str, value: object, shard: int = 0, shards: int = 1) -> None:
        """Write what Megatron calls a sharded object: torch.save of a list with one value."""
        name = f"{key}/shard_{shard}_{shards}"
        self._entries[name] = dcp.BytesStorageMetadata()
        self._record(dcp.MetadataIndex(name), lambda: torch.save([value], self._file))

    def finish(self) -> None:
        """Write the metadata.  The common state is the smallest that loads well: without a checkpoint_version
        Megatron takes the checkpoint for one of its oldest and reorders query, key and value."""
        self.add_object("common_state", {"checkpoint_version": 3.0, "iteration": 0})
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        metadata = dcp.Metadata(
            state_dict_metadata=self._entries,
            storage_data=self._places,
            storage_meta=dcp.StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (self._folder / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )


# ---------------------------------------------------------------- reading


class CheckpointReader:
    """Reads boxes of tensors out of one iteration's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = read_metadata(folder)
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors: dict[str, dcp.TensorStorageMetadata] = {}
        self.objects: list[str] = []
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, dcp.TensorStorageMetadata):
                self.tensors[key] = entry
            else:
                self.objects.append(key)
        self._descriptors: dict[str, int] = {}
        self._starts: dict[dcp.MetadataIndex, int | None] = {}
        self._check_files()

    def _check_files(self) -> None:
        """Refuse data files that are missing or shorter than the metadata promises."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            path = self._folder / name
            if not path.is_file() or path.stat().st_size < end:
                size = f"{path.stat().st_size} bytes" if path.is_file() else "not there"
                raise UserError(f"{path} is {size}; the checkpoint's metadata promises {end} bytes")

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            self._descriptors[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._descriptors[name]

    def read(self, key: str, offset: Shape, size: Shape) -> Tensor:
        """The box [offset, offset + size) of a tensor.

        Raises:
            UserError: the chunks in the checkpoint do not cover the box.
        """
        entry = self.tensors[key]
        result, covered = None, 0
        for chunk in entry.chunks:
            low = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inner = [(a - b, c - b) for a, c, b in zip(low, high, chunk.offsets, strict=True)]
            part = self._read_chunk(key, chunk, entry.properties.dtype, inner)
            covered += part.numel()
            if part.shape == torch.Size(size):
                result = part
                continue
            if result is None:
                result = torch.empty(tuple(size), dtype=entry.properties.dtype)
            box = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            result[box] = part
        if covered != math.prod(size):
            raise UserError(f"{self._folder}: {key} is incomplete: {covered} of {math.prod(size)} values are stored")
        return result

    def spans(self, key: str, layer: int | None, first: int, last: int) -> list[FileSpan] | None:
        """Where rows [first, last) of a tensor (of one layer, when stacked) lie in the files.

        None: they are not there as unbroken bytes in order.
        """
        entry, axis = self.tensors[key], 0 if layer is None else 1
        row_shape = entry.size[axis + 1 :]
        row_bytes = math.prod(row_shape) * entry.properties.dtype.itemsize
        found = []
        for chunk in entry.chunks:
            begin, end = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
            low, high = max(first, begin), min(last, end)
            if low >= high or (layer is not None and chunk.offsets[0] != layer):
                continue
            start = self._start(key, chunk, entry.properties.dtype)
            if start is None or chunk.sizes[axis + 1 :] != row_shape or chunk.sizes[:axis].numel() != 1:
                return None
            descriptor = self._descriptor(self._places[dcp.MetadataIndex(key, chunk.offsets)].relative_path)
            position, nbytes = start + (low - begin) * row_bytes, (high - low) * row_bytes
            found.append((low, high, FileSpan(descriptor, position, nbytes)))
        found.sort(key=lambda item: item[0])
        edges = [first, *(high for _, high, _ in found)]
        if [low for low, _, _ in found] != edges[:-1] or edges[-1] != last:
            return None
        return [span for _, _, span in found]

    def _start(self, key: str, chunk: dcp.ChunkStorageMetadata, dtype: torch.dtype) -> int | None:
        """_contiguous_start of a chunk, looked up once."""
        index = dcp.MetadataIndex(key, chunk.offsets)
        if index not in self._starts:
            place = self._places[index]
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"{self._folder}: {key} was written compressed, which is not supported")
            descriptor = self._descriptor(place.relative_path)
            self._starts[index] = _contiguous_start(descriptor, place, tuple(chunk.sizes), dtype)
        return self._starts[index]

    def _read_chunk(
        self, key: str, chunk: dcp.ChunkStorageMetadata, dtype: torch.dtype, inner: list[tuple[int, int]]
    ) -> Tensor:
        """The inner box of a chunk: the rows it spans are read, not the whole chunk."""
        place = self._places[dcp.MetadataIndex(key, chunk.offsets)]
        descriptor = self._descriptor(place.relative_path)
        start = self._start(key, chunk, dtype)
        if start is None:
            data = io.BytesIO(os.pread(descriptor, place.length, place.offset))
            whole = torch.load(data, map_location="cpu", weights_only=True)
            return whole.reshape(tuple(chunk.sizes))[tuple(slice(a, b) for a, b in inner)].clone()
        # Leading axes of length one select nothing: the first longer axis is the one whose rows are read.
        sizes = list(chunk.sizes)
        axis = next((i for i, n in enumerate(sizes) if n > 1), len(sizes) - 1)
        first, last = inner[axis] if sizes else (0, 1)
        row_bytes = math.prod(sizes[axis + 1 :]) * dtype.itemsize
        shape = [*sizes[:axis], last - first, *sizes[axis + 1 :]] if sizes else []
        rows = pread_into(descriptor, start + first * row_bytes, shape, dtype)
        keep = [slice(a, b) if i != axis else slice(None) for i, (a, b) in enumerate(inner)]
        return rows[tuple(keep)]


def _contiguous_start(descriptor: int, place: _StorageInfo, size: Shape, dtype: torch.dtype) -> int | None:
    """File position of a saved tensor's first byte; None when its bytes are not simply the tensor in order."""
    try:
        archive = TensorArchive(descriptor, place.offset, place.length)
        found = archive.place(archive.saved)
    except STRANGE:
        return None
    if found is None or found.dtype != dtype or math.prod(found.shape) != math.prod(size):
        return None
    return found.position
