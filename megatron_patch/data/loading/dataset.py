"""One split of an energon dataset as a sequence of raw samples, read at random positions."""

import bisect
import hashlib
import io
import itertools
import json
import os
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

from megatron_patch.data.loading.blend import is_blend, read_parts
from megatron_patch.data.loading.metadata import read_split
from megatron_patch.data.record import is_image_part
from megatron_patch.errors import UserError
from megatron_patch.file_window import FileWindow

OPEN_SHARDS = 64


class EnergonFolder:
    """`folder[i]` -> parts of sample i as bytes (json, jpg, ...) with `__key__` and `__shard__`; None if excluded.

    Samples of a folder that was prepared with a field map have it as `__field_map__`.
    Raises UserError when the path is no energon folder, or the split is absent, empty or has missing shards.
    """

    def __init__(self, path: str, split: str) -> None:
        meta = Path(path) / ".nv-meta"
        if not meta.is_dir():
            got = (
                "no .nv-meta folder in it"
                if Path(path).is_dir()
                else "not a folder"
                if Path(path).exists()
                else "absent"
            )
            raise UserError(
                f"{path}: {got}; wanted an energon folder, as "
                "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py writes it"
            )
        self.path = path
        self.split = split
        self._shards = read_split(path, split)
        self.shard_counts = self._shards.counts  # int64 [shards]
        self._starts = np.concatenate(([0], np.cumsum(self.shard_counts)))
        told = hashlib.sha256(f"[{json.dumps(split)}, [".encode())  # the JSON of [split, [[name, count, size], ...]]
        for number, count in enumerate(self.shard_counts.tolist()):
            name = self._shards.name(number)
            tar = f"{path}/{name}"
            if not os.path.isfile(f"{tar}.idx") or not os.path.isfile(tar):
                raise UserError(f"{path}: shard {name} or its .idx file is missing; convert the data again")
            told.update(f"{', ' if number else ''}{json.dumps([name, count, os.path.getsize(tar)])}".encode())
        told.update(b"]]")
        self.fingerprint = told.hexdigest()[:32]
        self._field_map = _read_field_map(meta / "dataset.yaml")
        self._open: OrderedDict[int, _Shard] = OrderedDict()

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

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        return self._read(index, with_images=True)

    def read_text(self, index: int) -> dict[str, Any] | None:
        """Like folder[index], with b"" in place of each image, whose bytes are not read."""
        return self._read(index, with_images=False)

    def _read(self, index: int, with_images: bool) -> dict[str, Any] | None:
        number = self._shard_of(index)
        name = self._shards.name(number)
        shard = self._open.pop(number, None) or _Shard(Path(self.path) / name)
        self._open[number] = shard  # the most recently used one comes last
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        parts = shard.read(index - int(self._starts[number]), with_images)
        if f"{name}/{parts['__key__']}" in self._shards.excludes:
            return None
        return {**parts, "__shard__": name, **({"__field_map__": self._field_map} if self._field_map else {})}

    def _shard_of(self, index: int) -> int:
        """Number of the shard that holds the sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class _Shard:
    """Random access to the samples of one tar file through its `.idx` file.

    Energon's own reader (7.4) keeps 1 kB of every sample it ever read, and its file position is shared by forked
    workers; this one reads at given offsets and keeps nothing.
    """

    def __init__(self, tar: Path) -> None:
        self._file = tar.open("rb", buffering=0)
        self._index = tar.with_name(f"{tar.name}.idx").open("rb", buffering=0)

    def read(self, number: int, with_images: bool) -> dict[str, Any]:
        """Parts of a sample and its `__key__`.  Raises OSError, ValueError or TarError for a damaged shard."""
        # Two offsets at a time, of which each has eight bytes: whole indices would be 8 GB at a billion samples.
        place = os.pread(self._index.fileno(), 16, 8 * number)
        if len(place) < 16:
            samples = os.fstat(self._index.fileno()).st_size // 8 - 1
            raise ValueError(f"sample {number} is not in the index of {samples} samples")
        start, end = struct.unpack("<QQ", place)
        if with_images:
            sample: BinaryIO = io.BytesIO(os.pread(self._file.fileno(), end - start, start))
        else:
            sample = io.BufferedReader(FileWindow(self._file.fileno(), start, end - start), tarfile.BLOCKSIZE)
        if sample.seek(0, os.SEEK_END) < end - start:
            raise ValueError(f"the file ends {end - start - sample.tell()} bytes before the sample does")
        sample.seek(0)
        parts: dict[str, Any] = {}
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

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        folder, own = self._place(index)
        return folder[own]

    def read_text(self, index: int) -> dict[str, Any] | None:
        """As EnergonFolder.read_text."""
        folder, own = self._place(index)
        return folder.read_text(own)

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
