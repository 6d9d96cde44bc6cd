"""Folders: the same samples as energon's reader, damage named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from megatron_patch.data.loading import DataConfig, build_train_loader
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.errors import UserError
from tests.data.factories import changed


def test_samples_equal_those_of_energons_reader(folder: str) -> None:
    meta = WebdatasetMeta.from_config(EPath(folder), split_part="train")
    theirs = ShardInfosITarReader(EPath(folder), meta.shards)
    ours = EnergonFolder(folder, "train")
    assert len(ours) == len(theirs) == 93
    for index in np.random.default_rng(0).permutation(93):
        wanted = {
            name: part for name, part in theirs[int(index)].items() if name not in ("__restore_key__", "__sources__")
        }
        assert ours[int(index)] == wanted


def test_texts_are_read_without_the_images(folder: str) -> None:
    energon_folder = EnergonFolder(folder, "train")
    for index in range(0, len(energon_folder), 7):
        whole, text = energon_folder[index], energon_folder.read_text(index)
        assert whole.keys() == text.keys()
        assert {name: whole[name] for name in whole if name != "jpg"} == {n: text[n] for n in text if n != "jpg"}
        assert text.get("jpg", b"") == b""


def test_excluded_samples_are_left_out_and_counted(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "wds")
    split = tmp_path / "wds/.nv-meta/split.yaml"
    parts = EnergonFolder(folder, "train")
    keys = [f"{parts[index]['__shard__']}/{parts[index]['__key__']}" for index in (0, 17)]
    split.write_text(split.read_text().replace("exclude: []", "exclude:\n" + "".join(f"- {key}\n" for key in keys)))
    loader = build_train_loader(str(tmp_path / "wds"), changed(settings, micro_batch_size=1), 0, 1)
    seen = [next(loader)["record_ids"][0] for _ in range(93)]
    assert seen.count("") == 2 and loader.counts == {"kept": 91, "truncated": 0, "skipped": 0, "excluded": 2}


def test_damaged_shards_are_named_not_silent(folder: str, settings: DataConfig, tmp_path: Path, caplog) -> None:
    shutil.copytree(folder, tmp_path / "wds")
    shard = tmp_path / "wds/train-000003.tar"
    data = bytearray(shard.read_bytes())
    offsets = np.fromfile(f"{shard}.idx", dtype="<u8")
    data[int(offsets[4]) : int(offsets[5])] = b"x" * int(offsets[5] - offsets[4])
    shard.write_bytes(data[: int(offsets[9]) + 512])  # sample 4 overwritten, sample 9 cut off
    loader = build_train_loader(str(tmp_path / "wds"), changed(settings, micro_batch_size=1), 0, 1)
    seen = [next(loader)["record_ids"][0] for _ in range(93)]
    assert seen.count("") == loader.counts["skipped: malformed"] == 2
    assert "train-000003.tar[4] skipped: malformed: shard: ReadError" in caplog.text
    assert "train-000003.tar[9] skipped: malformed: shard: ValueError: the file ends" in caplog.text


def test_more_damage_than_tolerated_stops_the_run(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "wds")
    loader = build_train_loader(str(tmp_path / "wds"), changed(settings, num_workers=1), 0, 1)
    for number in (1, 2):  # after the look at the start
        (tmp_path / f"wds/train-00000{number}.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"11 of \d+ records had to be skipped \(malformed 11\).*tolerated are 1%"):
        for _ in range(50):
            next(loader)
    with pytest.raises(
        UserError, match=r"20 of 93 records looked at cannot be used \(malformed 20; .*leave such records"
    ):
        build_train_loader(str(tmp_path / "wds"), settings, 0, 1)
