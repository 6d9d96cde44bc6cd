"""Small benchmarks in their published formats, with made-up content: one maker per benchmark.

A maker writes its files into a folder and returns the questions that a reader has to find: (id, prompt, references,
task).  Every image is IMAGE.
"""

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
from PIL import Image
from pyarrow import parquet

from megatron_patch.evaluation.question import LETTER_ANSWER, SHORT_ANSWER

Expected = list[tuple[str, str, tuple[str, ...], str]]


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = _png()


def put_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(IMAGE)


def put_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def put_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def with_choices(text: str, *choices: str) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False)]
    return "\n".join([text, *lines, LETTER_ANSWER])


def short(text: str) -> str:
    return f"{text}\n{SHORT_ANSWER}"


def llava(folder: Path) -> Expected:
    turns = [("human", "<image>\nWhat colour?"), ("gpt", "red"), ("human", "And the shape?"), ("gpt", "A square.")]
    records = [
        {"id": "r1", "image": "sub/1.png", "conversations": [{"from": who, "value": text} for who, text in turns]},
        {"conversations": [{"from": "human", "value": "One and one?"}, {"from": "gpt", "value": "two"}]},
    ]
    put_image(folder / "images/sub/1.png")
    put_json(folder / "digits.json", records)
    return [
        ("r1/0", "What colour?", ("red",), ""),
        ("r1/1", "And the shape?", ("A square.",), ""),
        ("1/0", "One and one?", ("two",), ""),
    ]


def textvqa(folder: Path) -> Expected:
    put_image(folder / "train_images/0a.jpg")
    answers = ["stop"] * 9 + ["halt"]
    record = {"question_id": 34602, "question": "what does the sign say?", "image_id": "0a", "answers": answers}
    put_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [record]})
    return [("34602", short("what does the sign say?"), tuple(answers), "")]


def gqa(folder: Path) -> Expected:
    put_image(folder / "images/n161.jpg")
    questions = {
        "201": {"question": "Is it red?", "imageId": "n161", "answer": "yes", "types": {"structural": "verify"}},
        "202": {"question": "What is it?", "imageId": "n161", "answer": "square"},
    }
    put_json(folder / "testdev_balanced_questions.json", questions)
    return [("201", short("Is it red?"), ("yes",), "verify"), ("202", short("What is it?"), ("square",), "")]


def vizwiz(folder: Path) -> Expected:
    put_image(folder / "val/VizWiz_val_0.jpg")
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    record = {"image": "VizWiz_val_0.jpg", "question": "What is this?", "answers": answers, "answerable": 0}
    put_json(folder / "val.json", [record | {"answer_type": "unanswerable"}])
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    prompt = f"What is this?\n{hint}\n{SHORT_ANSWER}"
    return [("VizWiz_val_0.jpg", prompt, ("unanswerable",) * 10, "unanswerable")]


def pope(folder: Path) -> Expected:
    put_image(folder / "val2014/COCO_1.jpg")
    for category in ("popular", "random"):
        lines = [
            {"question_id": n, "image": "COCO_1.jpg", "text": f"Is there a {thing}?", "label": label}
            for n, (thing, label) in enumerate([("dog", "yes"), ("cat", "no")], 1)
        ]
        (folder / f"coco_pope_{category}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        (f"{category}/{n}", short(f"Is there a {thing}?"), (label,), category)
        for category in ("popular", "random")
        for n, thing, label in ((1, "dog", "yes"), (2, "cat", "no"))
    ]


def mme(folder: Path) -> Expected:
    text = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    put_image(folder / "existence/000.jpg")  # side by side
    (folder / "existence/000.txt").write_text(text)
    put_image(folder / "artwork/images/7.png")  # in folders of their own
    (folder / "artwork/questions_answers_YN").mkdir()
    (folder / "artwork/questions_answers_YN/7.txt").write_text(text)
    (folder / "eval_tool").mkdir()
    return [
        (f"{name}/{n}", short(question), (label,), name.split("/")[0])
        for name in ("artwork/7", "existence/000")
        for n, question, label in ((0, "Is it red?", "yes"), (1, "Is it blue?", "no"))
    ]


def mmbench(folder: Path) -> Expected:
    encoded = base64.b64encode(IMAGE).decode()
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    rows = [
        [0, "Which?", "", "a cat", "a dog", "", "", "B", "animals", encoded, "x"],
        [1_000_000, "Which?", "nan", "a dog", "a cat", "nan", "nan", "A", "animals", "0", "x"],
        [
            2,
            'Which "one",\nthen?',
            "A hint.",
            "1",
            "2",
            "3",
            "4",
            "D",
            "numbers",
            base64.b64encode(IMAGE).decode(),
            "x",
        ],
    ]
    with (folder / "mmbench_dev.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return [
        ("0", with_choices("Which?", "a cat", "a dog"), ("B",), "animals"),
        ("1000000", with_choices("Which?", "a dog", "a cat"), ("A",), "animals"),
        ("2", with_choices('A hint.\nWhich "one",\nthen?', "1", "2", "3", "4"), ("D",), "numbers"),
    ]


def mmmu(folder: Path) -> Expected:
    image = {"bytes": IMAGE, "path": "1.png"}
    nothing = {f"image_{n}": None for n in range(2, 8)}
    rows = [
        {"id": "validation_Art_Theory_1", "question": "What is in <image 1>?", "options": "['red', \"it's <image 1>\"]"}
        | {"answer": "B", "question_type": "multiple-choice", "image_1": image}
        | nothing,
        {"id": "validation_Math_2", "question": "How many?", "options": "[]"}
        | {"answer": "['4', 'four']", "question_type": "open", "image_1": image}
        | nothing,
    ]
    put_parquet(folder / "Art_Theory/validation-00000-of-00001.parquet", rows[:1])
    put_parquet(folder / "Math/validation-00000-of-00001.parquet", rows[1:])
    first = with_choices("What is in <image>?", "red", "it's <image>")
    return [
        ("validation_Art_Theory_1", first, ("B",), "Art_Theory"),
        ("validation_Math_2", short("How many?"), ("4", "four"), "Math"),
    ]


def seed(folder: Path) -> Expected:
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", ("w", "x", "y", "z"), strict=True)}
    questions = [
        {"question_id": "101", "question": "Which?", "answer": "C", "data_type": "image", "data_id": "img_1"}
        | {"question_type_id": 1}
        | choices,
        {"question_id": "v1", "question": "When?", "answer": "A", "data_type": "video", "data_id": "v.webm"}
        | {"question_type_id": 10}
        | choices,
    ]
    put_image(folder / "SEED-Bench-image/img_1")
    put_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": {"Scene Understanding": 1}})
    return [("101", with_choices("Which?", "w", "x", "y", "z"), ("C",), "Scene Understanding")]


def ai2d(folder: Path) -> Expected:
    row = {"question": "Which part?", "options": ["leaf", "root"], "answer": "1", "image": {"bytes": IMAGE, "path": ""}}
    put_parquet(folder / "data/test-00000-of-00001.parquet", [row, row | {"answer": "0"}])
    prompt = with_choices("Which part?", "leaf", "root")
    return [("0", prompt, ("B",), ""), ("1", prompt, ("A",), "")]


def chartqa(folder: Path) -> Expected:
    put_image(folder / "png/1.png")
    put_json(folder / "test_human.json", [{"imgname": "1.png", "query": "How many?", "label": "14"}])
    put_json(folder / "test_augmented.json", [{"imgname": "1.png", "query": "What share?", "label": "5%"}])
    return [
        ("augmented/0", short("What share?"), ("5%",), "augmented"),
        ("human/0", short("How many?"), ("14",), "human"),
    ]


def docvqa(folder: Path) -> Expected:
    put_image(folder / "documents/xnbl_1.png")
    record = {"questionId": 49153, "question": "What year?", "image": "documents/xnbl_1.png", "answers": ["1998", "98"]}
    put_json(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [record]})
    return [("49153", short("What year?"), ("1998", "98"), "")]


def realworldqa(folder: Path) -> Expected:
    asked = "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option."
    word = "How many?\nPlease answer directly with a single word or number."
    image = {"bytes": IMAGE, "path": "0.webp"}
    rows = [{"image": image, "question": asked, "answer": "B"}, {"image": image, "question": word, "answer": "Two"}]
    put_parquet(folder / "data/test-00000-of-00001.parquet", rows)
    return [("0", asked, ("B",), ""), ("1", word, ("Two",), "")]


def scienceqa(folder: Path) -> Expected:
    problems = {
        "4": {"question": "Which?", "choices": ["iron", "wood"], "answer": 1, "hint": "Look.", "image": "image.png"},
        "5": {"question": "Where?", "choices": ["here", "there"], "answer": 0, "hint": "", "image": None},
        "6": {"question": "Not asked", "choices": ["x"], "answer": 0, "hint": "", "image": None},
    }
    put_image(folder / "images/test/4/image.png")
    put_json(folder / "problems.json", problems)
    put_json(folder / "pid_splits.json", {"train": ["6"], "test": ["4", "5"]})
    return [
        ("4", with_choices("Context: Look.\nWhich?", "iron", "wood"), ("B",), "image"),
        ("5", with_choices("Where?", "here", "there"), ("A",), "text"),
    ]


def coco_captions(folder: Path) -> Expected:
    put_image(folder / "val2014/COCO_5.jpg")
    images = [{"id": 5, "file_name": "COCO_5.jpg"}, {"id": 6, "file_name": "COCO_6.jpg"}]
    captions = [{"image_id": 5, "id": n, "caption": text} for n, text in enumerate(["A dog.", "One dog."])]
    put_json(folder / "captions_val2014.json", {"images": images, "annotations": captions})
    return [("5", "Provide a one-sentence caption for the provided image.", ("A dog.", "One dog."), "")]


MAKERS: dict[str, Callable[[Path], Expected]] = {
    maker.__name__: maker
    for maker in (
        *(llava, textvqa, gqa, vizwiz, pope, mme, mmbench, mmmu, seed, ai2d, chartqa, docvqa, realworldqa, scienceqa),
        coco_captions,
    )
}
