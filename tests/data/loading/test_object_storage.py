"""Folders in object storage: the records, order, state and fingerprint of the same folder on a disk, whatever the
network does; what does not pass is an error, never a skipped record.
"""

import itertools
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_patch import object_storage
from megatron_patch.data.loading import DataConfig, build_train_loader, build_valid_loader
from megatron_patch.data.loading.dataset import Dataset, EnergonFolder
from megatron_patch.errors import UserError
from megatron_patch.object_storage import Absent, ObjectFolder, StorageError
from tests.data.factories import changed, convert_records, make_records
from tests.data.loading.test_loader import assert_equal_batches, take
from tests.object_store import BUCKET, KEY, SECRET, Store
from toolkits.multimodal_data_preprocessing import inspect_dataset

TRAIN = 30
GIVES_UP_S = 40.0  # who has no patience does so within this time, a busy machine's included
URLS = ("msc://store/some/wds", f"s3://{BUCKET}/some/wds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Energon folder of 33 records, 30 of them in train, in three shards: each request takes moto 20 ms."""
    root = make_records(tmp_path_factory.mktemp("records"), 33)
    convert_records(root)
    return str(root / "wds")


@pytest.fixture(scope="module")
def store(folder: str, object_store: Store) -> Store:
    """With the folder, as some/wds."""
    object_store.put(Path(folder), "some/wds")
    return object_store


@pytest.fixture(autouse=True)
def environment(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where lengths are kept


@pytest.fixture
def impatient() -> Iterator[None]:
    with object_storage.patience(0):
        yield


@pytest.mark.parametrize("url", URLS)
def test_the_same_folder(url: str, folder: str) -> None:
    local, stored = EnergonFolder(folder, "train"), EnergonFolder(url, "train")
    assert (stored.fingerprint, stored.shards) == (local.fingerprint, local.shards)
    for index in range(0, TRAIN, 9):
        assert stored[index] == local[index]
        assert stored.read_text(index) == local.read_text(index)
        assert stored.name(index) == local.name(index)


def test_texts_of_large_samples_are_read_by_ranges(folder: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_patch.data.loading.dataset.SMALL_SAMPLE", 0)
    monkeypatch.setattr("megatron_patch.data.loading.dataset.TEXT_BLOCK", 512)
    local, stored = EnergonFolder(folder, "train"), EnergonFolder(URLS[0], "train")
    for index in range(0, TRAIN, 17):
        assert stored.read_text(index) == local.read_text(index)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_moves_between_disk_and_store(workers: int, folder: str, settings: DataConfig) -> None:
    settings = changed(settings, num_workers=workers)
    whole = take(build_train_loader(folder, settings, 0, 1), 60)
    first = build_train_loader(URLS[0], settings, 0, 1)
    assert_equal_batches(take(first, 20), whole[:20])
    second = build_train_loader(folder, settings, 0, 1, state=first.save_state())
    assert_equal_batches(take(second, 20), whole[20:40])
    third = build_train_loader(URLS[1], settings, 0, 1, state=second.save_state())
    assert_equal_batches(take(third, 20), whole[40:])
    assert third.counts == second.counts | {"kept": 120}


def test_validation_reads_it_too(folder: str, settings: DataConfig) -> None:
    local, stored = (iter(build_valid_loader(path, settings, 0, 1)) for path in (folder, URLS[0]))
    assert_equal_batches(list(itertools.islice(stored, 5)), list(itertools.islice(local, 5)))


def test_blends_name_urls_and_lie_in_a_store(folder: str, store: Store, settings: DataConfig, tmp_path: Path) -> None:
    text = "splits: {train: {blend: [{path: %s, weight: 3}, {path: %s, weight: 1, split_part: val}]}}"
    local, mixed = tmp_path / "local.yaml", tmp_path / "mixed.yaml"
    local.write_text(text % (folder, folder))
    mixed.write_text(text % (URLS[1], folder))
    store.client.put_object(Bucket=BUCKET, Key="some/blend.yaml", Body=(text % ("wds", "../some/wds")).encode())
    wanted = take(build_train_loader(str(local), settings, 0, 1), 20)
    for path in (str(mixed), "msc://store/some/blend.yaml"):
        assert Dataset(path, "train").fingerprint == Dataset(str(local), "train").fingerprint
        assert_equal_batches(take(build_train_loader(path, settings, 0, 1), 20), wanted)


# ---------------------------------------------------------------- lengths


def test_lengths_are_measured_once_and_lie_beside_the_data(
    folder: str, store: Store, settings: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(settings, packing=True)
    wanted = take(build_train_loader(folder, settings, 0, 1), 10)
    assert_equal_batches(take(build_train_loader(URLS[0], settings, 0, 1), 10), wanted)
    (name,) = [name for name in store.names() if "llava_lengths_" in name]
    assert name.startswith("some/wds/.nv-meta/")
    another = tmp_path / "another machine"
    another.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(another))
    monkeypatch.setattr("megatron_patch.data.loading.lengths._measured", None)  # must not be asked again
    assert_equal_batches(take(build_train_loader(URLS[0], settings, 0, 1), 10), wanted)
    store.client.delete_object(Bucket=BUCKET, Key=name)


def test_lengths_stay_here_where_the_store_may_not_be_written(
    folder: str, store: Store, settings: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = changed(settings, packing=True)
    with store.fault(answer=b"403 Forbidden", matching=b"PUT "):
        loader = build_train_loader(URLS[0], settings, 0, 1)
    assert_equal_batches(take(loader, 10), take(build_train_loader(folder, settings, 0, 1), 10))
    assert "access is denied (403 Forbidden)" in caplog.text and "the lengths stay on this machine" in caplog.text
    assert len(list(tmp_path.glob("llava_lengths_*/llava_lengths_*.npy"))) == 1
    assert not [name for name in store.names() if "llava_lengths_" in name]


# ---------------------------------------------------------------- what passes


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"answer": b"503 Service Unavailable", "every": 4}, id="503", marks=pytest.mark.slow),
        pytest.param({"cut_after": 700, "every": 9}, id="cut"),
    ],
)
def test_faults_change_nothing(fault: dict, folder: str, store: Store, settings: DataConfig) -> None:
    wanted = take(build_train_loader(folder, settings, 0, 1), 15)
    loader = build_train_loader(URLS[0], settings, 0, 1)
    with store.fault(**fault, struck=0) as faults:
        assert_equal_batches(take(loader, 15), wanted)
        assert faults.struck > 2
    assert loader.counts == {"kept": 30, "truncated": 0, "skipped": 0}


def test_an_outage_changes_nothing(folder: str, store: Store, settings: DataConfig, caplog) -> None:
    """Longer than MSC and botocore wait by themselves."""
    wanted = take(build_train_loader(folder, settings, 0, 1), 15)
    loader = build_train_loader(URLS[0], settings, 0, 1)
    found = take(loader, 2)
    store.proxy.down()
    threading.Timer(5.0, store.proxy.up).start()
    with caplog.at_level(logging.WARNING):
        found += take(loader, 13)
    assert_equal_batches(found, wanted)
    assert loader.counts == {"kept": 30, "truncated": 0, "skipped": 0}
    assert caplog.text.count("asking again for up to 1200 s") == 1
    assert SECRET not in caplog.text and KEY not in caplog.text


def test_patience_ends(store: Store, impatient: None) -> None:
    stored = EnergonFolder(URLS[0], "train")
    told = r"some/wds/train-0.*: no answer for \d+ s .*EndpointConnectionError"
    with store.proxy.down_for(GIVES_UP_S), pytest.raises(StorageError, match=told):
        stored[0]


def test_an_inspection_shows_the_same(
    folder: str, settings: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--template", "v1", "--tokenizer", settings.tokenizer_path, "--image-tokens", "4", "--side-px", "14"]
    printed, pages = [], []
    for path in (folder, *URLS):
        output = tmp_path / str(len(pages))
        line = ["inspect_dataset.py", path, *words, "--records", "0,5", "--skip-pictures", "--output", str(output)]
        monkeypatch.setattr("sys.argv", line)
        assert inspect_dataset.main() == 0
        printed.append(capsys.readouterr().out.replace(path, "FOLDER").replace(str(output), "OUTPUT"))
        pages.append((output / "report.html").read_text().replace(path, "FOLDER"))
    assert printed[0] == printed[1] == printed[2] and "30 records" in printed[0]
    assert pages[0] == pages[1] == pages[2]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cache_of_msc_on_the_disk_of_a_node(
    workers: int, folder: str, store: Store, settings: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switched on by MSC's own file: the second epoch comes from the disk, the store may be gone."""
    cache = tmp_path / "cache"
    text = store.config.read_text().replace("  store:\n", f"  cached-{workers}:\n    caching_enabled: true\n")
    text += f"cache: {{location: {cache}, size: 1G, cache_line_size: 1M, check_source_version: false}}\n"
    (tmp_path / "msc.yaml").write_text(text)
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    settings = changed(settings, num_workers=workers)
    wanted = take(build_train_loader(folder, settings, 0, 1), 45)
    loader = build_train_loader(f"msc://cached-{workers}/some/wds", settings, 0, 1)
    assert_equal_batches(take(loader, 30), wanted[:30])  # two epochs of 15: what workers fetch ahead is there too
    assert len(list(cache.rglob("*#chunk*"))) >= 3
    with store.proxy.down_for(GIVES_UP_S), object_storage.patience(0):
        assert_equal_batches(take(loader, 15), wanted[30:])
    assert loader.counts == {"kept": 90, "truncated": 0, "skipped": 0}


# ---------------------------------------------------------------- what does not


def test_a_wrong_key_is_refused_and_not_named(store: Store, caplog: pytest.LogCaptureFixture, capfd) -> None:
    with store.fault(answer=b"403 InvalidAccessKeyId"), pytest.raises(UserError) as refused:
        EnergonFolder(URLS[0], "train")
    assert "access is denied (403 InvalidAccessKeyId)" in str(refused.value)
    assert "\n" not in str(refused.value)
    printed = "".join(capfd.readouterr())
    assert not printed and not caplog.records and KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "split", "told"),
    [
        ("msc://other/some/wds", "train", "MSC has no profile 'other'"),
        ("s3://no-such-bucket/some/wds", "train", "there is no such bucket"),
        ("msc://store/some", "train", "msc://store/some: no .nv-meta folder in it; wanted an energon folder"),
        (URLS[0], "test", f"{URLS[0]}: .nv-meta/split.yaml has no split 'test'"),
        ("msc://store/some/no.yaml", "train", "no.yaml: there is no such object"),
    ],
)
def test_what_is_no_dataset(url: str, split: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        Dataset(url, split)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_shard_is_found_at_the_start(folder: str, store: Store) -> None:
    shard = "some/wds/train-000001.tar.idx"
    data = store.client.get_object(Bucket=BUCKET, Key=shard)["Body"].read()
    store.client.delete_object(Bucket=BUCKET, Key=shard)
    try:
        with pytest.raises(UserError, match=r"shard train-000001.tar or its .idx file is missing"):
            EnergonFolder(URLS[0], "train")
    finally:
        store.client.put_object(Bucket=BUCKET, Key=shard, Body=data)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_record_is_skipped_for_what_the_store_does(workers: int, store: Store, settings: DataConfig) -> None:
    """Locally a file that cannot be read is a bad record, and a few of those are tolerated."""
    loader = build_train_loader(URLS[0], changed(settings, num_workers=workers, max_skipped_share=1.0), 0, 1)
    with store.fault(answer=b"403 Forbidden"), pytest.raises(StorageError) as stopped:
        take(loader, 4)
    assert str(stopped.value).startswith(f"{URLS[0]}/") and "\n" not in str(stopped.value)
    assert loader.counts["skipped"] == 0


def test_damage_in_a_shard_is_a_bad_record_still(
    folder: str, store: Store, settings: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    name = "train-000001.tar"
    data = bytearray(Path(folder, name).read_bytes())
    offsets = np.fromfile(Path(folder, f"{name}.idx"), dtype="<u8")
    data[: int(offsets[1])] = b"x" * int(offsets[1])
    store.client.put_object(Bucket=BUCKET, Key=f"some/wds/{name}", Body=bytes(data[: int(offsets[9]) + 512]))
    try:
        settings = changed(settings, micro_batch_size=1, max_skipped_share=0.1)
        loader = build_train_loader(URLS[0], settings, 0, 1)
        seen = [next(loader)["record_ids"][0] for _ in range(TRAIN)]
    finally:
        store.client.put_object(Bucket=BUCKET, Key=f"some/wds/{name}", Body=Path(folder, name).read_bytes())
    assert seen.count("") == loader.counts["skipped: malformed"] == 2
    assert f"{name}[0] skipped: malformed: shard: ReadError" in caplog.text
    assert f"{name}[9] skipped: malformed: shard: ValueError: the file ends" in caplog.text


# ---------------------------------------------------------------- latency


def test_requests_are_under_way_together(store: Store, settings: DataConfig) -> None:
    """The look at the labels and a batch wait a few times, not once for each record."""
    with store.fault(latency_s=0.2, requests=0, most_together=0) as faults:
        loader = build_train_loader(URLS[0], changed(settings, micro_batch_size=12), 0, 1)
        assert TRAIN < faults.requests <= TRAIN + 3 + 8  # one each, the shards' indices, .nv-meta and MSC's listing
        assert faults.most_together >= 8
        faults.most_together = 0
        take(loader, 1)
        assert faults.most_together >= 8


def test_one_rank_looks_for_all(store: Store, settings: DataConfig) -> None:
    with store.fault(requests=0) as faults:
        build_train_loader(URLS[0], settings, 1, 2)
        assert faults.requests < 10


def test_an_orphan_does_not_wait(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader's process whose run was killed would ask for twenty minutes."""
    stored = EnergonFolder(URLS[0], "train")
    parents = itertools.chain([os.getppid()], itertools.repeat(1))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with store.proxy.down_for(GIVES_UP_S), pytest.raises(StorageError, match="no answer"):
        stored[0]


def test_objects(store: Store) -> None:
    folder = ObjectFolder("msc://store/objects")
    folder.write("a/b", b"0123456789")
    assert (
        folder.read("a/b") == b"0123456789" and folder.read("a/b", 3, 4) == b"3456" and folder.read("a/b", 3, 0) == b""
    )
    assert folder.sizes() == {"a/b": 10}
    with pytest.raises(Absent, match=r"objects/c: there is no such object"):
        folder.read("c")
