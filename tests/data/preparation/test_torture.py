"""Odd records and images: the converter accounts for each, and training says the same of those that slip past it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.data.loading import DataConfig, build_train_loader
from megatron_patch.data.loading.dataset import EnergonFolder
from tests.data.factories import changed, convert_records, write_shards
from tests.data.torture import Case, make_torture


@pytest.fixture(scope="module")
def torture(tmp_path_factory) -> tuple[Path, list[Case]]:
    """Converted torture folder and its cases."""
    root = tmp_path_factory.mktemp("torture")
    cases = make_torture(root)
    convert_records(root, ratio=(1,), keep_going=True)
    return root, cases


def image_names(record: object) -> list[str]:
    """Names that are text, where there are any."""
    names = record.get("image") if isinstance(record, dict) else None
    names = names if isinstance(names, list) else [names]
    return [name for name in names if isinstance(name, str)]


def test_every_odd_record_is_accounted_for(torture) -> None:
    root, cases = torture
    assert len(cases) == 100
    rejected = [json.loads(line) for line in (root / "wds/rejected.jsonl").read_text().splitlines()]
    assert [line["record"] for line in rejected] == [i for i, case in enumerate(cases) if case.converter]
    for line in rejected:
        record = cases[line["record"]].record
        assert line["reason"] == cases[line["record"]].converter
        if isinstance(record, dict) and record.get("id") is not None:
            assert line["id"] == record["id"]
        if isinstance(record, dict) and len(str(record.get("image"))) < 1000:
            assert line["file"] == record.get("image")
    ledger = json.loads((root / "wds/ledger.json").read_text())
    kept = [case.record for case in cases if case.converter is None]
    assert ledger["records_in"] == 100 == ledger["rejected"] + len(kept) and len(rejected) == ledger["rejected"]
    assert ledger["written"]["train"] == len(kept) == 48
    assert ledger["text_only"] == sum(not image_names(record) for record in kept)
    assert ledger["repeated_ids"] == 1
    assert sum(ledger["rejected_by_reason"].values()) == 52


def test_images_and_conversations_arrive_untouched(torture) -> None:
    root, cases = torture
    folder = EnergonFolder(str(root / "wds"), "train")
    kept = [(number, case.record) for number, case in enumerate(cases) if case.converter is None]
    assert len(folder) == len(kept)
    for place, (number, record) in enumerate(kept):
        parts = folder[place]
        content = json.loads(parts["json"])
        assert parts["__key__"] == f"{number:08d}"
        record_id = record.get("id")
        assert content["id"] == str(number if record_id is None else record_id)
        assert content["conversations"] == record["conversations"]
        assert content.get("system") == record.get("system")
        found = [parts[name] for name in parts if name != "json" and not name.startswith("__")]
        assert found == [(root / "images" / name).read_bytes() for name in image_names(record)]


def account_of_training(folder: Path, settings: DataConfig, records: int) -> list[str | None]:
    """Record by record: the reason for which the loader skipped it, or None."""
    settings = changed(settings, micro_batch_size=1, order="single", max_skipped_share=1.0)
    loader = build_train_loader(str(folder), settings, 0, 1)
    account = []
    for _ in range(records):
        before = dict(loader.counts)
        batch = next(loader)
        skipped = [
            name.removeprefix("skipped: ")
            for name, count in loader.counts.items()
            if name.startswith("skipped: ") and count > before.get(name, 0)
        ]
        # A skipped record leaves an empty row: nothing trained, no image, no id.
        if skipped:
            assert (batch["labels"] == -100).all() and len(batch["pixels"]) == 0 and batch["record_ids"] == [""]
        account.append(skipped[0] if skipped else None)
    assert loader.counts["kept"] + loader.counts["skipped"] == records
    return account


def test_training_reads_the_converted_folder_without_a_loss(torture, settings: DataConfig) -> None:
    root, _ = torture
    assert set(account_of_training(root / "wds", settings, 48)) == {None, "no trained token"}  # the very long one


def test_a_folder_made_elsewhere_gives_the_same_account_in_training(torture, settings: DataConfig, tmp_path) -> None:
    """Every record written unchecked, in energon's layout, with those of its images that exist."""
    root, cases = torture
    samples = []
    for case in cases:
        found = [] if case.training == "image marks" and case.converter == "image missing" else image_names(case.record)
        images = {f"{place}.jpg": (root / "images" / name).read_bytes() for place, name in enumerate(found)}
        samples.append({**images, "json": json.dumps(case.record).encode()})
    write_shards(tmp_path, samples, per_shard=7)
    account = account_of_training(tmp_path, settings, len(cases))
    assert account == [case.training for case in cases]
    differing = {case.converter for case in cases if case.converter != case.training}
    assert differing == {None, "image missing", "duplicate", "malformed"}


def test_the_script_makes_the_folder(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.torture", tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("100 records in ")
    assert len(json.loads((tmp_path / "expected.json").read_text())) == 100
