"""VizWiz-VQA: [{image, question, answers: [ten of {answer}], answer_type}].

data: a folder with val.json and val/IMAGE, or the file.  The test split has no answers and is refused.
"""

from collections.abc import Iterator

from megatron_patch.evaluation.question import SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Source, read_records

METRIC = "vqa_accuracy"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def read(source: Source) -> Iterator[Question]:
    """Tasks are the answer types: yes/no, number, other, unanswerable."""
    for record in read_records(source.file("val.json")):
        image = record.text("image")
        yield Question(
            id=image,  # one question per image
            text=record.text("question"),
            references=tuple(answer.text("answer") for answer in record.records("answers")),
            images=(source.image(record, image, "val", "images", "."),),
            suffix=f"{UNANSWERABLE}\n{SHORT_ANSWER}",
            task=record.text("answer_type"),
        )
