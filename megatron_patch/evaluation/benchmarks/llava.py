"""LLaVA's training format, the gpt turns being the truth: [{id, image?, conversations: [{from, value}]}].

data: the .json or .jsonl file, or a folder with one.  Images: images/ beside it, then beside the file itself.
Every question of a conversation is asked by itself, about the record's images; a record without an id goes by its
number.  The answer has to be the gpt turn's to the letter.
"""

from collections.abc import Iterator

from megatron_patch.data.conversation import IMAGE_MARK
from megatron_patch.data.record import read_exchanges
from megatron_patch.data.rejection import RecordError
from megatron_patch.evaluation.question import Question
from megatron_patch.evaluation.source import Source, read_records

METRIC = "exact_match"


def read(source: Source) -> Iterator[Question]:
    """One question per pair of turns, without the turns before it."""
    for number, record in enumerate(read_records(source.file("*.json", "*.jsonl"))):
        given = record.value("image", str, list) if record.has("image") else []
        names = [given] if isinstance(given, str) else given
        images = tuple(source.image(record, str(name), "images", ".") for name in names)
        try:
            exchanges = read_exchanges(record.value("conversations", list), len(images))
        except RecordError as error:
            raise record.error(str(error)) from None
        name = record.text("id") if record.has("id") else str(number)
        for place, exchange in enumerate(exchanges):
            text = exchange.question if len(images) > 1 else exchange.question.replace(IMAGE_MARK, "").strip()
            yield Question(f"{name}/{place}", text, (exchange.answer or "",), images, group=name)
