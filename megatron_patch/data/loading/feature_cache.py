"""What a frozen tower makes of every image of a split, written once and read by the train loader in place of decoding.

    DIR/features.json            what the features are of (FeatureKey), their shape, the shards; written last
    DIR/000000.tar.features      of one shard of the dataset: features [rows, P, hidden], record after record, no header
    DIR/000000.tar.json          {"starts": row at which each record's images begin, and the end,
                                  "unusable": {record: [reason, detail]} of those whose image could not be decoded}

Records are counted from 0 in each shard.  What depends on template and length is not in it: the loader finds that
itself, so the same records are left out for the same reasons, with the cache and without.
"""

import bisect
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.atomic_files import write_text
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError
from megatron_patch.geometry import TowerGeometry

VERSION = 1  # raise it when a reader of today would misunderstand the files
MANIFEST = "features.json"
OPEN_SHARDS = 64
UNFINISHED = ".part-"  # in the names of features that are being written
REMEDY = "make it with toolkits/multimodal_data_preprocessing/cache_tower_features.py"
OF_IMAGES = ("side_px", "image_mean", "image_aspect_ratio", "center_crop", "resample", "apply_exif_orientation")


@dataclass(frozen=True)
class FeatureKey:
    """All that decides about features; plain JSON values.  Another value of any is another cache."""

    dataset: str  # fingerprint of the split: shard names, counts and sizes
    images: dict[str, Any]  # how an image becomes pixels, and their statistics
    architecture: dict[str, Any]  # of the tower: its numbers, the layer whose features are taken
    weights: str  # sha256 of the tower's, by name, in the dtype
    dtype: str

    @classmethod
    def of(
        cls,
        dataset: str,
        config: DataConfig,
        pixel_std: tuple[float, float, float],
        tower: TowerGeometry,
        weights: str,
        dtype: torch.dtype,
    ) -> "FeatureKey":
        """Key of a run's features."""
        images = {name: getattr(config, name) for name in OF_IMAGES} | {
            "image_tiles": f"{config.tile_columns}x{config.tile_rows}",
            "image_std": pixel_std,
        }
        plain = json.loads(json.dumps([images, asdict(tower)]))  # tuples become lists
        return cls(dataset, *plain, weights, str(dtype).removeprefix("torch."))

    def differences(self, other: "FeatureKey") -> list[str]:
        """`name: this value, now the other`, of all that differ."""
        mine, others = (key._flat() for key in (self, other))
        names = sorted(mine.keys() | others.keys())
        return [
            f"{name}: {_told(mine.get(name))}, now {_told(others.get(name))}"
            for name in names
            if mine.get(name) != others.get(name)
        ]

    def _flat(self) -> dict[str, Any]:
        own = {"dataset": self.dataset, "weights of the tower": self.weights, "dtype": self.dtype}
        return {**self.images, **self.architecture, **own}


def _told(value: Any) -> str:
    """A value for a message; a hash by its first 12 digits."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{32,}", text) else text


class FeatureCache:
    """`cache.read(index)` -> features [N, P, hidden] of a record's images (tiles are images of their own).

    Raises UserError when the folder holds no complete cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            raise UserError(f"FEATURE_CACHE {folder}: no {MANIFEST} in it, so no complete cache of features; {REMEDY}")
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise UserError(f"{manifest}: its version is {content['version']!r}, wanted {VERSION}; {REMEDY}")
            self.key = FeatureKey(**{field.name: content[field.name] for field in fields(FeatureKey)})
            self.shape: tuple[int, int] = tuple(content["shape"])  # P, hidden
            self._shards = [(str(name), int(records), int(rows)) for name, records, rows in content["shards"]]
            self.dtype: torch.dtype = getattr(torch, self.key.dtype)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{manifest} is damaged ({error!r}); remove {folder} and {REMEDY}") from None
        self._row_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self._starts = [0, *itertools.accumulate(records for _, records, _ in self._shards)]
        for name, _, rows in self._shards:
            data, index = shard_files(self.folder, name)
            if not index.is_file() or not data.is_file() or data.stat().st_size != rows * self._row_bytes:
                raise UserError(
                    f"{data}: it or its .json is missing, or it has not the {rows * self._row_bytes} bytes that "
                    f"{MANIFEST} tells; copy the folder again, or remove it and {REMEDY}"
                )
        self._open = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        """Records."""
        return self._starts[-1]

    def check(self, wanted: FeatureKey) -> None:
        """Raise UserError unless these are the features that are wanted."""
        if different := self.key.differences(wanted):
            raise UserError(
                f"FEATURE_CACHE {self.folder}: was made of something else ({'; '.join(different)}); {REMEDY} "
                "of this dataset, checkpoint and image settings, or leave FEATURE_CACHE out"
            )

    def none(self) -> Tensor:
        """Features of no image, [0, P, hidden]."""
        return torch.empty(0, *self.shape, dtype=self.dtype)

    def read(self, index: int, wanted: bool = True) -> Tensor:
        """Features of record `index` of the split, [N, P, hidden]; not wanted: of no image.

        Raises:
            RecordError: one of its images cannot be decoded; reason and particulars as decoding tells them.
        """
        number = bisect.bisect_right(self._starts, index) - 1
        shard, own = self._open(number), index - self._starts[number]
        if str(own) in shard.unusable:
            raise RecordError(*shard.unusable[str(own)])
        first, last = shard.starts[own : own + 2]
        if not wanted or first == last:
            return self.none()
        features = torch.empty(last - first, *self.shape, dtype=self.dtype)
        view = memoryview(features.view(-1).view(torch.uint8).numpy())
        # at a place of its own, not the file's: forked workers share that
        read = os.preadv(shard.file.fileno(), [view], first * self._row_bytes)
        if read != len(view):
            raise UserError(f"{shard.file.name}: ends {len(view) - read} bytes early; copy {self.folder} again")
        return features

    def _open_shard(self, number: int) -> "_Shard":
        data, index = shard_files(self.folder, self._shards[number][0])
        content = json.loads(index.read_text(encoding="utf-8"))
        return _Shard(content["starts"], content["unusable"], data.open("rb", buffering=0))


@dataclass(frozen=True)
class _Shard:
    starts: list[int]
    unusable: dict[str, list[str]]
    file: Any  # open for reading


def shard_files(folder: Path, name: str) -> tuple[Path, Path]:
    """(features, index) of a shard of the dataset."""
    return folder / f"{name}.features", folder / f"{name}.json"


class ShardWriter:
    """Writes one shard's two files; the index comes last, and without it the shard is not there.

    Records and features are told apart, so that images of several records go through the tower together.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._data, self._index = shard_files(folder, name)
        self._data.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: a node that was given up for dead may still be writing the same shard
        self._unfinished = self._data.with_name(f"{self._data.name}{UNFINISHED}{os.urandom(8).hex()}")
        self._file = self._unfinished.open("wb")
        self._starts, self._unusable = [0], {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._unfinished.replace(self._data)
            write_text(self._index, json.dumps({"starts": self._starts, "unusable": self._unusable}), durable=True)
        else:
            self._unfinished.unlink()

    @property
    def rows(self) -> int:
        """Rows of the records told so far."""
        return self._starts[-1]

    def add_record(self, images: int, problem: tuple[str, str] | None) -> None:
        """The next record has so many images whose features will come, or cannot be used."""
        if problem is not None:
            self._unusable[str(len(self._starts) - 1)] = problem
        self._starts.append(self.rows + images)

    def add_features(self, features: Tensor) -> None:
        """The next rows [n, P, hidden], on the CPU."""
        self._file.write(memoryview(features.contiguous().view(-1).view(torch.uint8).numpy()))


def remove_unfinished(folder: Path, names: Iterable[str]) -> None:
    """What processes that were killed have left of these shards, which others have made since."""
    kept = {file for name in names for file in shard_files(folder, name)} | {folder / MANIFEST}
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()


def shard_rows(folder: Path, name: str) -> int | None:
    """Rows of a shard that is finished, else None."""
    index = shard_files(folder, name)[1]
    return json.loads(index.read_text(encoding="utf-8"))["starts"][-1] if index.is_file() else None


def write_manifest(file: Path, key: FeatureKey, **more: object) -> None:
    """Write what a folder's features are of, whole or not at all; more: shape, shards."""
    write_text(file, json.dumps({"version": VERSION, **asdict(key), **more}, indent=1) + "\n", durable=True)
