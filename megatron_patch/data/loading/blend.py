"""DATASET_PATH as a list of folders: an energon folder, or a YAML file that names several.

The YAML is energon's Metadataset, of either version, as far as it describes a list of folders:

    __module__: megatron.energon
    __class__: MetadatasetV2
    splits:
      train:
        blend:                        # or blend_epochized, with `repetitions: 2` in place of `weight: 2`
          - {path: pretrain/wds, weight: 3}
          - {path: instruct/wds, weight: 1, split_part: train}
      val:
        path: pretrain/wds

Paths start at the YAML file's folder.  The file and any of the folders may be in object storage.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_patch.errors import UserError
from megatron_patch.object_storage import ObjectFolder, StorageError, is_url, join

LISTS = {"blend": "weight", "datasets": "weight", "blend_epochized": "repetitions"}
# Keys of an entry whose absence changes nothing here: subflavors choose cookers, and ours knows the layouts by itself.
WITHOUT_MEANING = {"subflavors", "subflavor", "shuffle_over_epochs_multiplier"}


@dataclass(frozen=True)
class Part:
    """One folder of a dataset."""

    path: str
    split: str
    weight: float | None = None  # share among the folders; None: every record counts the same
    repetitions: int = 1  # times that each record is seen in an epoch


def is_blend(path: str) -> bool:
    """Is this the name of a YAML file?"""
    return Path(path).suffix in (".yaml", ".yml")


def read_parts(path: str, split: str) -> list[Part]:
    """The folders that hold a split of the dataset.  Raises UserError for a YAML file that says something else."""
    if not is_blend(path):
        return [Part(path, split)]
    try:
        content = yaml.safe_load(_text(path))
    except StorageError as error:
        raise UserError(str(error)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error})") from error
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict):
        raise UserError(f"{path}: has no `splits`; wanted energon's Metadataset: splits, train and val below it")
    if split not in splits:
        raise UserError(f"{path}: has no split {split!r} (it has {', '.join(map(str, splits))}); add it below `splits`")
    return _parts(path, split, splits[split])


def _text(path: str) -> str:
    if not is_url(path):
        return Path(path).read_text()
    folder, _, name = path.rpartition("/")
    return ObjectFolder(folder).read(name).decode()


def _parts(path: str, split: str, entry: Any) -> list[Part]:
    kinds = [kind for kind in LISTS if isinstance(entry, dict) and kind in entry]
    if not kinds:
        return [_part(path, split, entry, None)]
    entries = entry[kinds[0]]
    if len(entry) > 1 or not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: split {split}: wanted one of {', '.join(LISTS)}, with a list of folders below it")
    return [_part(path, split, one, LISTS[kinds[0]]) for one in entries]


def _beside(path: str, name: str) -> str:
    """A folder that a YAML file names."""
    if is_url(path) or is_url(name):
        return join(path.rpartition("/")[0], name)
    return str(Path(path).parent / name)


def _part(path: str, split: str, entry: Any, number: str | None) -> Part:
    """One entry; `number`: the name of its number, if it may have one."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise UserError(f"{path}: split {split}: {entry!r} is no folder; wanted {{path: FOLDER, ...}}")
    unknown = entry.keys() - {"path", "split_part", number} - WITHOUT_MEANING
    if unknown:
        raise UserError(
            f"{path}: split {split}: {entry['path']} has {', '.join(sorted(map(str, unknown)))}, which is not known "
            f"here; wanted path, split_part{f' and {number}' if number else ''}"
        )
    folder = _beside(path, entry["path"])
    if is_blend(folder):
        raise UserError(f"{path}: split {split}: {entry['path']} is a YAML file itself; name its folders here")
    part_split = str(entry.get("split_part", split))
    value = entry.get(number, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{path}: split {split}: {entry['path']} has {number} {value!r}; wanted a number above 0")
    if number == "repetitions":
        if value != int(value):
            raise UserError(f"{path}: split {split}: {entry['path']} has repetitions {value}; wanted a whole number")
        return Part(folder, part_split, repetitions=int(value))
    return Part(folder, part_split, weight=float(value) if number else None)
