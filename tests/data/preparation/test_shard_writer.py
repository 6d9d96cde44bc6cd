"""Streams, shards and splits: what the converters write is what energon itself makes."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_patch.data.loading import DataConfig, build_train_loader
from megatron_patch.data.preparation import json_stream
from megatron_patch.data.preparation.pipeline import SplitChooser, stream_records
from megatron_patch.data.preparation.shard_writer import tar_header
from megatron_patch.data.preparation.verification import reopen, reopen_with_energon
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError
from tests.data.factories import image_bytes, write_shards
from tests.data.torture import turns

ROOT = Path(__file__).parents[3]
CONVERTER = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"


def test_two_older_layouts_train(settings: DataConfig, tmp_path) -> None:
    """json as a list of turns (Pai-Megatron-Patch), and json {question} + txt + jpg."""
    samples = [
        {"jpg": image_bytes(1), "json": json.dumps(turns("<image>\nwhat?", "a digit")).encode()},
        {"jpg": image_bytes(2), "json": b'{"question": "what?"}', "txt": b"a digit"},
    ]
    write_shards(tmp_path, samples, per_shard=10)
    batch = next(build_train_loader(str(tmp_path), settings, 0, 1))
    assert torch_equal(batch["tokens"][0], batch["tokens"][1]) and len(batch["pixels"]) == 2
    assert sorted(batch["record_ids"]) == ["train-000000.tar/00000000", "train-000000.tar/00000001"]


def torch_equal(left, right) -> bool:
    import torch

    return torch.equal(left, right)


def test_index_is_byte_equal_to_energons_own(folder: str, tmp_path) -> None:
    shards = sorted(Path(folder).glob("*.tar"))
    for shard in shards:
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    # Its own checks run too: unique keys, readable archives.
    subprocess.run(
        [Path(sys.executable).with_name("energon"), "prepare", tmp_path, "--non-interactive", "--no-progress",
         "--split-ratio", "9,1,0", "--num-workers", "1", "--sample-type", "CrudeWebdataset"],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for shard in shards:
        assert (tmp_path / f"{shard.name}.idx").read_bytes() == Path(f"{shard}.idx").read_bytes()
    theirs = json.loads((tmp_path / ".nv-meta/.info.json").read_text())
    assert theirs == json.loads((Path(folder) / ".nv-meta/.info.json").read_text())


def test_headers_equal_those_of_tarfile() -> None:
    for name, size in (("00000000.jpg", 0), ("12345678.json", 1234567), ("00000001.10.jpg", 8**11 - 1)):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        theirs = info.tobuf(tarfile.USTAR_FORMAT)
        assert tar_header(name, size) == theirs


def test_shards_and_splits(folder: str) -> None:
    assert reopen_with_energon(Path(folder), ["train", "val"]) == {"train": 93, "val": 10} == reopen(Path(folder))
    train = [path.name for path in Path(folder).glob("train-*.tar")]
    assert len(train) == 10  # of 10 samples, though 1000 are allowed
    assert not list(Path(folder).parent.glob("wds.*"))


@pytest.mark.parametrize("damage", ["shard", "index", "image", "counts"])
def test_reopening_sees_damage(folder: str, tmp_path, damage: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "wds"))
    assert reopen(copy) == {"train": 93, "val": 10}
    shard = copy / "val-000000.tar"
    if damage == "shard":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif damage == "index":
        index = np.fromfile(f"{shard}.idx", dtype="<u8")
        index[:-1].tofile(f"{shard}.idx")
    elif damage == "image":
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x89PIG"))
    else:
        (copy / "train-000000.tar").rename(copy / "train-000099.tar")
    with pytest.raises((AssertionError, FileNotFoundError, RecordError)):
        reopen(copy)


@hypothesis_settings(max_examples=60, deadline=None)
@given(ratio=st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)), blocks=st.integers(1, 5))
def test_splits_get_exactly_their_share(ratio: tuple[int, int, int], blocks: int) -> None:
    chooser = SplitChooser(ratio)
    dealt = [chooser.next() for _ in range(blocks * sum(ratio))]
    assert dealt[0] == "train"
    assert [dealt.count(split) for split in ("train", "val", "test")] == [share * blocks for share in ratio]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(max_examples=100, deadline=None)
@given(records=st.lists(json_values, max_size=8), indent=st.sampled_from([None, 1]), piece=st.integers(1, 40))
def test_streamed_json_equals_json_load(tmp_path_factory, records, indent, piece) -> None:
    from megatron_patch.data.preparation import json_stream as module

    path = tmp_path_factory.mktemp("json") / "data.json"
    path.write_text(json.dumps(records, indent=indent))
    saved, module.READ_BYTES = module.READ_BYTES, piece
    try:
        assert list(stream_records(path)) == records
        path.write_text("".join(json.dumps({"record": record}) + "\n" for record in records))
        assert list(stream_records(path)) == [{"record": record} for record in records]
    finally:
        module.READ_BYTES = saved


@pytest.mark.parametrize("text", ["[{]", '[{"a": 1}', '[{"a": 1}] x', "{'a': 1}", '[{"a": 1} , {"b" 2}]', "hello"])
def test_broken_json_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError, match="wanted a JSON list of records"):
        list(stream_records(path))


def test_text_in_another_encoding_is_refused(tmp_path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        list(stream_records(path))


@pytest.mark.parametrize("read_bytes", [1, 5, 17, 1 << 20])
def test_records_are_counted_by_their_key(tmp_path, monkeypatch, read_bytes: int) -> None:
    monkeypatch.setattr(json_stream, "READ_BYTES", read_bytes)
    records = [{"conversations": ['a text about "conversations"']}, {"messages": []}, {"text": "other messages"}] * 3
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert json_stream.count_key(tmp_path / "data.json", ["conversations", "messages"]) == 6
    assert json_stream.count_key(tmp_path / "data.json", ["conversations"]) == 3
