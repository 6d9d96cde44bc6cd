"""Every kind of source: what stands in it stands in the shards; what cannot be read is rejected by name."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.preparation.pipeline import Options, prepare
from megatron_patch.data.preparation.sources import (
    ChatSource,
    Columns,
    HfDatasetSource,
    LlavaSource,
    QuestionAnswerSource,
    Source,
)
from megatron_patch.data.record import cook
from megatron_patch.errors import UserError
from tests.data.factories import image_bytes
from tests.data.torture import turns

IMAGES = {f"{number}.{kind.lower()}": image_bytes(number, kind=kind) for number, kind in enumerate(["PNG", "JPEG"])}


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with IMAGES."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, data in IMAGES.items():
        (folder / name).write_bytes(data)
    return folder


def converted(source: Source, output: Path) -> tuple[list[dict[str, Any]], dict[int, tuple[str, str]]]:
    """Parts of the samples, `json` decoded, in their order, and {record: (reason, detail)} of the rejections."""
    prepare(source, output, Options((1,), keep_going=True, workers=0))
    folder = EnergonFolder(str(output), "train")
    samples = [folder[number] for number in range(len(folder))]
    for sample in samples:
        cook(sample)  # training reads it
        sample["json"] = json.loads(sample["json"])
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    return samples, {line["record"]: (line["reason"], line["detail"]) for line in lines}


def texts(sample: dict[str, Any]) -> list[str]:
    """What is said in a sample, turn by turn."""
    assert [turn["from"] for turn in sample["json"]["conversations"]][:2] == ["human", "gpt"]
    return [turn["value"] for turn in sample["json"]["conversations"]]


# --- LLaVA


def test_instruction_data_with_several_image_roots(images, tmp_path) -> None:
    """mix665k: images in several folders, text-only records, ids that repeat, JSON lines."""
    (tmp_path / "vg").mkdir()
    (tmp_path / "vg/9.jpg").write_bytes(IMAGES["1.jpeg"])
    records = [
        {"id": "x", "image": "0.png", "conversations": turns("<image>\nq", "a", "r", "b")},
        {"id": "x", "image": "vg/9.jpg", "conversations": turns("<image>\nq", "a")},
        {"id": "t", "model": "", "conversations": turns("hello", "a")},
        {"id": "two", "image": ["0.png", "vg/9.jpg"], "conversations": turns("<image> <image>", "a")},
    ]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    samples, rejected = converted(LlavaSource(tmp_path / "mix.jsonl", [images, tmp_path]), tmp_path / "wds")
    assert rejected == {} and [sample["json"]["id"] for sample in samples] == ["x", "x", "t", "two"]
    assert [sample["json"]["conversations"] for sample in samples] == [record["conversations"] for record in records]
    assert samples[1]["jpg"] == IMAGES["1.jpeg"] and "jpg" not in samples[2]
    assert (samples[3]["jpg"], samples[3]["1.jpg"]) == tuple(IMAGES.values())


def test_the_first_image_root_counts(images, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/0.png").write_bytes(IMAGES["1.jpeg"])
    (tmp_path / "data.json").write_text(json.dumps([{"image": "0.png", "conversations": turns("<image>", "a")}]))
    samples, _ = converted(LlavaSource(tmp_path / "data.json", [tmp_path / "other", images]), tmp_path / "wds")
    assert samples[0]["jpg"] == IMAGES["1.jpeg"]


def test_a_pipe_named_like_a_image_does_not_stop_the_conversion(images, tmp_path) -> None:
    os.mkfifo(images / "pipe.jpg")
    records = [{"image": name, "conversations": turns("<image>", name)} for name in ("pipe.jpg", "0.png")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    samples, rejected = converted(LlavaSource(tmp_path / "data.json", [images]), tmp_path / "wds")
    assert len(samples) == 1 and rejected[0][0] == "image missing"


# --- Chats


def chat(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """ChatML."""
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


PART = {"type": "image"}
CHATS: list[tuple[dict[str, Any], list[str] | str, str | None, int]] = [
    # record, texts or reason, system, images
    (chat(("user", "q"), ("assistant", "a")), ["q", "a"], None, 0),
    (chat(("system", "s"), ("user", "q"), ("assistant", "a")), ["q", "a"], "s", 0),
    (chat(("system", ""), ("user", "q"), ("assistant", "a2")), ["q", "a2"], "", 0),
    (chat(("user", "<image>q"), ("assistant", "a"), images=["0.png"]), ["<image>q", "a"], None, 1),
    (chat(("user", "<image>q"), ("assistant", "a"), images=[{"path": "1.jpeg"}]), ["<image>q", "a"], None, 1),
    (
        chat(("user", [PART, {"type": "text", "text": "q"}]), ("assistant", "a"), images=["0.png"], id="parts"),
        ["<image>\nq", "a"],
        None,
        1,
    ),
    (
        chat(("user", [{"type": "text", "text": "q"}, {**PART, "image": "0.png"}]), ("assistant", "a")),
        ["q\n<image>", "a"],
        None,
        1,
    ),
    (
        chat(
            ("user", [{"type": "image_url", "image_url": {"url": "file://0.png"}}, {**PART, "path": "1.jpeg"}]),
            ("assistant", [{"type": "text", "text": "a"}]),
        ),
        ["<image>\n<image>", "a"],
        None,
        2,
    ),
    (
        {"conversations": [{"from": "system", "value": "s"}, *turns("share", "a", "r", "b")]},
        ["share", "a", "r", "b"],
        "s",
        0,
    ),
    ({"conversations": turns("share <image>", "a"), "image": "0.png"}, ["share <image>", "a"], None, 1),
    ({"conversations": turns("share 2", "a"), "system": "t"}, ["share 2", "a"], "t", 0),
    ({"conversations": turns("share 3", "a"), "system": "", "images": []}, ["share 3", "a"], None, 0),
    ({"conversations": [{"role": "user", "content": "mixed"}, *turns("", "a")[1:]]}, ["mixed", "a"], None, 0),
    (chat(("user", "q"), ("assistant", "a"), ("system", "s")), "roles", None, 0),
    (chat(("system", "s"), ("system", "t"), ("user", "q"), ("assistant", "a")), "roles", None, 0),
    (chat(("system", "s")), "no answer", None, 0),
    (chat(("user", "q"), ("tool", "t"), ("assistant", "a")), "roles", None, 0),
    (chat((["user"], "q"), ("assistant", "a")), "roles", None, 0),
    (chat(("user", "q"), ("user", "r"), ("assistant", "a")), "roles", None, 0),
    (chat(("user", "q"), ("assistant", None)), "malformed", None, 0),
    (chat(("user", [{"type": "audio"}]), ("assistant", "a")), "malformed", None, 0),
    (chat(("user", "q"), ("assistant", "")), "no answer", None, 0),
    (chat(("user", "q"), ("assistant", "a"), images=["0.png"]), "image marks", None, 0),
    (chat(("user", [PART]), ("assistant", "a")), "image marks", None, 0),
    (chat(("user", [{**PART, "image": "0.png"}]), ("assistant", "a"), images=["0.png"]), "image marks", None, 0),
    (chat(("user", "<image>"), ("assistant", "a"), images=["http://x/y.jpg"]), "image missing", None, 0),
    (chat(("user", "<image>"), ("assistant", "a"), images=[3]), "malformed", None, 0),
    ({"conversations": [{"from": "system", "value": "s"}, *turns("q", "a")], "system": "t"}, "roles", None, 0),
    ({"messages": "text"}, "malformed", None, 0),
    ({"text": "text"}, "malformed", None, 0),
]


@pytest.mark.parametrize("lines", [False, True])
def test_chats(images, tmp_path, lines: bool) -> None:
    records = [record for record, *_ in CHATS]
    text = "".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records)
    (tmp_path / "chats.json").write_text(text)
    source = ChatSource(tmp_path / "chats.json", [images])
    assert source.count() == len(CHATS) - 1  # the last one has no conversation at all
    samples, rejected = converted(source, tmp_path / "wds")
    found = {int(sample["__key__"]): sample for sample in samples}
    for number, (_, expected, system, images) in enumerate(CHATS):
        if isinstance(expected, str):
            assert rejected[number][0] == expected, (number, rejected.get(number))
            continue
        assert texts(found[number]) == expected
        assert cook(found[number] | {"json": json.dumps(found[number]["json"])}).system == system
        assert sum(part.endswith("jpg") for part in found[number]) == images
    assert len(found) + len(rejected) == len(CHATS)


# --- Prompts and answers


def make_questions(write: Callable[[str, bytes], None]) -> None:
    """Samples, some of them incomplete."""
    for key, image in (("00", "0.png"), ("dir/01", "1.jpeg"), ("a.b", "0.png"), ("a", "1.jpeg")):
        write(f"{key}.jpg", IMAGES[image])
        write(f"{key}.txt", f"answer {key} 図".encode())
        write(f"{key}.json", json.dumps({"question": f"question {key}"}).encode())
    write("mark.json", b'{"question": "what is <image>?"}')
    write("mark.txt", b"a")
    write("mark.png", IMAGES["0.png"])
    write("no answer.json", b'{"question": "q"}')
    write("no answer.jpg", IMAGES["0.png"])
    write("no image.json", b'{"question": "q"}')
    write("no image.txt", b"a")
    write("no question.txt", b"a")
    write("odd question.json", b'{"question": 3}')
    write("odd question.txt", b"a")
    write("odd question.jpg", IMAGES["0.png"])
    write("latin.json", b'{"question": "q"}')
    write("latin.txt", "é".encode("latin-1"))
    write("latin.jpg", IMAGES["0.png"])
    write("README.md", b"not a part")


EXPECTED_REASONS = {
    "no answer": "no answer",
    "no image": "image missing",
    "no question": "malformed",
    "odd question": "malformed",
    "latin": "malformed",
}


def check_questions(source: Source, output: Path) -> None:
    """All samples and rejections of make_questions."""
    samples, rejected = converted(source, output)
    found = {sample["json"]["id"]: sample for sample in samples}
    assert found.keys() == {"00", "dir/01", "a.b", "a", "mark"}
    for key in ("00", "dir/01", "a.b", "a"):
        assert texts(found[key]) == [f"<image>\nquestion {key}", f"answer {key} 図"]
        assert found[key]["jpg"] == IMAGES["0.png" if key in ("00", "a.b") else "1.jpeg"]
        assert found[key]["json"]["image"] == f"{key}.jpg"
    assert texts(found["mark"]) == ["what is <image>?", "a"]
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == EXPECTED_REASONS and len(rejected) == 5
    assert source.count() == 10


def test_questions_in_a_folder(tmp_path) -> None:
    root = tmp_path / "qa"

    def write(name: str, data: bytes) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    make_questions(write)
    check_questions(QuestionAnswerSource([root]), tmp_path / "wds")
    write("00.png", IMAGES["0.png"])
    _, rejected = converted(QuestionAnswerSource([root]), tmp_path / "twice")
    assert ("malformed", "00.png and another file of its kind have the same key") in rejected.values()


@pytest.mark.parametrize("order", ["as written", "by name", "backwards"])
def test_questions_in_tars(tmp_path, order: str) -> None:
    files: list[tuple[str, bytes]] = []
    make_questions(lambda name, data: files.append((name, data)))
    files = files if order == "as written" else sorted(files, reverse=order == "backwards")
    files.append(("x" * 150 + ".txt", b"long names"))
    tars = [tmp_path / "one.tar", tmp_path / "two.tar"]
    for path, part in zip(tars, (files[:12], files[12:-1]) if order == "as written" else (files[:-1], []), strict=True):
        with tarfile.open(path, "w") as archive:
            for name, data in part:
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    check_questions(QuestionAnswerSource(tars), tmp_path / "wds")


def test_wrong_question_sources_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file; wanted a folder or a tar"):
        QuestionAnswerSource([tmp_path / "absent"])
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match="neither a folder nor an uncompressed tar; unpack it"):
        QuestionAnswerSource([tmp_path / "small.tar.gz"])


# --- Hugging Face datasets


def save(folder: Path, columns: dict[str, list], features: dict[str, Any] | None = None) -> Path:
    """A table on disk."""
    from datasets import Dataset, Features

    table = Dataset.from_dict(columns)
    table = table.cast(Features({**table.features, **(features or {})})) if features else table
    table.save_to_disk(str(folder))
    return folder


def test_a_table_of_images_and_conversations(tmp_path) -> None:
    from datasets import Image, List

    rows = 700  # more than are read at once
    encoded = list(IMAGES.values())
    columns = {
        "id": [f"r{row}" for row in range(rows)],
        "images": [
            [{"bytes": encoded[(row + n) % 2], "path": f"p{row}.jpg" if row % 2 else None} for n in range(row % 3)]
            for row in range(rows)
        ],
        "conversations": [turns("<image>" * (row % 3) + "q", f"answer {row}") for row in range(rows)],
    }
    folder = save(tmp_path / "table", columns, {"images": List(Image())})
    samples, rejected = converted(HfDatasetSource(folder, None, Columns()), tmp_path / "wds")
    assert rejected == {} and len(samples) == rows
    for row, sample in enumerate(samples):
        assert sample["json"]["id"] == f"r{row}" and texts(sample)[1] == f"answer {row}"
        names = ["jpg", "1.jpg"][: row % 3]
        assert [sample[name] for name in names] == [encoded[(row + n) % 2] for n in range(row % 3)]
        assert sum(part.endswith("jpg") for part in sample) == row % 3
    assert samples[1]["json"]["image"] == "p1.jpg" and samples[2]["json"]["image"] == ["row 2.0", "row 2.1"]


def test_a_table_of_questions_selected_and_shuffled(tmp_path, monkeypatch) -> None:
    """A table with an index of its rows, opened anew again and again."""
    from datasets import Dataset, Image

    from megatron_patch.data.preparation.sources import hf_dataset

    encoded = list(IMAGES.values())
    columns = {
        "image": [{"bytes": encoded[row % 2], "path": None} if row % 5 else None for row in range(100)],
        "question": [f"q{row}" if row != 7 else None for row in range(100)],
        "answer": [f"a{row}" for row in range(100)],
    }
    table = Dataset.from_dict(columns).cast_column("image", Image()).shuffle(seed=1)
    table.save_to_disk(str(tmp_path / "table"))
    monkeypatch.setattr(hf_dataset, "IMAGE_BYTES_PER_OPENING", 2000)
    monkeypatch.setattr(hf_dataset, "ROWS_AT_ONCE", 8)
    monkeypatch.setattr(hf_dataset, "ROWS_PER_OPENING", 32)
    samples, rejected = converted(HfDatasetSource(tmp_path / "table", None, Columns()), tmp_path / "wds")
    assert len(samples) == 99 and [reason for reason, _ in rejected.values()] == ["malformed"]
    for sample in samples:
        question, answer = texts(sample)
        row = int(answer[1:])
        assert question == (f"<image>\nq{row}" if row % 5 else f"q{row}")
        assert sample.get("jpg") == (encoded[row % 2] if row % 5 else None)


def test_a_dictionary_of_tables_and_named_columns(images, tmp_path) -> None:
    """Captions, and images given by their names."""
    from datasets import Dataset, DatasetDict

    table = Dataset.from_dict({"file": ["0.png", "absent.png", "1.jpeg"], "words": ["a", "b", "c"], "n": [1, 2, 3]})
    DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(str(tmp_path / "tables"))
    columns = Columns(image="file", caption="words", identifier="n")
    for split, asked in ((None, "none was named"), ("test", "test is not among them")):
        with pytest.raises(UserError, match=f"has the splits train, validation, {asked}; name one"):
            HfDatasetSource(tmp_path / "tables", split, columns, [images])
    source = HfDatasetSource(tmp_path / "tables", "train", columns, [images])
    samples, rejected = converted(source, tmp_path / "wds")
    assert [texts(sample) for sample in samples] == [["<image>", "a"], ["<image>", "c"]]
    assert [sample["json"]["id"] for sample in samples] == ["1", "3"] and rejected[1][0] == "image missing"
    assert samples[1]["jpg"] == IMAGES["1.jpeg"]


def test_turns_stored_column_by_column(tmp_path) -> None:
    """A Sequence of a dict, as older versions of datasets store turns."""
    turns_by_column = {"from": ["human", "gpt"], "value": ["q", "a"]}
    folder = save(tmp_path / "table", {"conversations": [turns_by_column, {"from": ["human"], "value": [None]}]})
    samples, rejected = converted(HfDatasetSource(folder, None, Columns()), tmp_path / "wds")
    assert [texts(sample) for sample in samples] == [["q", "a"]] and rejected[1][0] == "malformed"


def test_columns_that_cannot_be_guessed_are_asked_for(tmp_path) -> None:
    folder = save(tmp_path / "table", {"a": ["x"], "b": ["y"]})
    with pytest.raises(UserError, match=r"columns are a, b; wanted conversations or messages, or question and answer"):
        HfDatasetSource(folder, None, Columns())
    with pytest.raises(UserError, match=r"has no column 'c' for the question, only a, b"):
        HfDatasetSource(folder, None, Columns(question="c", answer="a"))
    with pytest.raises(UserError, match=r"--question-column and --answer-column belong together"):
        HfDatasetSource(folder, None, Columns(question="a"))
    with pytest.raises(UserError, match=r"is no folder that datasets' save_to_disk wrote"):
        HfDatasetSource(tmp_path, None, Columns())
    with pytest.raises(UserError, match=r"one table without splits; leave out --source-split train"):
        HfDatasetSource(folder, "train", Columns(question="a", answer="b"))
