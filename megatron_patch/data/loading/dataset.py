"""One split of an energon dataset as a sequence of raw samples, read at random positions."""

import bisect
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from megatron_patch.data.loading.blend import is_blend, read_parts
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
        remedy = "convert again with a share for each split, as in --split 9,1,0"
        try:
            found = WebdatasetMeta.from_config(EPath(Path(path).absolute()), split_part=split)
        except AssertionError:
            raise UserError(f"{path}: .nv-meta/split.yaml has no split {split!r}; {remedy}") from None
        except (EmptyDatasetError, FileNotFoundError, KeyError, ValueError) as error:
            raise UserError(f"{path}: split {split!r} cannot be read ({error}); {remedy}") from None
        self._shards = found.shards
        self._excludes = found.sample_excludes
        self.shard_counts = [shard.count for shard in self._shards]
        if sum(self.shard_counts) == 0:
            raise UserError(f"{path}: split {split!r} has no records; {remedy}")
        sizes = []
        for shard in self._shards:
            tar = Path(path) / shard.name
            if not tar.is_file() or not Path(f"{tar}.idx").is_file():
                raise UserError(f"{path}: shard {shard.name} or its .idx file is missing; convert the data again")
            sizes.append([shard.name, shard.count, tar.stat().st_size])
        self.fingerprint = hashlib.sha256(json.dumps([split, sizes]).encode()).hexdigest()[:32]
        self._field_map = _read_field_map(meta / "dataset.yaml")
        self._starts = [0, *itertools.accumulate(self.shard_counts)]
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.shard_counts)

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(name, records) of every shard, in the order of the records."""
        return [(shard.name, shard.count) for shard in self._shards]

    def name(self, index: int) -> str:
        """`shard[number within it]`, for messages about a sample that could not be read."""
        shard = self._shard_of(index)
        return f"{self._shards[shard].name}[{index - self._starts[shard]}]"

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        return self._read(index, with_images=True)

    def read_text(self, index: int) -> dict[str, Any] | None:
        """Like folder[index], with b"" in place of each image, whose bytes are not read."""
        return self._read(index, with_images=False)

    def _read(self, index: int, with_images: bool) -> dict[str, Any] | None:
        number = self._shard_of(index)
        shard = self._open.pop(number, None) or _Shard(Path(self.path) / self._shards[number].name)
        self._open[number] = shard  # the most recently used one comes last
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        name = self._shards[number].name
        parts = shard.read(index - self._starts[number], with_images)
        if f"{name}/{parts['__key__']}" in self._excludes:
            return None
        return {**parts, "__shard__": name, **({"__field_map__": self._field_map} if self._field_map else {})}

    def _shard_of(self, index: int) -> int:
        """Number of the shard that holds the sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bisect.bisect_right(self._starts, index) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class _Shard:
    """Random access to the samples of one tar file through its `.idx` file.

    Energon's own reader (7.4) keeps 1 kB of every sample it ever read, and its file position is shared by forked
    workers; this one reads at given offsets and keeps nothing.
    """

    def __init__(self, tar: Path) -> None:
        self._offsets = np.fromfile(f"{tar}.idx", dtype="<u8")
        self._file = tar.open("rb", buffering=0)

    def read(self, number: int, with_images: bool) -> dict[str, Any]:
        """Parts of a sample and its `__key__`.  Raises OSError, ValueError or TarError for a damaged shard."""
        if number + 1 >= len(self._offsets):
            raise ValueError(f"sample {number} is not in the index of {len(self._offsets) - 1} samples")
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
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
    def shard_counts(self) -> list[int]:
        """Records per shard, folder after folder."""
        return [count for folder in self.folders for count in folder.shard_counts]

    def _place(self, index: int) -> tuple[EnergonFolder, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.starts, index) - 1
        return self.folders[number], index - self.starts[number]
