"""GQA: {question id: {question, imageId, answer, types: {structural}}}.

data: a folder with testdev_balanced_questions.json (or another split's file, named itself) and images/IMAGE_ID.jpg.
"""

from collections.abc import Iterator

from megatron_patch.evaluation.question import SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Record, Source, read_json

METRIC = "word_match"


def read(source: Source) -> Iterator[Question]:
    """Tasks are the structural types: verify, query, choose, logical, compare."""
    path = source.file("testdev_balanced_questions.json", "*_questions.json")
    questions = read_json(path)
    Record(questions, str(path))
    for name, values in questions.items():
        record = Record(values, f"{path}, question {name}")
        types = Record(record.value("types", dict), f"{record.where}, types") if record.has("types") else None
        yield Question(
            id=name,
            text=record.text("question"),
            references=(record.text("answer"),),
            images=(source.image(record, f"{record.text('imageId')}.jpg", "images", "."),),
            suffix=SHORT_ANSWER,
            task=types.text("structural") if types else "",
        )
