"""DocVQA: {data: [{questionId, question, image: documents/NAME.png, answers: [texts]}]}.

data: a folder with val_v1.0*.json and the images below it as the records name them, or the file.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_patch.evaluation.question import SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Source, read_object

METRIC = "anls"


def read(source: Source) -> Iterator[Question]:
    """Questions of one split; the test split has no answers and is refused."""
    for record in read_object(source.file("val_v1.0*.json", "val*.json")).records("data"):
        image = Path(record.text("image")).name
        yield Question(
            id=record.text("questionId"),
            text=record.text("question"),
            references=record.texts("answers"),
            images=(source.image(record, image, "documents", "images", "."),),
            suffix=SHORT_ANSWER,
        )
