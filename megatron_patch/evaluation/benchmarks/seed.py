"""SEED-Bench: {questions: [{question_id, question, choice_a .. choice_d, answer, data_type, data_id,
question_type_id}], question_type: {name: id}}.

data: a folder with SEED-Bench.json and SEED-Bench-image/DATA_ID, or the file.  Questions about videos are left out, and
counted: a LLaVA sees images.
"""

from collections.abc import Iterator

from megatron_patch.evaluation.question import LETTER_ANSWER, Question
from megatron_patch.evaluation.source import Source, read_object

METRIC = "multiple_choice"


def read(source: Source) -> Iterator[Question]:
    """Tasks are the question types by name."""
    content = read_object(source.file("SEED-Bench.json"))
    names = {number: name for name, number in content.value("question_type", dict).items()}
    for record in content.records("questions"):
        if record.text("data_type") != "image":
            source.left_out["asks about a video"] += 1
            continue
        choices = tuple(record.text(f"choice_{letter}") for letter in "abcd")
        kind = record.value("question_type_id", int)
        yield Question(
            id=record.text("question_id"),
            text=record.text("question"),
            references=(record.letter_of("answer", len(choices)),),
            images=(source.image(record, record.text("data_id"), "SEED-Bench-image", "images", "."),),
            choices=choices,
            suffix=LETTER_ANSWER,
            task=names.get(kind, str(kind)),
        )
