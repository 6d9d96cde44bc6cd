"""MMMU: Parquet files of the hub, columns id, question, options, answer, question_type, image_1 .. image_7.

data: a folder with SUBJECT/validation-*.parquet (or such files in it), or one file.  options is a Python list as text.
An open question (no options) is right when the answer is a reference, case and a final period aside; MMMU's own
evaluation searches a long answer for one.  `<image 1>` in a question or an option stands for image_1; an image that no
text names is not shown.
"""

import ast
import re
from collections.abc import Iterator

from megatron_patch.data.conversation import IMAGE_MARK
from megatron_patch.evaluation.question import LETTER_ANSWER, LETTERS, SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Record, Source, image_in_row, read_parquet

METRIC = "multiple_choice_or_word"
MARK = re.compile(r"<image (\d)>")


def read(source: Source) -> Iterator[Question]:
    """Tasks are the subjects, the middle of an id as validation_Art_Theory_3."""
    for path in source.files("validation-*.parquet", "*/validation-*.parquet"):
        for record in read_parquet(path):
            name, text, options = record.text("id"), record.text("question"), _list(record, "options")
            answers = _answers(record, len(options))
            numbers = MARK.findall(" ".join([text, *options]))
            yield Question(
                id=name,
                text=MARK.sub(IMAGE_MARK, text),
                references=answers,
                images=tuple(image_in_row(record, f"image_{number}") for number in numbers),
                choices=tuple(MARK.sub(IMAGE_MARK, option) for option in options),
                suffix=LETTER_ANSWER if options else SHORT_ANSWER,
                task="_".join(name.split("_")[1:-1]),
            )


def _list(record: Record, name: str) -> list[str]:
    text = record.text(name) or "[]"
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, list) or len(found) > len(LETTERS):
        raise record.error(f"{name!r} is {text[:60]!r}, wanted a list as Python writes it")
    return [str(item) for item in found]


def _answers(record: Record, choices: int) -> tuple[str, ...]:
    """The letter; of an open question its answer, or several in a list."""
    if choices:
        return (record.letter_of("answer", choices),)
    answer = record.text("answer")
    return tuple(_list(record, "answer")) if answer.startswith("[") else (answer,)
