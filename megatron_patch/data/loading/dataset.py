"""One split of an energon dataset as a sequence of raw samples, read at random positions."""

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import struct
import tarfile
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import yaml
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

from megatron_patch.data.loading.blend import is_blend, read_parts
from megatron_patch.data.loading.metadata import read_split
from megatron_patch.data.record import is_image_part
from megatron_patch.errors import UserError
from megatron_patch.file_window import FileWindow, RangeFile
from megatron_patch.object_storage import Absent, ObjectFolder, StorageError, at_once, is_url

OPEN_SHARDS = 64
META = ".nv-meta"
# What energon and we read of it; the rest, an index of all records among it, stays where it is.
META_FILES = (".info.json", ".info.yaml", "split.yaml", "split.json", "dataset.yaml")
SMALL_SAMPLE = 64 * 1024  # bytes up to which a stored sample is read whole for its text, in one request
TEXT_BLOCK = 16 * 1024  # bytes of a request for the text of a larger one

Parts = dict[str, Any]


class EnergonFolder:
    """`folder[i]` -> parts of sample i as bytes (json, jpg, ...) with `__key__` and `__shard__`; None if excluded.

    The path may be a URL of object storage: the samples, their order and the fingerprint are those of the same folder
    on a disk.  Samples of a folder that was prepared with a field map have it as `__field_map__`.
    Raises UserError when the path is no energon folder, or the split is absent, empty or has missing shards; reading
    from object storage raises StorageError.
    """

    def __init__(self, path: str, split: str) -> None:
        self.path = path
        self.split = split
        try:
            self.store = ObjectFolder(path) if is_url(path) else None  # where a read is a request
            self._read_meta()
        except StorageError as error:
            raise UserError(str(error)) from None

    def _read_meta(self) -> None:
        path, split = self.path, self.split
        with _local_meta(path, self.store) as root:
            self._shards = read_split(path, split, root)
            self._field_map = _read_field_map(root / META / "dataset.yaml")
        self.shard_counts = self._shards.counts  # int64 [shards]
        self._starts = np.concatenate(([0], np.cumsum(self.shard_counts)))
        self._stored_sizes = self.store.sizes() if self.store else {}
        told = hashlib.sha256(f"[{json.dumps(split)}, [".encode())  # the JSON of [split, [[name, count, size], ...]]
        for number, count in enumerate(self.shard_counts.tolist()):
            name = self._shards.name(number)
            size = self._size_of(name)
            if size is None:
                raise UserError(f"{path}: shard {name} or its .idx file is missing; convert the data again")
            told.update(f"{', ' if number else ''}{json.dumps([name, count, size])}".encode())
        told.update(b"]]")
        self.fingerprint = told.hexdigest()[:32]
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def _size_of(self, name: str) -> int | None:
        """Bytes of a shard; None: it, or its .idx file, is not there."""
        if self.store:
            return self._stored_sizes.get(name) if f"{name}.idx" in self._stored_sizes else None
        tar = f"{self.path}/{name}"
        return os.path.getsize(tar) if os.path.isfile(f"{tar}.idx") and os.path.isfile(tar) else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(name, records) of every shard, in the order of the records."""
        return [(self._shards.name(number), count) for number, count in enumerate(self.shard_counts.tolist())]

    def name(self, index: int) -> str:
        """`shard[number within it]`, for messages about a sample that could not be read."""
        shard = self._shard_of(index)
        return f"{self._shards.name(shard)}[{index - self._starts[shard]}]"

    def __getitem__(self, index: int) -> Parts | None:
        return self._read(index, with_images=True)

    def read_text(self, index: int) -> Parts | None:
        """Like folder[index], with b"" in place of each image, whose bytes are not read."""
        return self._read(index, with_images=False)

    def _read(self, index: int, with_images: bool) -> Parts | None:
        number = self._shard_of(index)
        name = self._shards.name(number)
        shard = self._open.pop(number, None) or self._open_shard(name)
        self._open[number] = shard  # the most recently used one comes last
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        parts = shard.read(index - int(self._starts[number]), with_images)
        if f"{name}/{parts['__key__']}" in self._shards.excludes:
            return None
        return {**parts, "__shard__": name, **({"__field_map__": self._field_map} if self._field_map else {})}

    def _open_shard(self, name: str) -> "_Shard":
        if self.store:
            return _StoredShard(self.store, name, self._stored_sizes[name])
        return _LocalShard(Path(self.path) / name)

    def _shard_of(self, index: int) -> int:
        """Number of the shard that holds the sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


@contextlib.contextmanager
def _local_meta(path: str, store: ObjectFolder | None) -> Iterator[Path]:
    """A folder on a disk whose .nv-meta is that of the path.  Raises UserError: there is none; StorageError."""
    if not store:
        if not (Path(path) / META).is_dir():
            here = Path(path)
            _refuse_folder(
                path, f"no {META} folder in it" if here.is_dir() else "not a folder" if here.exists() else "absent"
            )
        yield Path(path).absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / META).mkdir()
        calls = [functools.partial(store.read, f"{META}/{name}") for name in META_FILES]
        for name, get in zip(META_FILES, at_once(calls), strict=True):
            with contextlib.suppress(Absent):
                (Path(folder) / META / name).write_bytes(get())
        if not any((Path(folder) / META).iterdir()):
            _refuse_folder(path, f"no {META} folder in it")
        yield Path(folder)


def _refuse_folder(path: str, got: str) -> NoReturn:
    raise UserError(
        f"{path}: {got}; wanted an energon folder, as "
        "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py writes it"
    )


class _Shard:
    """Random access to the samples of one tar file through its `.idx` file.

    Energon's own reader (7.4) keeps 1 kB of every sample it ever read, and its file position is shared by forked
    workers; this one reads at given offsets and keeps nothing.
    """

    def _span(self, number: int) -> tuple[int, int]:
        """Where a sample begins and ends.  Raises ValueError: it is not in the index."""
        raise NotImplementedError

    def _whole(self, start: int, length: int) -> bytes:
        """Bytes of the file, fewer where it ends."""
        raise NotImplementedError

    def _window(self, start: int, length: int) -> BinaryIO:
        """The same as a file of which only what is asked for is read."""
        raise NotImplementedError

    def read(self, number: int, with_images: bool) -> Parts:
        """Parts of a sample and its `__key__`.

        Raises OSError, ValueError or TarError for a damaged shard, StorageError where object storage does not answer.
        """
        start, end = self._span(number)
        if with_images:
            sample: BinaryIO = io.BytesIO(self._whole(start, end - start))
        else:
            sample = self._window(start, end - start)
        if sample.seek(0, os.SEEK_END) < end - start:
            raise ValueError(f"the file ends {end - start - sample.tell()} bytes before the sample does")
        sample.seek(0)
        parts: Parts = {}
        with tarfile.open(fileobj=sample, mode="r:") as archive:
            for member in archive:
                # Which files are parts of a sample, and where a key ends: energon's rules.
                match = split_name_re.match(member.name)
                if not member.isfile() or skip_meta_re.match(member.name) or not match:
                    continue
                key, part = match.groups()
                if parts.setdefault("__key__", key) != key:
                    raise ValueError(f"one sample holds the keys {parts['__key__']} and {key}")
                wanted = with_images or not is_image_part(part)
                parts[part] = archive.extractfile(member).read() if wanted else b""
        if not parts:
            raise ValueError("the sample has no files")
        return parts


def _not_in_the_index(number: int, samples: int) -> NoReturn:
    raise ValueError(f"sample {number} is not in the index of {samples} samples")


class _LocalShard(_Shard):
    """On a disk."""

    def __init__(self, tar: Path) -> None:
        self._file = tar.open("rb", buffering=0)
        self._index = tar.with_name(f"{tar.name}.idx").open("rb", buffering=0)

    def _span(self, number: int) -> tuple[int, int]:
        # Two offsets at a time, of which each has eight bytes: whole indices would be 8 GB at a billion samples.
        place = os.pread(self._index.fileno(), 16, 8 * number)
        if len(place) < 16:
            _not_in_the_index(number, os.fstat(self._index.fileno()).st_size // 8 - 1)
        return struct.unpack("<QQ", place)

    def _whole(self, start: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)

    def _window(self, start: int, length: int) -> BinaryIO:
        return io.BufferedReader(FileWindow(self._file.fileno(), start, length), tarfile.BLOCKSIZE)


class _StoredShard(_Shard):
    """In object storage: a request for each sample, and one for the index, 8 bytes of it per sample."""

    def __init__(self, store: ObjectFolder, name: str, size: int) -> None:
        """size: bytes of the tar file."""
        self.store, self._name, self._size = store, name, size
        self._index: np.ndarray | None = None
        self._asking = threading.Lock()  # or all threads of a batch would ask for the same index

    def _span(self, number: int) -> tuple[int, int]:
        with self._asking:
            if self._index is None:
                data = self.store.read(f"{self._name}.idx")
                self._index = np.frombuffer(data[: len(data) // 8 * 8], dtype="<u8")
        if number + 1 >= len(self._index):
            _not_in_the_index(number, len(self._index) - 1)
        return int(self._index[number]), int(self._index[number + 1])

    def _whole(self, start: int, length: int) -> bytes:
        return self.store.read(self._name, start, max(0, min(length, self._size - start)))

    def _window(self, start: int, length: int) -> BinaryIO:
        if length <= SMALL_SAMPLE:
            return io.BytesIO(self._whole(start, length))
        size = max(0, min(length, self._size - start))
        reader = RangeFile(lambda place, count: self.store.read(self._name, start + place, count), size)
        return io.BufferedReader(reader, TEXT_BLOCK)


def _read_field_map(where: Path) -> dict[str, str] | None:
    """The field map of a dataset.yaml that `energon prepare` wrote, if it has one."""
    if not where.is_file():
        return None
    try:
        content = yaml.safe_load(where.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{where}: cannot be read as YAML ({error}); fix it or prepare the folder again") from error
    found = content.get("field_map") if isinstance(content, dict) else None
    return {str(name): str(field) for name, field in found.items()} if isinstance(found, dict) else None


class Dataset:
    """One split of DATASET_PATH, an energon folder or a YAML list of them, as one sequence of raw samples.

    Folder after folder, those with repetitions as many times; the rest is as in EnergonFolder.
    """

    def __init__(self, path: str, split: str) -> None:
        self.path = path
        parts = read_parts(path, split)
        self.folders = [
            folder for part in parts for folder in [EnergonFolder(part.path, part.split)] * part.repetitions
        ]
        weights = [part.weight for part in parts]
        # None: every record counts the same.  Else one weight per folder.
        self.weights = None if None in weights else [float(weight) for weight in weights if weight is not None]
        self.starts = [0, *itertools.accumulate(len(folder) for folder in self.folders)]
        self.fingerprint = self.folders[0].fingerprint
        if is_blend(path):
            told = [[folder.fingerprint for folder in self.folders], self.weights]
            self.fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Parts | None:
        folder, own = self._place(index)
        return folder[own]

    def read_text(self, index: int) -> Parts | None:
        """As EnergonFolder.read_text."""
        folder, own = self._place(index)
        return folder.read_text(own)

    @property
    def stored(self) -> bool:
        """Is any of its folders in object storage, where a read is a request?"""
        return any(folder.store for folder in self.folders)

    def reads(self, indices: Sequence[int], with_images: Sequence[bool]) -> list[Callable[[], Parts | None]]:
        """For each record a function that gives dataset[index], or with_images False its read_text, or raises.

        From object storage they are all under way at once, so that a batch waits about as long as one of its records.
        """
        calls = [
            functools.partial(self.__getitem__ if whole else self.read_text, index)
            for index, whole in zip(indices, with_images, strict=True)
        ]
        return at_once(calls) if self.stored else calls

    def name(self, index: int) -> str:
        """As EnergonFolder.name, with the folder where there are several."""
        folder, own = self._place(index)
        return folder.name(own) if len(self.folders) == 1 else f"{folder.path}/{folder.name(own)}"

    @property
    def shard_counts(self) -> np.ndarray:
        """int64 [shards]: records per shard, folder after folder."""
        return np.concatenate([folder.shard_counts for folder in self.folders])

    def _place(self, index: int) -> tuple[EnergonFolder, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.starts, index) - 1
        return self.folders[number], index - self.starts[number]
