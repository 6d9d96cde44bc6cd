"""Converters' core: every record is written or rejected with its reason; the folder is what energon itself makes."""

import errno
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from megatron_patch.data import DataSettings, build_train_loader
from megatron_patch.data.records import SplitChooser, convert, stream_records
from megatron_patch.data.shards import read_back, tar_header
from megatron_patch.data.source import EnergonFolder
from megatron_patch.errors import UserError
from tests.data.making import changed, make_records, picture_bytes

ROOT = Path(__file__).parents[2]
CONVERTER = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def make_torture(root: Path) -> tuple[Path, dict[str, str | None]]:
    """A folder of odd records, and {id: reason of rejection or None}."""
    images = root / "images"
    (images / "sub.dir").mkdir(parents=True)
    (images / "good.png").write_bytes(picture_bytes(1))
    (images / "sub.dir" / "a.b.c.JPG").write_bytes(picture_bytes(2, kind="JPEG"))
    (images / "gif named.jpg").write_bytes(picture_bytes(3, kind="GIF"))
    (images / "half.jpg").write_bytes(picture_bytes(4, (64, 64), "JPEG")[:600])
    (images / "page.png").write_bytes(b"<html>404</html>")
    (images / "empty.png").write_bytes(b"")
    (root / "secret.png").write_bytes(picture_bytes(5))
    Image.new("RGBA", (9, 9), (255, 0, 0, 10)).save(images / "alpha.png")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(images / "deep.png")
    Image.new("CMYK", (9, 9)).save(images / "print.jpg")
    picture = {"image": "good.png", "conversations": turns("<image>\nwhat?", "a")}
    cases: list[tuple[dict | object, str | None]] = [
        ({"id": "plain", **picture}, None),
        ({"id": "subfolder", **picture, "image": "sub.dir/a.b.c.JPG"}, None),
        ({"id": "gif", **picture, "image": "gif named.jpg"}, None),
        ({"id": "alpha", **picture, "image": "alpha.png"}, None),
        ({"id": "deep", **picture, "image": "deep.png"}, None),
        ({"id": "print", **picture, "image": "print.jpg"}, None),
        ({"id": "text only", "conversations": turns("hello", "你好 🎉", "more", "yes")}, None),
        ({"id": "null image", "image": None, "conversations": turns("hello", "b")}, None),
        ({"id": "two", "image": ["good.png", "alpha.png"], "conversations": turns("<image> or <image>?", "b")}, None),
        ({"id": "answer first", **picture, "conversations": turns("", "x", "<image>", "b")[1:]}, None),
        ({"id": "dots.and/slashes\n", **picture}, None),
        ({"id": 17, **picture}, None),
        ({"id": "same id", "conversations": turns("q", "a")}, None),
        ({"id": "same id", "conversations": turns("q", "b")}, None),
        ({"id": "plain", **picture}, "duplicate"),
        ({"id": "absent", **picture, "image": "absent.png"}, "picture missing"),
        ({"id": "outside", **picture, "image": "../secret.png"}, "picture missing"),
        ({"id": "absolute", **picture, "image": str(root / "secret.png")}, "picture missing"),
        ({"id": "a folder", **picture, "image": "sub.dir"}, "picture missing"),
        ({"id": "half", **picture, "image": "half.jpg"}, "picture unreadable"),
        ({"id": "page", **picture, "image": "page.png"}, "picture unreadable"),
        ({"id": "empty", **picture, "image": "empty.png"}, "picture unreadable"),
        ({"id": "no mark", **picture, "conversations": turns("what?", "a")}, "image marks"),
        ({"id": "no picture", "conversations": turns("<image>\nwhat?", "a")}, "image marks"),
        ({"id": "mark in answer", **picture, "conversations": turns("<image>", "a <image>")}, "image marks"),
        ({"id": "too few", **picture, "image": ["good.png"] * 2}, "image marks"),
        ({"id": "no answer", **picture, "conversations": turns("<image>")}, "no answer"),
        ({"id": "blank answer", **picture, "conversations": turns("<image>", "  ")}, "no answer"),
        ({"id": "dangling", **picture, "conversations": turns("<image>", "a", "b")}, "no answer"),
        ({"id": "twice", **picture, "conversations": turns("<image>", "a")[:1] * 2}, "roles"),
        ({"id": "system", **picture, "conversations": [{"from": "system", "value": "x"}]}, "roles"),
        ({"id": "no turns", **picture, "conversations": []}, "malformed"),
        ({"id": "no conversations", "image": "good.png"}, "malformed"),
        ({"id": "number", **picture, "image": 7}, "malformed"),
        ({"id": "value", **picture, "conversations": [{"from": "human", "value": 3}]}, "malformed"),
        ({"id": "surrogate", "conversations": turns("\ud800", "a")}, "malformed"),
        ("just text", "malformed"),
        (None, "malformed"),
        ([1, 2], "malformed"),
        (3, "malformed"),
    ]  # fmt: skip
    (root / "data.json").write_text(json.dumps([record for record, _ in cases]))
    return root / "data.json", [reason for _, reason in cases]


@pytest.fixture(scope="module")
def torture(tmp_path_factory) -> tuple[Path, list[str | None]]:
    """Converted torture folder and the reasons expected, record by record."""
    root = tmp_path_factory.mktemp("torture")
    source, reasons = make_torture(root)
    convert(source, [root / "images"], root / "wds", ratio=(1,), keep_going=True)
    return root, reasons


def test_every_odd_record_is_accounted_for(torture) -> None:
    root, reasons = torture
    assert len(reasons) == 40
    ledger = json.loads((root / "wds/ledger.json").read_text())
    rejected = [json.loads(line) for line in (root / "wds/rejected.jsonl").read_text().splitlines()]
    assert {line["record"]: line["reason"] for line in rejected} == {
        number: reason for number, reason in enumerate(reasons) if reason
    }
    assert ledger["records_in"] == 40 == ledger["rejected"] + sum(ledger["written"].values())
    assert ledger["written"]["train"] == reasons.count(None) == 14
    assert (ledger["repeated_ids"], ledger["text_only"]) == (1, 4)
    assert sum(ledger["rejected_by_reason"].values()) == 26


def test_pictures_and_conversations_arrive_untouched(torture) -> None:
    root, reasons = torture
    records = json.loads((root / "data.json").read_text())
    folder = EnergonFolder(str(root / "wds"), "train")
    good = [record for record, reason in zip(records, reasons, strict=True) if reason is None]
    assert len(folder) == len(good)
    for number, record in enumerate(good):
        parts = folder[number]
        content = json.loads(parts["json"])
        assert content["id"] == str(record["id"]) and content["conversations"] == record["conversations"]
        names = record.get("image") or []
        names = names if isinstance(names, list) else [names]
        found = [parts[name] for name in parts if name not in ("json",) and not name.startswith("__")]
        assert found == [(root / "images" / name).read_bytes() for name in names]


def test_training_reads_the_torture_folder_without_a_loss(torture, settings: DataSettings) -> None:
    root, _ = torture
    loader = build_train_loader(str(root / "wds"), changed(settings, micro_batch_size=1), 0, 1)
    seen = [next(loader)["record_ids"][0] for _ in range(14)]
    assert loader.counts == {"kept": 14, "truncated": 0, "skipped": 0}
    assert len(set(seen)) == 13  # one id stands for two records


def test_a_folder_made_elsewhere_gives_the_same_account_in_training(torture, settings: DataSettings, tmp_path) -> None:
    """Broken records written unchecked, with the same tools, are skipped in training for the same reasons."""
    from megatron_patch.data.shards import ShardWriter, write_meta

    root, reasons = torture
    records = json.loads((root / "data.json").read_text())
    writer = ShardWriter(tmp_path, "train", 7)
    expected: dict[str, int] = {}
    for record, reason in zip(records, reasons, strict=True):
        names = record.get("image") if isinstance(record, dict) else None
        names = [names] if isinstance(names, str) else names if isinstance(names, list) else []
        if reason in ("picture missing", "duplicate") or (isinstance(record, dict) and record.get("id") == "number"):
            continue
        pictures = {f"{number}.jpg": (root / "images" / name).read_bytes() for number, name in enumerate(names)}
        writer.write(writer.samples, {**pictures, "json": json.dumps(record).encode()})
        expected[reason or "kept"] = expected.get(reason or "kept", 0) + 1
    writer.close()
    write_meta(tmp_path, {"train": writer.counts})
    loader = build_train_loader(str(tmp_path), changed(settings, micro_batch_size=1, max_skipped_share=1.0), 0, 1)
    for _ in range(writer.samples):
        batch = next(loader)
        # A skipped record leaves an empty row: nothing trained, no picture, no id.
        if batch["record_ids"] == [""]:
            assert (batch["labels"] == -100).all() and len(batch["pixels"]) == 0
    found = {name.removeprefix("skipped: "): count for name, count in loader.counts.items() if "skipped: " in name}
    assert found | {"kept": loader.counts["kept"]} == expected
    assert loader.counts["skipped"] == sum(found.values())


def test_two_older_layouts_train(settings: DataSettings, tmp_path) -> None:
    """json as a list of turns (Pai-Megatron-Patch), and json {question} + txt + jpg."""
    from megatron_patch.data.shards import ShardWriter, write_meta

    writer = ShardWriter(tmp_path, "train", 10)
    writer.write(0, {"jpg": picture_bytes(1), "json": json.dumps(turns("<image>\nwhat?", "a digit")).encode()})
    writer.write(1, {"jpg": picture_bytes(2), "json": b'{"question": "what?"}', "txt": b"a digit"})
    writer.close()
    write_meta(tmp_path, {"train": writer.counts})
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
    assert read_back(Path(folder), ["train", "val"]) == {"train": 93, "val": 10}
    train = [path.name for path in Path(folder).glob("train-*.tar")]
    assert len(train) == 10  # of 10 samples, though 1000 are allowed
    assert not list(Path(folder).parent.glob("wds.*"))


@hypothesis_settings(max_examples=60, deadline=None)
@given(ratio=st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)), blocks=st.integers(1, 5))
def test_splits_get_exactly_their_share(ratio: tuple[int, int, int], blocks: int) -> None:
    chooser = SplitChooser(ratio)
    dealt = [chooser.next() for _ in range(blocks * sum(ratio))]
    assert [dealt.count(split) for split in ("train", "val", "test")] == [share * blocks for share in ratio]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(max_examples=100, deadline=None)
@given(records=st.lists(json_values, max_size=8), indent=st.sampled_from([None, 1]), piece=st.integers(1, 40))
def test_streamed_json_equals_json_load(tmp_path_factory, records, indent, piece) -> None:
    from megatron_patch.data import records as module

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


def run(*words: object) -> subprocess.CompletedProcess:
    """The converter's command line."""
    command = [sys.executable, CONVERTER, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_command_line_converts_llava_pretrain(tmp_path) -> None:
    root = make_records(tmp_path / "LLaVA Pretrain;touch x", 40)
    (root / "data.json").rename(root / "blip_laion_cc_sbu_558k.json")
    (root / "other.json").write_text("{}")
    done = run(root)
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    assert "40 records in = 40 written (train 36, val 4, test 0) + 0 rejected" in done.stdout
    assert f"shards: {root / 'wds'}" in done.stdout and "run_mcore_llava.sh" in done.stdout
    again = run(root)
    assert again.returncode == 2 and "exists already; give --overwrite" in again.stderr
    before = {path.name: path.read_bytes() for path in (root / "wds").glob("*.tar")}
    assert run(root, "--overwrite").returncode == 0
    assert {path.name: path.read_bytes() for path in (root / "wds").glob("*.tar")} == before
    assert sorted(path.name for path in root.iterdir()) == [
        "blip_laion_cc_sbu_558k.json",
        "images",
        "other.json",
        "wds",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "0,1,0"], "the first at least 1"),
        (["--split", "9;1"], "wanted whole numbers"),
        (["--split", "1,1,1,1"], "up to three"),
        (["--samples-per-shard", "0"], "wanted at least 1"),
        (["--json", "absent.json"], "no such file"),
        (["--image-root", "/absent"], "no such folder"),
        (["--output", "images", "--overwrite"], "no energon folder"),
    ],
)
def test_wrong_words_end_with_code_2_before_anything_is_created(tmp_path, words: list[str], message: str) -> None:
    root = make_records(tmp_path / "in", 12)
    before = sorted(root.rglob("*"))
    words = [str(root / word) if word == "images" else word for word in words]
    done = run(root, *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(root.rglob("*")) == before


def test_a_killed_conversion_leaves_nothing_that_looks_finished(tmp_path) -> None:
    root = make_records(tmp_path / "in", 40)
    process = subprocess.Popen([sys.executable, CONVERTER, root], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(root.glob("wds.tmp-*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (root / "wds").exists()
    convert(root / "data.json", [root / "images"], root / "wds")
    assert json.loads((root / "wds/ledger.json").read_text())["records_in"] == 40


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch) -> None:
    from megatron_patch.data.shards import ShardWriter

    def full(self, number, parts) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "write", full)
    root = make_records(tmp_path / "in", 12)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*give --output"):
        convert(root / "data.json", [root / "images"], root / "wds")
    assert not list(root.glob("wds*"))


def test_more_than_one_percent_rejected_stops_unless_told_to_go_on(tmp_path) -> None:
    root = make_records(tmp_path / "in", 50)
    (root / "images/1.png").unlink()
    stopped = run(root)
    assert stopped.returncode == 2 and not (root / "wds").exists() and not list(root.glob("wds*"))
    assert "(picture missing 1), more than 1% of all 50" in stopped.stderr and "id r0001" in stopped.stderr
    done = run(root, "--keep-going")
    assert done.returncode == 0 and "49 written" in done.stdout and "rejected: picture missing: 1" in done.stdout
