"""Shards of a split, from an energon folder: as energon's WebdatasetMeta, without an object for each shard."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from megatron.energon.epathlib import EPath
from megatron.energon.eyaml import load_yaml_json
from megatron.energon.flavors.webdataset.config import MAIN_FOLDER_NAME
from megatron.energon.flavors.webdataset.metadata import get_dataset_info

from megatron_patch.errors import UserError


@dataclass(frozen=True)
class Split:
    """Shards in the order of their records."""

    names: np.ndarray  # bytes [shards], UTF-8: a tenth of what strings take
    counts: np.ndarray  # int64 [shards], records of each
    excludes: frozenset[str]  # samples that are left out, each "<shard>/<key>"

    def name(self, shard: int) -> str:
        """File of a shard, within the folder."""
        return self.names[shard].decode()


def read_split(path: str, split: str, root: Path | None = None) -> Split:
    """One split of a folder that has a `.nv-meta`, or of which `root` has a copy of it on a disk.

    Raises UserError: it has no such split, or one without shards.
    """
    remedy = "convert again with a share for each split, as in --split 9,1,0"
    where = Path(root or path).absolute()
    folder = EPath(where)
    try:
        counts = _named(get_dataset_info(folder), "shard_counts", dict)
        content = _read_split_file(folder)
        parts = _named(content, "split_parts", dict)
        if split not in parts:
            raise UserError(f"{path}: .nv-meta/split.yaml has no split {split!r}; {remedy}")
        excludes = set(_expanded(content.get("exclude", [])))
        names = [name for name in _expanded(_named(parts, split, list)) if name not in excludes]
        if not names:
            raise ValueError("it has no shards")
        found = np.array([counts[name] for name in names])
        if found.dtype != np.int64 or (found < 0).any():
            raise ValueError("shard_counts are not all whole numbers")
        if not found.any():
            raise UserError(f"{path}: split {split!r} has no records; {remedy}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        told = str(error).replace(str(where), path)
        raise UserError(f"{path}: split {split!r} cannot be read ({told}); {remedy}") from None
    encoded = np.array([name.encode() for name in names])
    return Split(encoded, found, frozenset(name for name in excludes if "/" in name))


def _read_split_file(root: EPath) -> dict[str, Any]:
    """The content of split.yaml, or else of split.json.  Raises OSError, ValueError."""
    meta = root / MAIN_FOLDER_NAME
    try:
        content = load_yaml_json(meta / "split.yaml")
    except FileNotFoundError:
        content = load_yaml_json(meta / "split.json")
    if not isinstance(content, dict):
        raise ValueError("split.yaml is no mapping")
    return content


def _named(content: Any, name: str, kind: type) -> Any:
    """An entry of a mapping.  Raises ValueError where it is absent or no `kind`."""
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{name} is absent or no {kind.__name__}")
    return found


def _expanded(patterns: Iterable[str]) -> Iterator[str]:
    """Names, of which some stand together as in train-{000..099}.tar."""
    for pattern in patterns:
        if any(letter in pattern for letter in "{}\\"):
            yield from braceexpand.braceexpand(pattern)
        else:  # a hundred times as fast
            yield pattern
