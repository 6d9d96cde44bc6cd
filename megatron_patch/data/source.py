"""One split of an energon folder as a sequence of raw samples, read at random positions."""

import bisect
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from megatron_patch.errors import UserError

OPEN_SHARDS = 64


class EnergonFolder:
    """`folder[i]` -> parts of sample i as bytes (json, jpg, ...) with `__key__` and `__shard__`; None if excluded.

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
        self._starts = [0, *itertools.accumulate(self.shard_counts)]
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.shard_counts)

    def name(self, index: int) -> str:
        """`shard[number within it]`, for messages about a sample that could not be read."""
        shard = self._shard_of(index)
        return f"{self._shards[shard].name}[{index - self._starts[shard]}]"

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        number = self._shard_of(index)
        shard = self._open.pop(number, None) or _Shard(Path(self.path) / self._shards[number].name)
        self._open[number] = shard  # the most recently used one comes last
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        name = self._shards[number].name
        parts = shard.read(index - self._starts[number])
        if f"{name}/{parts['__key__']}" in self._excludes:
            return None
        return {**parts, "__shard__": name}

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

    def read(self, number: int) -> dict[str, Any]:
        """Parts of a sample and its `__key__`.  Raises OSError, ValueError or TarError for a damaged shard."""
        if number + 1 >= len(self._offsets):
            raise ValueError(f"sample {number} is not in the index of {len(self._offsets) - 1} samples")
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        data = os.pread(self._file.fileno(), end - start, start)
        if len(data) < end - start:
            raise ValueError(f"the file ends {end - start - len(data)} bytes before the sample does")
        parts: dict[str, Any] = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                # Which files are parts of a sample, and where a key ends: energon's rules.
                match = split_name_re.match(member.name)
                if not member.isfile() or skip_meta_re.match(member.name) or not match:
                    continue
                key, part = match.groups()
                if parts.setdefault("__key__", key) != key:
                    raise ValueError(f"one sample holds the keys {parts['__key__']} and {key}")
                parts[part] = archive.extractfile(member).read()
        if not parts:
            raise ValueError("the sample has no files")
        return parts
