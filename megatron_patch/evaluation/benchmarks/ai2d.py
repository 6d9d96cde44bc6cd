"""AI2D (test): Parquet files of the hub, columns question, options (list), answer (number from 0, as text), image.

data: a folder with test-*.parquet, or one file.
"""

from collections.abc import Iterator

from megatron_patch.evaluation.question import LETTER_ANSWER, LETTERS, Question
from megatron_patch.evaluation.source import Source, image_in_row, read_parquet

METRIC = "multiple_choice"


def read(source: Source) -> Iterator[Question]:
    """Rows have no id; a question goes by its number."""
    number = 0
    for path in source.files("test-*.parquet", "data/test-*.parquet"):
        for record in read_parquet(path):
            choices, answer = record.texts("options"), record.text("answer")
            if not answer.isdecimal() or int(answer) >= len(choices):
                raise record.error(f"'answer' is {answer!r}, wanted a number from 0 to {len(choices) - 1}")
            yield Question(
                id=str(number),
                text=record.text("question"),
                references=(LETTERS[int(answer)],),
                images=(image_in_row(record, "image"),),
                choices=choices,
                suffix=LETTER_ANSWER,
            )
            number += 1
