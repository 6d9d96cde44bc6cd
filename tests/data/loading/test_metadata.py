"""Shards of a split: those that energon's WebdatasetMeta tells, refusals by name, and the fingerprint of ever."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.loading.metadata import read_split
from megatron_patch.errors import UserError

SPLIT = """\
split_parts:
  train:
  - train-{000000..000002}.tar
  - "né.tar"
  - left out.tar
  val: [val-000000.tar]
exclude: [left out.tar, "train-000001.tar/{7,8}", train-000002.tar/sample]
"""
COUNTS = {f"train-00000{number}.tar": 10 + number for number in range(3)} | {"né.tar": 4, "left out.tar": 9}


def prepared(folder: Path, split: str = SPLIT, info: str | None = None, name: str = "split.yaml") -> str:
    meta = folder / ".nv-meta"
    meta.mkdir()
    counts = {**COUNTS, "val-000000.tar": 0}
    text = json.dumps({"energon_version": "7.4.1", "shard_counts": counts}) if info is None else info
    (meta / ".info.json").write_text(text)
    (meta / name).write_text(split)
    return str(folder)


@pytest.mark.parametrize("name", ["split.yaml", "split.json"])
def test_shards_and_excludes_are_energons(tmp_path: Path, name: str) -> None:
    split = SPLIT
    if name == "split.json":
        train = ["train-{000000..000002}.tar", "né.tar", "left out.tar"]
        exclude = ["left out.tar", "train-000001.tar/{7,8}", "train-000002.tar/sample"]
        split = json.dumps({"split_parts": {"train": train}, "exclude": exclude})
    found = read_split(prepared(tmp_path, split, name=name), "train")
    energons = WebdatasetMeta.from_config(EPath(tmp_path), split_part="train")
    assert [found.name(number) for number in range(4)] == [shard.name for shard in energons.shards]
    assert found.counts.tolist() == [shard.count for shard in energons.shards] == [10, 11, 12, 4]
    assert found.excludes == energons.sample_excludes and len(found.excludes) == 3
    assert found.names.dtype.kind == "S" and found.counts.dtype == np.int64


@pytest.mark.parametrize(
    ("split", "info", "said"),
    [
        ("split_parts: {test: [x.tar]}", None, "has no split 'train'; convert again"),
        ("split_parts: {train: []}", None, r"cannot be read \(it has no shards\); convert again"),
        ("split_parts: {train: [x.tar]}", None, r"cannot be read \('x.tar'\)"),
        ("split_parts: {train: x.tar}", None, "train is absent or no list"),
        ("- train", None, "split.yaml is no mapping"),
        ("split_parts: {train: [val-000000.tar]}", None, "has no records"),
        (SPLIT, "{}", "shard_counts is absent or no dict"),
        (SPLIT, json.dumps({"shard_counts": dict.fromkeys(COUNTS, "9")}), "not all whole numbers"),
        (SPLIT, json.dumps({"shard_counts": dict.fromkeys(COUNTS, -1)}), "not all whole numbers"),
        (SPLIT, "{", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, split: str, info: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_split(prepared(tmp_path, split, info), "train")


def test_a_folder_without_a_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split 'train' cannot be read"):
        read_split(prepared(tmp_path, name="other.yaml"), "train")


def test_the_fingerprint_is_that_of_ever(folder: str, tmp_path: Path) -> None:
    """Saved states hold it: the SHA-256 of all names, counts and sizes."""
    energons = WebdatasetMeta.from_config(EPath(folder), split_part="train")
    sizes = [[shard.name, shard.count, (Path(folder) / shard.name).stat().st_size] for shard in energons.shards]
    wanted = hashlib.sha256(json.dumps(["train", sizes]).encode()).hexdigest()[:32]
    assert EnergonFolder(folder, "train").fingerprint == wanted
    shutil.copytree(folder, tmp_path / "wds")
    for missing in (f"{sizes[1][0]}.idx", sizes[1][0]):
        (tmp_path / "wds" / missing).unlink()
        with pytest.raises(UserError, match=f"shard {sizes[1][0]} or its .idx file is missing"):
            EnergonFolder(str(tmp_path / "wds"), "train")


def test_of_an_index_two_offsets_are_read(folder: str, tmp_path: Path) -> None:
    copy = tmp_path / "wds"
    shutil.copytree(folder, copy)
    first = EnergonFolder(str(copy), "train").shards[0][0]
    index = copy / f"{first}.idx"
    offsets = np.fromfile(index, dtype="<u8")
    damaged = offsets.copy()
    damaged[3:] = 2**60
    index.write_bytes(damaged.tobytes())
    source, whole = EnergonFolder(str(copy), "train"), EnergonFolder(folder, "train")
    assert [source[number] for number in (0, 1)] == [whole[number] for number in (0, 1)]
    index.write_bytes(offsets[:3].tobytes())
    with pytest.raises(ValueError, match="sample 2 is not in the index of 2 samples"):
        source[2]
