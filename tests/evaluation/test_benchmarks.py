"""Readers: each published format gives its questions, and what is wrong with a file is said with file and record."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_patch.errors import UserError
from megatron_patch.evaluation.benchmarks import BENCHMARKS, find_benchmark, read_questions
from megatron_patch.evaluation.metrics import METRICS
from megatron_patch.evaluation.question import Question
from megatron_patch.evaluation.source import Source
from tests.evaluation.published_formats import IMAGE, MAKERS, put_image, put_json

TEXT_ONLY = {"llava": {"1/0"}, "scienceqa": {"5"}, "mmmu": {"validation_Math_2"}}


def read(name: str, data: Path, images: Path | None = None) -> list[Question]:
    return read_questions(find_benchmark(name), Source(data, images))


@pytest.fixture(params=BENCHMARKS)
def made(request, tmp_path):
    return request.param, tmp_path, MAKERS[request.param](tmp_path)


def test_a_reader_finds_its_questions(made):
    name, folder, expected = made
    questions = read(name, folder)
    assert [(one.id, one.prompt, one.references, one.task) for one in questions] == expected
    for question in questions:
        contents = [image if isinstance(image, bytes) else image.read_bytes() for image in question.images]
        marks = question.prompt.count("<image>")
        assert contents == [IMAGE] * (0 if question.id in TEXT_ONLY.get(name, ()) else marks or 1)


def test_an_empty_folder_is_refused(made, tmp_path):
    name, *_ = made
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.*: (no such file|holds no question)"):
        read(name, tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        read(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder; wanted the benchmark's images"):
        read(name, tmp_path / "empty", tmp_path / "nowhere")


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"ai2d", "mmbench", "mmmu", "realworldqa"}))
def test_a_missing_image_is_named_with_its_record(name, tmp_path):
    MAKERS[name](tmp_path)
    images = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == IMAGE)
    for path in images:
        path.unlink()
    with pytest.raises(UserError, match=rf"{tmp_path}/.*{images[0].stem}"):
        read(name, tmp_path)


# What a record must hold: without it, or with another kind of value, file, record and key are named.
KEYS = {
    "llava": ("digits.json", "conversations", "record 0"),
    "textvqa": ("TextVQA_0.5.1_val.json", "answers", "data 0"),
    "gqa": ("testdev_balanced_questions.json", "imageId", "question 201"),
    "vizwiz": ("val.json", "answers", "record 0"),
    "pope": ("coco_pope_popular.json", "label", "line 1"),
    "seed": ("SEED-Bench.json", "answer", "questions 0"),
    "chartqa": ("test_augmented.json", "query", "record 0"),
    "docvqa": ("val_v1.0_withQT.json", "answers", "data 0"),
    "scienceqa": ("problems.json", "choices", "problem 4"),
    "coco_captions": ("captions_val2014.json", "caption", "annotations 0"),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_missing_key_is_named_with_file_and_record(name, tmp_path):
    MAKERS[name](tmp_path)
    file, key, record = KEYS[name]
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text.replace(f'"{key}":', '"other":'))
    with pytest.raises(UserError, match=rf"{file}, {record}: has no '{key}'; it has .*other"):
        read(name, tmp_path)
    (tmp_path / file).write_text(text.replace(f'"{key}":', f'"{key}": 1.5, "other":'))
    with pytest.raises(UserError, match=rf"{file}, {record}: '{key}' is float \('1.5'\), wanted "):
        read(name, tmp_path)
    (tmp_path / file).write_text(text[:-20])
    with pytest.raises(UserError, match=rf"{file}.* is not JSON: "):
        read(name, tmp_path)


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("pope", "coco_pope_popular.json", '"yes"', '"maybe"', "line 1: 'label' is 'maybe', wanted yes or no"),
        ("mme", "existence/000.txt", "\tYes", " Yes", "000.txt, line 1: is .* wanted QUESTION<tab>Yes or No"),
        (
            "mmbench",
            "mmbench_dev.tsv",
            "\tB\tanimals",
            "\tC\tanimals",
            "'answer' is 'C', wanted the letter of",
        ),
        ("mmbench", "mmbench_dev.tsv", "\t0\tx", "\t9\tx", "row 2: 'image' is '9'"),
        ("mmbench", "mmbench_dev.tsv", "\t0\tx", "\tAA!AA\tx", "row 2: 'image' is 'AA!AA'..., wanted base64"),
        ("mmbench", "mmbench_dev.tsv", "1000000", "second", "row 2: 'index' is 'second', wanted a number"),
        (
            "scienceqa",
            "problems.json",
            '"answer": 1',
            '"answer": 2',
            "problem 4: 'answer' is 2, wanted a number",
        ),
        ("scienceqa", "pid_splits.json", '"5"', '"7"', "problems.json: has no '7'"),
        ("seed", "SEED-Bench.json", '"answer": "C"', '"answer": "E"', "'answer' is 'E', wanted the letter of one of 4"),
        ("llava", "digits.json", '"gpt"', '"human"', "record 0: roles"),
        ("llava", "digits.json", '"<image>\\nWhat', '"What', "record 0: image marks: 0 <image> marks, 1 images"),
    ],
)
def test_a_value_that_cannot_be_is_refused(name, file, old, new, message, tmp_path):
    MAKERS[name](tmp_path)
    change(tmp_path / file, old, new)
    with pytest.raises(UserError, match=message):
        read(name, tmp_path)


@pytest.mark.parametrize("name", ["mmmu", "ai2d", "realworldqa"])
def test_a_file_that_is_no_parquet_is_refused(name, tmp_path):
    MAKERS[name](tmp_path)
    path = sorted(tmp_path.rglob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{path}: cannot be read as Parquet"):
        read(name, tmp_path)


def test_rotations_in_a_file_of_mmbench_belong_together(tmp_path):
    MAKERS["mmbench"](tmp_path)
    assert [one.group for one in read("mmbench", tmp_path)] == ["0", "0", "2"]
    change(tmp_path / "mmbench_dev.tsv", "1000000", "1")
    assert [one.group for one in read("mmbench", tmp_path)] == ["", "", ""]


def test_videos_of_seed_are_left_out_and_counted(tmp_path):
    MAKERS["seed"](tmp_path)
    source = Source(tmp_path)
    read_questions(find_benchmark("seed"), source)
    assert source.left_out == {"asks about a video": 1}
    change(tmp_path / "SEED-Bench.json", '"image"', '"video"')
    with pytest.raises(UserError, match=r"holds no question \(2 left out: asks about a video\)"):
        read("seed", tmp_path)


def test_llavas_file_of_scienceqa_gives_the_same_questions(tmp_path):
    expected = MAKERS["scienceqa"](tmp_path)
    records = [
        ("4", "Context: Look.\nWhich?\n<image>", "(A) iron (B) wood", "The answer is B."),
        ("5", "Where?", "(A) here (B) there", "The answer is A."),
    ]
    content = [
        {"id": name, "conversations": [{"from": "human", "value": f"{text}\nOptions: {choices}"}]}
        | ({"image": f"{name}/image.png"} if "<image>" in text else {})
        for name, text, choices, _ in records
    ]
    for record, (*_, answer) in zip(content, records, strict=True):
        record["conversations"].append({"from": "gpt", "value": answer})
    put_json(tmp_path / "llava_test_CQM-A.json", content)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in content))
    for file in ("llava_test_CQM-A.json", "lines.jsonl"):
        questions = read("scienceqa", tmp_path / file)
        assert [(one.id, one.prompt, one.references, one.task) for one in questions] == expected
    change(tmp_path / "lines.jsonl", "(A) iron (B) wood", "iron or wood")
    with pytest.raises(UserError, match=r"lines.jsonl, line 1: wanted choices as"):
        read("scienceqa", tmp_path / "lines.jsonl")


def test_images_may_lie_elsewhere(tmp_path):
    expected = MAKERS["textvqa"](tmp_path / "data")
    shutil.rmtree(tmp_path / "data/train_images")
    put_image(tmp_path / "photos/0a.jpg")
    with pytest.raises(UserError, match=r"data 0: its image 0a.jpg is not in .*train_images or .*--images"):
        read("textvqa", tmp_path / "data")
    assert read("textvqa", tmp_path / "data", tmp_path / "photos")[0].id == expected[0][0]


def test_the_file_itself_is_data_too_and_two_files_are_not(tmp_path):
    MAKERS["llava"](tmp_path)
    assert len(read("llava", tmp_path / "digits.json")) == 3
    shutil.copy(tmp_path / "digits.json", tmp_path / "more.json")
    with pytest.raises(UserError, match=r"holds digits.json, more.json; name one of them"):
        read("llava", tmp_path)


def test_an_id_stands_once(tmp_path):
    MAKERS["llava"](tmp_path)
    change(tmp_path / "digits.json", '"id": "r1"', '"id": "1"')
    with pytest.raises(UserError, match=r"2 questions have the id '1/0'; wanted each id once"):
        read("llava", tmp_path)


def test_every_benchmark_has_a_metric_and_says_its_format():
    assert len(BENCHMARKS) == len(MAKERS) == 15
    for name in BENCHMARKS:
        benchmark = find_benchmark(name)
        assert benchmark.metric in METRICS and "data:" in benchmark.format
    with pytest.raises(UserError, match=r"benchmark is 'vqav2'; wanted one of ai2d, chartqa"):
        find_benchmark("vqav2")
