"""Conversions as a whole: nothing lost, merged or mislabelled; interrupted ones go on; wrong words are refused."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.dataset import Dataset as EnergonDataset
from megatron_patch.data.loading.task_encoder import TaskEncoder
from megatron_patch.data.preparation.deduplication import Deduplicator
from megatron_patch.data.preparation.pipeline import LengthLimit, Options, prepare
from megatron_patch.data.preparation.sources import LlavaSource
from megatron_patch.data.record import cook
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder
from tests import tiny_models
from tests.data.factories import convert_records, image_bytes, make_records, save_tokenizer
from tests.data.torture import make_torture, turns
from toolkits.multimodal_data_preprocessing import command_line
from toolkits.multimodal_data_preprocessing.command_line import limit_of_model

ROOT = Path(__file__).parents[3]
CONVERTER = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"


def run(*words: object) -> subprocess.CompletedProcess:
    """The converter's command line."""
    command = [sys.executable, CONVERTER, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def moved(files: dict[str, bytes], before: Path, after: Path) -> dict[str, bytes]:
    """The files that a source at another place gives: rejections name its folders."""
    names = (f"not in {folder}/images/".encode() for folder in (before, after))
    return files | {"rejected.jsonl": files["rejected.jsonl"].replace(*names)}


def samples_of(folder: Path, split: str) -> dict[str, dict]:
    """{key: parts} of a split, read by energon's own loader."""
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless

    class RawEncoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(stateless(lambda sample: sample))]

        @stateless
        def batch(self, samples: list) -> list:
            return samples

    dataset = get_val_dataset(
        str(folder),
        split_part=split,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        task_encoder=RawEncoder(),
    )
    samples = [sample for (sample,) in itertools.islice(get_loader(dataset), len(dataset))]
    found = {
        sample["__key__"]: {name: sample[name] for name in sample if not name.startswith("__")} for sample in samples
    }
    assert len(found) == len(samples), "energon saw a key twice"
    return found


# --- Nothing lost, merged or mislabelled

IMAGES = [image_bytes(seed, kind=kind) for seed, kind in enumerate(("PNG", "JPEG", "GIF"))]
BROKEN = [b"", IMAGES[1][:200], b"<html>"]

good_records = st.fixed_dictionaries(
    {"text": st.text(st.characters(exclude_categories=["Cs"]), max_size=20), "image": st.sampled_from([0, 1, 2])},
    optional={"id": st.sampled_from(["a", "a.b", "A", "ü/1", "", 7])},
)
record_plans = st.lists(
    st.one_of(
        good_records.map(lambda plan: ("good", plan)),
        good_records.map(lambda plan: ("text only", plan)),
        st.sampled_from([0, 1, 2]).map(lambda which: ("broken image", which)),
        st.sampled_from(["missing", "no answer", "no record"]).map(lambda kind: (kind, None)),
        st.integers(0, 5).map(lambda which: ("again", which)),
    ),
    max_size=40,
)


def write_plan(root: Path, plans: list) -> tuple[list, dict[int, tuple]]:
    """Write source and images; returns the records, and {place: (record, image or None)} of what must be kept."""
    (root / "images").mkdir()
    for number, data in enumerate([*IMAGES, *BROKEN]):
        (root / f"images/{number}.x.y.jpg").write_bytes(data)
    records: list = []
    kept: dict[int, tuple] = {}
    seen = set()
    for place, (kind, plan) in enumerate(plans):
        image = None
        if kind in ("good", "text only"):
            mark = "<image>\n" if kind == "good" else ""
            record = {"conversations": turns(f"{mark}q", f"a {plan['text']}")}
            record |= {"id": plan["id"]} if "id" in plan else {}
            if kind == "good":
                image = plan["image"]
                record["image"] = f"{image}.x.y.jpg"
        elif kind == "broken image":
            record = {"image": f"{len(IMAGES) + plan}.x.y.jpg", "conversations": turns("<image>", f"a{place}")}
        elif kind == "again" and records:
            record = records[plan % len(records)]
        else:
            record = {"missing": {"image": "absent", "conversations": turns("<image>", "a")}}.get(
                kind, [{"id": kind}][0]
            )
        records.append(record)
        content = json.dumps([str(record.get("id")), record.get("conversations"), record.get("image")])
        name = record.get("image")
        fine = "conversations" in record and (name is None or name[0] in "012")
        if fine and content not in seen:
            kept[place] = (record, None if name is None else IMAGES[int(name[0])])
        seen.add(content)
    (root / "data.json").write_text(json.dumps(records, ensure_ascii=place % 2 == 0 if plans else True))
    return records, kept


@hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    plans=record_plans,
    ratio=st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5)),
    samples_per_shard=st.integers(1, 12),
    workers=st.sampled_from([0, 0, 1, 2]),
)
def test_no_record_is_lost_merged_or_mislabelled(plans, ratio, samples_per_shard, workers) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        records, kept = write_plan(root, plans)
        options = Options(ratio, samples_per_shard, keep_going=True, workers=workers)
        source = LlavaSource(root / "data.json", [root / "images"])
        if not kept:
            with pytest.raises(UserError, match=r"holds no records|every one of its"):
                prepare(source, root / "wds", options)
            assert not list(root.glob("wds*"))
            return
        ledger = prepare(source, root / "wds", options)
        assert ledger.records_in == len(records) == len(kept) + ledger.rejected.total()
        rejected = [json.loads(line)["record"] for line in (root / "wds/rejected.jsonl").read_text().splitlines()]
        assert sorted([*rejected, *kept]) == list(range(len(records)))
        found = {}
        assert ledger.written["train"] > 0
        for split, count in ledger.written.items():
            samples = samples_of(root / "wds", split) if count else {}
            assert len(samples) == count and not found.keys() & samples.keys()
            found |= samples
        assert sorted(found) == [f"{place:08d}" for place in kept]
        for place, (record, image) in kept.items():
            parts = found[f"{place:08d}"]
            content = json.loads(parts["json"])
            assert content["conversations"] == record["conversations"]
            assert content["id"] == str(record.get("id", place))
            assert parts.get("jpg") == image and len(parts) == (1 if image is None else 2)


@pytest.mark.parametrize("records", [1, 2, 3])
def test_train_is_never_empty(tmp_path, records: int) -> None:
    """Not in tiny sets, and not when the only records of train turn out to be bad."""
    ratio = (1, 9, 9)
    root = make_records(tmp_path / "in", records)
    assert convert_records(root, ratio=ratio, workers=0).written["train"] >= 1
    content = json.loads((root / "data.json").read_text())
    content[0] |= {"image": "absent.png", "conversations": turns("<image>", "a")}
    (root / "data.json").write_text(json.dumps(content))
    if records == 1:
        return
    ledger = convert_records(root, "bad", ratio=ratio, keep_going=True, workers=0)
    assert ledger.written["train"] >= 1 and sum(ledger.written.values()) == records - 1
    assert len(samples_of(root / "bad", "train")) == ledger.written["train"]


@hypothesis_settings(max_examples=60, deadline=None)
@given(blocks=st.lists(st.lists(st.integers(0, 30), max_size=40), max_size=12))
def test_repeats_are_those_of_a_set(blocks) -> None:
    seen: set[int] = set()
    repeats = Deduplicator()
    for block in blocks:
        expected = []
        for value in block:
            expected.append(value in seen)
            seen.add(value)
        assert repeats.add(np.array(block, dtype=np.uint64)).tolist() == expected


def test_repeats_take_eight_bytes_each() -> None:
    repeats = Deduplicator()
    values = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    for start in range(0, len(values), 500):
        repeats.add(values[start : start + 500])
    assert sum(run.nbytes for run in repeats._runs) <= 8 * len(values) and len(repeats._runs) <= 10


def test_duplicate_ids_are_kept_or_rejected(tmp_path) -> None:
    records = [{"id": "a", "conversations": turns("q", answer)} for answer in ("x", "y", "x")]
    records += [{"conversations": turns("q", "x")}, {"conversations": turns("q", "x")}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = LlavaSource(tmp_path / "data.json", [])
    keep = prepare(source, tmp_path / "keep", Options(keep_going=True, workers=0))
    assert keep.rejected == {"duplicate": 2} and keep.repeated_ids == 1
    options = Options(keep_going=True, reject_duplicate_ids=True, workers=0)
    assert prepare(source, tmp_path / "reject", options).rejected == {"duplicate": 2, "duplicate id": 1}


# --- The same bytes, whoever writes them and however often they are interrupted


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The torture folder, and what its conversion gives."""
    root = tmp_path_factory.mktemp("odd")
    make_torture(root)
    convert_odd(root, root / "once", workers=0)
    return root, files_of(root / "once")


def convert_odd(root: Path, output: Path, **changes: object) -> None:
    options = Options(**{"ratio": (3, 1, 1), "samples_per_shard": 4, "keep_going": True} | changes)
    prepare(LlavaSource(root / "data.json", [root / "images"]), output, options)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_bytes(odd, tmp_path, workers: int) -> None:
    root, expected = odd
    convert_odd(root, tmp_path / "wds", workers=workers)
    assert files_of(tmp_path / "wds") == expected


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_conversion_goes_on_to_the_same_bytes(odd, tmp_path, seed: int) -> None:
    """Killed without warning, several times, at random moments; workers included."""
    root, expected = odd
    generator = random.Random(seed)
    for attempt in itertools.count():
        process = os.fork()
        if process == 0:
            convert_odd(root, tmp_path / "wds", resume=True, workers=generator.choice([1, 2]))
            os._exit(0)
        time.sleep(generator.uniform(0.005, 0.12))
        if attempt < 5:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if status == 0:
            break
        assert attempt < 5 and not (tmp_path / "wds").exists()
    assert files_of(tmp_path / "wds") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["wds"]


@pytest.fixture
def interrupted(odd, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A copy of the source and the output of its conversion, which ended when the third shard was to be entered."""
    from megatron_patch.data.preparation.workspace import WholeWorkspace

    root = tmp_path / "in"
    shutil.copytree(odd[0], root, ignore=shutil.ignore_patterns("once"))
    enter, calls = WholeWorkspace.enter, itertools.count(1)

    def stop_at_third(self, *words) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        enter(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(WholeWorkspace, "enter", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            convert_odd(root, tmp_path / "wds", workers=0)
    assert (tmp_path / "wds.partial").is_dir() and not (tmp_path / "wds").exists()
    return root, tmp_path / "wds"


def test_finished_shards_are_not_written_again(odd, interrupted) -> None:
    root, output = interrupted
    partial = output.with_name("wds.partial")
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    finished = {json.loads(line).get("shard") for line in (partial / "journal.jsonl").read_text().splitlines()}
    convert_odd(root, output, resume=True, workers=0)
    same = {name for name, written in before.items() if (output / name).stat().st_mtime_ns == written}
    assert len(before) > len(same) == 2 and same == finished - {None}
    assert files_of(output) == moved(odd[1], odd[0], root)


def test_an_interrupted_conversion_is_resumed_or_replaced_by_name_only(odd, interrupted) -> None:
    root, output = interrupted
    with pytest.raises(UserError, match=r"wds.partial: is an interrupted conversion; give --resume"):
        convert_odd(root, output, workers=0)
    with pytest.raises(UserError, match=r"samples_per_shard was 4, is now 5"):
        convert_odd(root, output, resume=True, samples_per_shard=5)
    with pytest.raises(UserError, match=r"split was \[3, 1, 1\], is now \[2, 1, 1\]"):
        convert_odd(root, output, resume=True, ratio=(2, 1, 1))
    convert_odd(root, output, overwrite=True, workers=0)
    assert files_of(output) == moved(odd[1], odd[0], root)


def test_a_source_that_changed_is_not_resumed(interrupted) -> None:
    root, output = interrupted
    text = (root / "data.json").read_text()
    (root / "data.json").write_text(text.replace("rgb.jpg", "rgb.png"))
    with pytest.raises(UserError, match=r"are not those it was written from; the source has changed"):
        convert_odd(root, output, resume=True, workers=0)
    (root / "data.json").write_text(text + " ")
    with pytest.raises(UserError, match=r"began differently \(bytes was \d+, is now \d+\)"):
        convert_odd(root, output, resume=True, workers=0)
    assert output.with_name("wds.partial").is_dir()


def test_a_shard_that_was_damaged_meanwhile_is_written_again(odd, interrupted) -> None:
    root, output = interrupted
    shard = sorted(output.with_name("wds.partial").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    (output.with_name("wds.partial") / "train-000999.tar").write_bytes(b"left behind")
    convert_odd(root, output, resume=True, workers=2)
    assert files_of(output) == moved(odd[1], odd[0], root)


def test_who_interrupts_a_conversion_is_told_how_it_goes_on(capsys, monkeypatch, tmp_path) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    assert command_line.run(command_line.parser_of(None).parse_args([]), interrupt) == 130
    assert capsys.readouterr().err == "interrupted; the same command with --resume goes on\n"
    monkeypatch.setattr(command_line, "upload", interrupt)
    assert command_line.upload_converted(tmp_path, "s3://bucket/wds") == 130
    assert capsys.readouterr().err == f"interrupted; upload_dataset.py {tmp_path} s3://bucket/wds uploads it\n"


def test_two_conversions_into_one_folder_are_refused(interrupted, monkeypatch) -> None:
    from megatron_patch.data.preparation import journal

    root, output = interrupted
    monkeypatch.setattr(journal, "SECONDS_FOR_WORKERS_TO_END", 0.2)
    import fcntl

    with (output.with_name("wds.partial") / "journal.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for words in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="another process is converting into it"):
                convert_odd(root, output, workers=0, **words)
    assert list(output.with_name("wds.partial").glob("*.tar"))


def test_a_foreign_folder_is_not_removed(tmp_path) -> None:
    root = make_records(tmp_path / "in", 12)
    (root / "wds.partial").mkdir()
    (root / "wds.partial/mine.txt").write_text("x")
    for words in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="is no interrupted conversion, so it is not removed"):
            prepare(LlavaSource(root / "data.json", [root / "images"]), root / "wds", Options(**words))
    assert (root / "wds.partial/mine.txt").read_text() == "x"


def test_a_full_disk_is_a_sentence_and_can_be_resumed(odd, tmp_path, monkeypatch) -> None:
    from megatron_patch.data.preparation.shard_writer import Shard

    root, expected = odd

    def full(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for workers in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(Shard, "_flush", full)
            with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*give --resume"):
                convert_odd(root, tmp_path / "wds", workers=workers, resume=True)
        assert not list((tmp_path / "wds.partial").glob("*.tar*"))
    convert_odd(root, tmp_path / "wds", resume=True)
    assert files_of(tmp_path / "wds") == expected


def test_a_killed_worker_is_a_sentence_and_can_be_resumed(odd, tmp_path, monkeypatch) -> None:
    from megatron_patch.data.preparation.workers import ShardBuilder

    root, expected = odd
    with monkeypatch.context() as patch:
        patch.setattr(ShardBuilder, "make", lambda self, job: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=r"worker process was killed.*give --resume"):
            convert_odd(root, tmp_path / "wds", workers=2)
    convert_odd(root, tmp_path / "wds", resume=True)
    assert files_of(tmp_path / "wds") == expected


# --- Limits


def test_one_percent_is_allowed_and_a_record_more_is_not(tmp_path) -> None:
    good = [{"id": number, "conversations": turns("q", f"a{number}")} for number in range(198)]
    bad = [{"id": f"bad {number}", "conversations": turns("q")} for number in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(good + bad[:2]))
    source = LlavaSource(tmp_path / "data.json", [])
    assert prepare(source, tmp_path / "fine", Options(workers=0)).rejected == {"no answer": 2}
    for records in (good[:197] + bad, bad + good[:197]):
        (tmp_path / "data.json").write_text(json.dumps(records))
        with pytest.raises(UserError, match=r"3 of the first \d+ records are rejected \(no answer 3\), more than 1% "):
            prepare(source, tmp_path / "stopped", Options(workers=0))
        assert not list(tmp_path.glob("stopped*"))
    options = Options(workers=0, max_rejected_share=0.015)
    assert prepare(source, tmp_path / "wider", options).rejected == {"no answer": 3}


def test_too_many_rejections_stop_early(tmp_path) -> None:
    records = [{"id": number, "conversations": turns("q")} for number in range(5000)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"51 of the first 51 records are rejected"):
        prepare(LlavaSource(tmp_path / "data.json", []), tmp_path / "wds", Options(workers=0))


@pytest.mark.slow
def test_records_that_are_too_long_are_rejected(tmp_path) -> None:
    root = make_records(tmp_path / "in", 10)
    words = ["--tokenizer", save_tokenizer(tmp_path / "tokenizer", "bytelevel"), "--template", "v1"]
    words += ["--image-tokens", "4", "--keep-going"]
    done = run(root, *words, "--max-tokens", "150")
    assert done.returncode == 0, done.stderr
    account = json.loads((root / "wds/ledger.json").read_text())["rejected_by_reason"]
    assert account.keys() == {"too long"} and 0 < account["too long"] < 10
    for line in (root / "wds/rejected.jsonl").read_text().splitlines():
        assert "wanted at most 150" in json.loads(line)["detail"]
    empty = run(root, "--overwrite", *words, "--max-tokens", "9", "--tokenizer", root)
    assert empty.returncode == 2 and "has no tokenizer that transformers can load" in empty.stderr
    refused = run(root, "--max-tokens", "150", "--template", "v1", "--overwrite")
    assert refused.returncode == 2 and "--tokenizer --image-tokens: missing" in refused.stderr


# height, width, as they lie in the file; TURNED are those that EXIF's orientation 6 swaps
SIZES = [(28, 28), (28, 84), (84, 28), (28, 84), (56, 56), (300, 20)]
TURNED = (3,)


@pytest.fixture(scope="module")
def of_any_resolution(tmp_path_factory) -> dict[str, Path]:
    """Hub folders of tiny models, by kind, as far as a length needs them."""
    folder = tmp_path_factory.mktemp("kinds")
    towers = {"llava": "clip", "llava_next": "clip", "llava_onevision": "siglip_last"}
    for kind, tower in towers.items():
        tiny_models.make_tiny_llava(folder / kind, "qwen2", tower=tower, kind=kind)
    return {kind: folder / kind for kind in towers}


def write_sizes(root: Path) -> list[int]:
    """Records with one of SIZES each, then one with two images; returns their numbers."""
    (root / "images").mkdir(parents=True)
    for number, (height, width) in enumerate(SIZES):
        image, exif = Image.new("RGB", (width, height), (number, 0, 0)), Image.Exif()
        if number in TURNED:
            exif[0x0112] = 6
        image.save(root / f"images/{number}.jpg", exif=exif)
    names = [f"{number}.jpg" for number in range(len(SIZES))] + [["0.jpg", "4.jpg"]]
    records = [
        {
            "id": str(number),
            "image": name,
            "conversations": turns("<image>" * (1 + isinstance(name, list)) + "What?", "It."),
        }
        for number, name in enumerate(names)
    ]
    (root / "data.json").write_text(json.dumps(records))
    return list(range(len(records)))


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_lengths_are_those_of_training_at_any_resolution(kind, of_any_resolution, tmp_path, monkeypatch) -> None:
    """At every limit the records that the training's own encoder finds too long, and no image is decoded."""
    limit_of = functools.partial(limit_of_model, of_any_resolution[kind], "qwen")
    folder = LlavaFolder(of_any_resolution[kind])
    settings = DataConfig(
        tokenizer_path=str(folder.path),
        template="qwen",
        image_token_id=folder.geometry().image_token_id,
        image_tokens=16,
        side_px=folder.geometry().tower.side_px,
        image_mean=(0.5, 0.5, 0.5),
        image_aspect_ratio="anyres",
        any_resolution=folder.geometry().any_resolution,
        decoder_seq_len=4096,
        **{"micro_batch_size": 1, "length_multiple": 1, "seed": 0, "num_workers": 0},
    )
    everything = write_sizes(tmp_path)
    source = LlavaSource(tmp_path / "data.json", [tmp_path / "images"])
    prepare(source, tmp_path / "all", Options((1,), workers=0))
    dataset, encoder = EnergonDataset(str(tmp_path / "all"), "train"), TaskEncoder(settings, with_pixels=False)
    lengths = {}
    for index in everything:
        record = cook(dataset[index])
        lengths[int(record.record_id)] = len(encoder.encode_text(record).tokens)
    assert len(set(lengths.values())) >= 5, lengths
    monkeypatch.setattr("megatron_patch.data.image.open_image", None)
    for limit in sorted(set(lengths.values()))[:-1]:
        options = Options((1,), workers=0, keep_going=True, length_limit=limit_of(limit))
        prepare(source, tmp_path / f"at{limit}", options)
        lines = [json.loads(line) for line in (tmp_path / f"at{limit}/rejected.jsonl").read_text().splitlines()]
        assert {int(line["id"]): line["detail"] for line in lines} == {
            number: f"{length} tokens, wanted at most {limit}" for number, length in lengths.items() if length > limit
        }
        assert {line["reason"] for line in lines} == {"too long"}


def test_a_model_of_one_tile_counts_as_image_tokens_does(of_any_resolution, tmp_path) -> None:
    """The same limit and the same words in the journal; a rule adds to these, so that no resume has another."""
    model = of_any_resolution["llava"]
    of_model, given = limit_of_model(model, "qwen", 60), LengthLimit(str(model), "qwen", 16, 60)
    assert of_model == given and given.shape_output() == {
        "tokenizer_path": str(model), "template": "qwen", "image_tokens": 16, "max_tokens": 60
    }  # fmt: skip
    by_rule = [limit_of_model(of_any_resolution[kind], "qwen", 60) for kind in ("llava_next", "llava_onevision")]
    told = [limit.shape_output()["any_resolution"] for limit in by_rule]
    assert told[0] != told[1] and dataclasses.replace(by_rule[0], apply_exif_orientation=False).shape_output() not in (
        by_rule[0].shape_output(),
    )


@pytest.mark.slow
def test_a_record_too_long_at_any_resolution_is_found_by_the_command(of_any_resolution, tmp_path) -> None:
    write_sizes(tmp_path)
    words = ("--model", of_any_resolution["llava_next"], "--template", "qwen", "--max-tokens", "100", "--keep-going")
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    rejected = [json.loads(line) for line in (tmp_path / "wds/rejected.jsonl").read_text().splitlines()]
    assert rejected and {line["reason"] for line in rejected} == {"too long"}


# --- The command line


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
    assert run(root, "--overwrite", "--reopen-with-energon").returncode == 0
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
        (["--max-rejected", "few"], "wanted a percentage"),
        (["--max-rejected", "101%"], "wanted a share from 0% to 100%"),
        (["--workers", "-1"], "wanted at least 0"),
        (["--max-tokens", "9"], "--tokenizer --template --image-tokens: missing"),
        (["--model", "M"], "--template --max-tokens: missing; lengths are checked with --model, --template, "),
        (["--model", "M", "--image-tokens", "9"], "--model M: excludes --image-tokens, which it brings; give either"),
        (["--model", "M", "--template", "v1", "--max-tokens", "9"], "M/llava/config.json: no such file"),
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


def test_a_killed_command_leaves_nothing_that_looks_finished(tmp_path) -> None:
    root = make_records(tmp_path / "in", 40)
    process = subprocess.Popen([sys.executable, CONVERTER, root], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((root / "wds.partial").glob("*.tar")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (root / "wds").exists()
    refused = run(root)
    assert refused.returncode == 2 and "give --resume to go on, or --overwrite" in refused.stderr
    done = run(root, "--resume")
    assert done.returncode == 0 and "40 records in = 40 written" in done.stdout
    assert sorted(path.name for path in root.iterdir()) == ["data.json", "images", "wds"]


def test_more_than_one_percent_rejected_stops_unless_told_to_go_on(tmp_path) -> None:
    root = make_records(tmp_path / "in", 50)
    (root / "images/1.png").unlink()
    stopped = run(root)
    assert stopped.returncode == 2 and not (root / "wds").exists() and not list(root.glob("wds*"))
    assert "(image missing 1), more than 1% of all" in stopped.stderr and "id r0001" in stopped.stderr
    done = run(root, "--keep-going")
    assert done.returncode == 0 and "49 written" in done.stdout and "rejected: image missing: 1" in done.stdout
