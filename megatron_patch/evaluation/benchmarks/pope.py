"""POPE: lines of {question_id, image, text, label: yes or no}, one file per category.

data: a folder with coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json (those that are there) and
val2014/ of COCO; or one file.
"""

from collections.abc import Iterator

from megatron_patch.evaluation.question import SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Source, read_records

METRIC = "pope"


def read(source: Source) -> Iterator[Question]:
    """Tasks are the categories."""
    for path in source.files("coco_pope_*.json", "coco/coco_pope_*.json"):
        category = path.stem.removeprefix("coco_pope_")
        for record in read_records(path):
            label = record.text("label")
            if label not in ("yes", "no"):
                raise record.error(f"'label' is {label!r}, wanted yes or no")
            yield Question(
                id=f"{category}/{record.text('question_id')}",
                text=record.text("text"),
                references=(label,),
                images=(source.image(record, record.text("image"), "val2014", "images", "."),),
                suffix=SHORT_ANSWER,
                task=category,
            )
