"""COCO captions: {images: [{id, file_name}], annotations: [{image_id, caption}]}.

data: captions_val2014.json, or a folder with it and val2014/FILE_NAME.  Scored with CIDEr; --metric bleu needs no Java.
"""

from collections import defaultdict
from collections.abc import Iterator

from megatron_patch.evaluation.question import Question
from megatron_patch.evaluation.source import Source, read_object

METRIC = "cider"
ASKED = "Provide a one-sentence caption for the provided image."


def read(source: Source) -> Iterator[Question]:
    """One question per image that has captions."""
    content = read_object(source.file("captions_val*.json", "captions_*.json"))
    captions = defaultdict(list)
    for annotation in content.records("annotations"):
        captions[annotation.text("image_id")].append(annotation.text("caption"))
    for record in content.records("images"):
        name = record.text("id")
        if not captions[name]:
            source.left_out["no caption"] += 1
            continue
        image = source.image(record, record.text("file_name"), "val2014", "val2017", "images", ".")
        yield Question(name, ASKED, tuple(captions[name]), (image,))
