"""ChartQA: [{imgname, query, label}], one file for questions of people, one for generated ones.

data: the folder test/ with test_human.json, test_augmented.json (those that are there) and png/IMGNAME; or one file.
"""

from collections.abc import Iterator

from megatron_patch.evaluation.question import SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Source, read_records

METRIC = "relaxed_accuracy"


def read(source: Source) -> Iterator[Question]:
    """Tasks are human and augmented; an id is the task and the number in its file."""
    for path in source.files("test_*.json"):
        task = path.stem.rpartition("_")[2]
        for number, record in enumerate(read_records(path)):
            yield Question(
                id=f"{task}/{number}",
                text=record.text("query"),
                references=(record.text("label"),),
                images=(source.image(record, record.text("imgname"), "png", "images", "."),),
                suffix=SHORT_ANSWER,
                task=task,
            )
