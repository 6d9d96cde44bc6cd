"""MMBench: a table with tabs, columns index, question, hint, A, B, C, D, answer, category, image (base64).

data: the .tsv file, or a folder with one.  A dev file of the first release holds the rotated choices too, in rows whose
index is larger by a million each: those count together.  For a file without them give --circular, the published
evaluation.  An image that is a number stands for the image of that index.
"""

import base64
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_patch.errors import UserError
from megatron_patch.evaluation.question import LETTER_ANSWER, LETTERS, Question
from megatron_patch.evaluation.source import Record, Source

METRIC = "multiple_choice"
ROTATED = 1_000_000  # added to the index for each rotation
NOTHING = ("", "nan", "none")


def read(source: Source) -> Iterator[Question]:
    """Tasks are the categories; the group is the index without its rotation, where the file holds rotations."""
    path = source.file("*.tsv")
    records = [Record(row, f"{path}, row {number}") for number, row in enumerate(_rows(path), 1)]
    images = {record.text("index"): record.text("image") for record in records}
    rotated = any(_index(record) >= ROTATED for record in records)
    for record in records:
        choices = []
        for letter in LETTERS[:4]:
            if not record.has(letter) or record.text(letter).lower() in NOTHING:
                break
            choices.append(record.text(letter))
        hint = record.text("hint") if record.has("hint") else ""
        question = record.text("question")
        image = record.text("image")
        yield Question(
            id=record.text("index"),
            text=question if hint.lower() in NOTHING else f"{hint}\n{question}",
            references=(record.letter_of("answer", len(choices)),),
            images=(_decode(record, images.get(image, image)),),
            choices=tuple(choices),
            suffix=LETTER_ANSWER,
            task=record.text("category") if record.has("category") else "",
            group=str(_index(record) % ROTATED) if rotated else "",
        )


def _index(record: Record) -> int:
    text = record.text("index")
    if not text.isdecimal():
        raise record.error(f"'index' is {text!r}, wanted a number")
    return int(text)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # images are long
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table with tabs: {error}") from None


def _decode(record: Record, image: str) -> bytes:
    try:
        return base64.b64decode(image, validate=True)
    except ValueError:
        raise record.error(f"'image' is {image[:20]!r}..., wanted base64 or the index of another row") from None
