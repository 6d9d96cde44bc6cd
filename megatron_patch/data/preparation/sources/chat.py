"""ShareGPT ({conversations: [{from, value}]}) and ChatML ({messages: [{role, content}]}) -> LLaVA's form."""

from collections.abc import Mapping
from typing import Any

from megatron_patch.data.conversation import IMAGE_MARK
from megatron_patch.data.preparation.sources.base import SourceRecord, as_object
from megatron_patch.data.preparation.sources.llava import JsonSource
from megatron_patch.data.rejection import RecordError

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
IMAGE_TYPES = ("image", "image_url")


class ChatSource(JsonSource):
    """A JSON file of chats; a system turn at the front becomes the record's system sentence."""

    keys = ("conversations", "messages")

    def read(self, item: Any) -> SourceRecord:
        """The chat's turns in LLaVA's form, the names of its images in their order."""
        record = as_object(item)
        turns, system, named_in_text = read_turns(record.get("conversations", record.get("messages")))
        given = record.get("system") or None
        if given is not None:
            if not isinstance(given, str):
                raise RecordError("malformed", f"system is {type(given).__name__}, wanted text")
            if system is not None:
                raise RecordError("roles", "a system sentence and a system turn; wanted one of them")
            system = given
        given = record.get("images", record.get("image"))
        listed = [] if given in (None, "") else given if isinstance(given, list) else [given]
        if listed and named_in_text:
            raise RecordError("image marks", "images are named both in the messages and beside them")
        names = [image_name(image) for image in listed or named_in_text]
        return SourceRecord(record.get("id"), turns, names or None, names, system)


def read_turns(raw: Any) -> tuple[list[dict[str, str]], str | None, list[Any]]:
    """Turns of either form -> turns of LLaVA's, the system sentence, and images that stand within the messages.

    Raises RecordError.
    """
    if not isinstance(raw, list) or not raw:
        raise RecordError("malformed", "conversations or messages is not a list of turns")
    turns: list[dict[str, str]] = []
    system: str | None = None
    images: list[Any] = []
    for number, turn in enumerate(raw):
        if not isinstance(turn, Mapping):
            raise RecordError("malformed", f"turn {number + 1} is {type(turn).__name__}, wanted an object")
        speaker = turn.get("from", turn.get("role"))
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RecordError("roles", f"turn {number + 1} is of {str(speaker)[:40]!r}, wanted {', '.join(ROLES)}")
        text, inside = _read_content(turn.get("value", turn.get("content")))
        if role != "system":
            turns.append({"from": role, "value": text})
            images += inside
        elif number or inside:
            raise RecordError("roles", f"turn {number + 1} is of system; only the first may be, and without images")
        else:
            system = text
    if not turns:
        raise RecordError("no answer", "there is nothing but a system turn")
    return turns, system, images


def _read_content(content: Any) -> tuple[str, list[Any]]:
    """Text with marks, and the images named in it; a content is a text or a list of typed parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RecordError(
            "malformed", f"the text of a turn is {type(content).__name__}, wanted text or a list of parts"
        )
    pieces: list[str] = []
    images: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in IMAGE_TYPES:
            pieces.append(IMAGE_MARK)
            named = next((part[key] for key in (*IMAGE_TYPES, "path", "url") if part.get(key)), None)
            if named is not None:
                images.append(named)
        else:
            raise RecordError("malformed", f"a part of a turn is of type {str(kind)[:40]!r}, wanted text or image")
    return "\n".join(pieces), images


def image_name(image: Any) -> str:
    """File name of an image given as a name or as {path} or {url}.  Raises RecordError."""
    if isinstance(image, Mapping):
        image = next((image[key] for key in ("path", "url") if image.get(key)), None)
    if not isinstance(image, str) or not image:
        raise RecordError("malformed", "an image is not given by its file name")
    if image.startswith(("http://", "https://", "data:")):
        shown = image if len(image) < 80 else f"{image[:77]}..."
        raise RecordError("image missing", f"{shown} is no file; download the image and name the file")
    return image.removeprefix("file://")
