"""RealWorldQA: Parquet files of the hub, columns image, question, answer.

data: a folder with test-*.parquet, or one file.  A question holds its choices (lines `A. text`) and says itself how to
answer; it is asked as it stands.  The answer is a letter, or a word or number.
"""

import re
from collections.abc import Iterator

from megatron_patch.evaluation.question import LETTERS, Question
from megatron_patch.evaluation.source import Source, image_in_row, read_parquet

METRIC = "multiple_choice_or_word"
CHOICE = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


def read(source: Source) -> Iterator[Question]:
    """Rows have no id; a question goes by its number."""
    number = 0
    for path in source.files("test-*.parquet", "data/test-*.parquet"):
        for record in read_parquet(path):
            asked = record.text("question")
            choices = CHOICE.findall(asked)
            text, suffix = asked, ""
            if [letter for letter, _ in choices] == list(LETTERS[: len(choices)]) and choices:
                text, *_ = CHOICE.split(asked, maxsplit=1)
                suffix = asked[list(CHOICE.finditer(asked))[-1].end() :]
            else:
                choices = []
            answer = record.text("answer")
            yield Question(
                id=str(number),
                text=text.removesuffix("\n"),
                references=(record.letter_of("answer", len(choices)) if choices else answer,),
                images=(image_in_row(record, "image"),),
                choices=tuple(choice for _, choice in choices),
                suffix=suffix.removeprefix("\n"),
            )
            number += 1
