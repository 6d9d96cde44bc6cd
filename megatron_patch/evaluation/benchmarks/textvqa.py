"""TextVQA: {data: [{question_id, question, image_id, answers: [ten texts]}]}.

data: a folder with TextVQA_0.5.1_val.json and the images of train_val_images.zip (train_images/IMAGE_ID.jpg), or the
file.  LLaVA's own question file adds OCR tokens to the prompt; they are not part of the data set, nor of this prompt.
"""

from collections.abc import Iterator

from megatron_patch.evaluation.question import SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Source, read_object

METRIC = "vqa_accuracy"


def read(source: Source) -> Iterator[Question]:
    """Questions of one split; the test split has no answers and is refused."""
    for record in read_object(source.file("TextVQA_*_val.json")).records("data"):
        yield Question(
            id=record.text("question_id"),
            text=record.text("question"),
            references=record.texts("answers"),
            images=(source.image(record, f"{record.text('image_id')}.jpg", "train_images", "images", "."),),
            suffix=SHORT_ANSWER,
        )
