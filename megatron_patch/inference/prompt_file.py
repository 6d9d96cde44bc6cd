"""Lines of a prompts file -> requests.  Three kinds of lines are known, told by their keys:

    {"image": "cat.jpg", "prompt": "What is this?"}                             NeMo's; `image` may be a list, or absent
    {"question_id": 7, "image": "cat.jpg", "text": "What is this?"}             LLaVA's question files
    {"id": "7", "images": ["cat.jpg"], "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}]}

An `id` may stand in each, `image` or `images` too; a conversation may hold answered questions before the last one.
For a LLaVA-OneVision a line may have a `video`, a file (decoded by PyAV), a folder of frames, or a list of images that
are its frames; or `videos`, a list of such.  At most `frames` of each are taken, 32 unless the line says otherwise.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_patch.data.conversation import Exchange
from megatron_patch.data.preparation.sources.image_folders import ImageFolders
from megatron_patch.data.record import read_turn
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.video import FrameSampling, read_frames
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Request

TEXT_KEYS, ID_KEYS, IMAGE_KEYS = ("prompt", "text"), ("id", "question_id"), ("image", "images")
VIDEO_KEYS = ("video", "videos")


@dataclass(frozen=True)
class Line:
    """One line of a prompts file: a request, or why it is none."""

    id: str  # its own, else its number in the file, from 1
    request: Request | None
    error: str | None = None


def count_lines(file: Path) -> int:
    """Lines of a file, the empty ones too.  Raises UserError: there is no such file."""
    try:
        with open(file, "rb") as lines:
            return sum(1 for _ in lines)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; wanted a file with a JSON object on each line"
        ) from None


def texts_of(file: Path, lines: range) -> Iterator[bytes]:
    """Those lines of a file, counted from 0, as they stand there."""
    with open(file, "rb") as texts:
        yield from islice(texts, lines.start, lines.stop)


def read_lines(texts: Iterable[bytes], image_root: Path, first: int = 0) -> Iterator[Line]:
    """Lines of which the first is number `first` (from 0) of its file, with the bytes of their images."""
    folders, videos = ImageFolders([image_root]), ImageFolders([image_root], "video")
    for number, text in enumerate(texts, first + 1):
        yield _read_line(text, str(number), folders, videos)


def _read_line(data: bytes, number: str, folders: ImageFolders, of_videos: ImageFolders) -> Line:
    name = number
    try:
        try:
            record = json.loads(data.decode("utf-8-sig").strip() or "null")
        except ValueError as error:  # of both
            raise RecordError("malformed", f"not JSON in UTF-8 ({error})") from None
        except RecursionError:
            raise RecordError("malformed", "nested too deeply") from None
        if not isinstance(record, dict):
            raise RecordError("malformed", "wanted a JSON object" + ("" if data.strip() else ", the line is empty"))
        own = _value(record, ID_KEYS, (str, int))
        name = number if own in (None, "") else str(own)
        images = tuple(folders.read(image) for image in _images(record))
        system = _value(record, ("system",), (str,))
        return Line(name, Request(name, _turns(record), images, system, _videos(record, folders, of_videos)))
    except (RecordError, UserError) as error:  # UserError: of a video, for this line alone
        return Line(name, None, str(error))


def _value(record: dict[str, Any], keys: tuple[str, ...], types: tuple[type, ...]) -> Any:
    """The value under the one of these keys that is there; None where none is."""
    found = [key for key in keys if record.get(key) is not None]
    if len(found) > 1:
        raise RecordError("malformed", f"both {' and '.join(found)}, wanted one of them")
    value = record[found[0]] if found else None
    if found and (not isinstance(value, types) or isinstance(value, bool)):
        wanted = " or ".join(kind.__name__ for kind in types)
        raise RecordError("malformed", f"{found[0]} is {type(value).__name__}, wanted {wanted}")
    return value


def _images(record: dict[str, Any]) -> list[str]:
    value = _value(record, IMAGE_KEYS, (str, list))
    names = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(name, str) and name for name in names):
        raise RecordError("malformed", "images are not all file names")
    return names


def _videos(record: dict[str, Any], folders: ImageFolders, of_videos: ImageFolders) -> tuple[tuple[bytes, ...], ...]:
    """Frames of each video."""
    value = _value(record, VIDEO_KEYS, (str, list))
    count = _value(record, ("frames",), (int,))
    sampling = FrameSampling() if count is None else FrameSampling(count)
    if not value:
        return ()
    found = []
    for named in value if "videos" in record and isinstance(value, list) else [value]:
        names = named if isinstance(named, list) else [named]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise RecordError("malformed", "videos are not all file names or lists of file names")
        if isinstance(named, str):
            found.append(_frames(named, of_videos, sampling))
        else:
            found.append([folders.read(names[place]) for place in sampling.places(len(names), None)])
    return tuple(map(tuple, found))


def _frames(name: str, folders: ImageFolders, sampling: FrameSampling) -> list[bytes]:
    try:
        return read_frames(folders.find(name), sampling)
    except RecordError as error:
        raise RecordError(error.reason, f"{name}: {error.detail}") from None


def _turns(record: dict[str, Any]) -> tuple[Exchange, ...]:
    text = _value(record, TEXT_KEYS, (str,))
    conversations = _value(record, ("conversations",), (list,))
    if (text is None) == (conversations is None):
        raise RecordError("malformed", f"wanted one of {', '.join(TEXT_KEYS)} and conversations")
    if text is not None:
        return (Exchange(text, None),)
    turns = [read_turn(turn) for turn in conversations]
    for number, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[number % 2]:
            raise RecordError("roles", f"turn {number + 1} is of {role}, wanted {('human', 'gpt')[number % 2]}")
    if len(turns) % 2 == 0:
        raise RecordError("roles", "wanted a question as the last turn, got " + ("an answer" if turns else "no turn"))
    texts = [text for _, text in turns]
    return tuple(Exchange(question, answer) for question, answer in zip(texts[::2], [*texts[1::2], None], strict=True))
