"""What an older commit left on disk still loads: datasets, checkpoints, interrupted work and exports.

Only public commands are used, so that the test outlives every renaming inside.  Losses were printed on one CPU; another
one may round the last digit otherwise, so they are compared with a relative tolerance of 1e-5.
"""

import filecmp
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.older_formats import make_older_formats as older
from tests.training.launching import losses, run

EXPECTED = json.loads((older.DATA / "expected.json").read_text())
INFO = ".nv-meta/.info.json"
WORDED = ("ledger.json", "rejected.jsonl")
LENGTHS = "llava_lengths_*.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything unpacked; each test writes under names of its own."""
    folder = tmp_path_factory.mktemp("older")
    older.unpack(folder)
    return folder


def files_of(folder: Path) -> list[str]:
    """Files of an energon folder, without the lengths that a run leaves there."""
    lengths = set(folder.rglob("llava_lengths_*"))
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path not in lengths)


def spelled_today(value: Any) -> Any:
    """Text, or JSON, as today's messages say it: images were once `pictures`."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("not a picture", "not an image").replace("no picture", "no image").replace("picture", "image")
    return text if isinstance(value, str) else json.loads(text)


def worded(file: Path) -> list[Any]:
    """The JSON values of ledger.json, or of the lines of rejected.jsonl, as spelled today."""
    text = spelled_today(file.read_text())
    return [json.loads(part) for part in (text.splitlines() if file.suffix == ".jsonl" else [text])]


def assert_same_files(one: Path, other: Path) -> None:
    """Two energon folders of the same names and bytes, but for energon's version and the wording of rejections."""
    names = files_of(one)
    assert names == files_of(other)
    names.remove(INFO)
    for name in WORDED:
        names.remove(name)
        assert worded(one / name) == worded(other / name)
    counts, others = (json.loads((folder / INFO).read_text())["shard_counts"] for folder in (one, other))
    assert counts == others
    same, different, unread = filecmp.cmpfiles(one, other, names, shallow=False)
    assert same and not different and not unread, different + unread


@pytest.mark.slow
def test_the_dataset_has_the_same_figures(folder: Path) -> None:
    assert spelled_today(older.inspect(folder)) == spelled_today(EXPECTED["inspect"])


def test_the_killed_conversion_goes_on(folder: Path) -> None:
    whole, again = folder / "records/wds", folder / "records/again"
    before = {path.name: path.stat().st_mtime_ns for path in again.with_name("again.partial").glob("*.tar")}
    done = subprocess.run(older.convert_records(folder, "again", "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(spelled_today(older.conversion_report(done.stdout))) == sorted(spelled_today(EXPECTED["conversion"]))
    assert_same_files(again, whole)
    kept = [name for name, written in before.items() if (again / name).stat().st_mtime_ns == written]
    assert len(before) - 1 <= len(kept) < len(list(again.glob("*.tar"))), "the journal's shards were written again"


def test_a_new_conversion_gives_the_old_bytes(folder: Path) -> None:
    """Reasons of rejections and shards alike: an interrupted conversion may mix what both versions wrote."""
    done = subprocess.run(older.convert_records(folder, "anew"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_files(folder / "records/anew", folder / "records/wds")


def resume(folder: Path, name: str, settings: dict[str, object], **changes: object) -> str:
    """Go on with a copy of the run `name` by its own command, and compare with the one that was never stopped."""
    expected, output = EXPECTED[name], folder / f"{name}_resumed"
    shutil.copytree(folder / name, output, symlinks=True)
    printed = run(older.workspace(folder), output, **settings, **changes)
    assert older.after_the_save(printed) == pytest.approx(expected["losses"], rel=1e-5)
    assert min(losses(printed)) > older.SAVED_AT, "it did not resume"
    assert spelled_today(older.account_of(output)) == spelled_today(expected["records"])
    return printed


@pytest.mark.slow
def test_the_checkpoint_exports_the_same(folder: Path) -> None:
    older.convert_checkpoint(folder, "plain/checkpoint", "exported_now", to_hub=True)
    before, now = (load_file(folder / name / "model.safetensors") for name in ("exported", "exported_now"))
    assert before.keys() == now.keys() and len(now) > 40
    assert all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.slow
def test_the_old_checkpoint_begins_stage_2(folder: Path) -> None:
    loss = older.first_loss(folder, "stage_2", "plain/checkpoint", script=older.STAGE_2)
    assert loss == pytest.approx(EXPECTED["first loss of stage 2"], rel=1e-5)


@pytest.mark.slow
def test_the_release_checkpoint_begins_a_run(folder: Path) -> None:
    loss = older.first_loss(folder, "from_release", "checkpoint")
    assert loss == pytest.approx(EXPECTED["first loss from release"], rel=1e-5)


def test_the_run_goes_on(folder: Path) -> None:
    """Optimizer, schedule, data position, left-out iterations, best checkpoint and average, all from the old files."""
    printed = resume(folder, "plain", older.PLAIN, CHECK="true")
    assert printed.count("is left out, as asked") == 1 and "no average" not in printed
    found = json.loads((folder / "plain_resumed/checkpoint/best.json").read_text())
    assert found["iteration"] == EXPECTED["plain"]["best"]["iteration"]
    assert found["loss"] == pytest.approx(EXPECTED["plain"]["best"]["loss"], rel=1e-5)
    assert older.probe_of_average(folder, "plain_resumed") == pytest.approx(
        EXPECTED["plain"]["average"], rel=1e-4, abs=1e-6
    )


@pytest.mark.slow
def test_the_packed_run_goes_on(folder: Path) -> None:
    """Rows by the old lengths, the distributed optimizer's state, and the losses that the old notes remember."""
    meta = folder / "records/wds/.nv-meta"
    (lengths,) = meta.glob(LENGTHS)
    written = lengths.stat().st_mtime_ns
    printed = resume(folder, "packed", older.PACKED, SPIKE_FACTOR=EXPECTED["packed"]["SPIKE_FACTOR"])
    assert printed.count("is dropped") == EXPECTED["packed"]["dropped"] > 0
    assert list(meta.glob(LENGTHS)) == [lengths] and lengths.stat().st_mtime_ns == written
    assert "measuring lengths" not in printed


def test_transformers_loads_the_export(folder: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model, told = LlavaForConditionalGeneration.from_pretrained(folder / "exported", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    stored = load_file(folder / "exported/model.safetensors")
    (name,) = (name for name in stored if name.endswith(older.PROBED))
    assert torch.equal(model.state_dict()["model." + older.PROBED], stored[name])
