"""Records: what LLaVA's JSON and the folders made from it hold, checked once, by converters and training alike."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.data.conversation import IMAGE_MARK, VIDEO_MARK, Exchange
from megatron_patch.data.rejection import RecordError

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img")
# In a sample's JSON, where it holds videos: frames of each, in the order of their marks.  Its image parts are first the
# images, in the order of theirs, then the frames of the first video, of the second, ...
FRAMES = "video_frames"


@dataclass(frozen=True)
class Record:
    """One conversation and the bytes of its images and of its videos' frames, each in the order of their marks."""

    record_id: str
    exchanges: tuple[Exchange, ...]
    images: tuple[bytes, ...]
    system: str | None = None  # in place of the template's own system sentence
    videos: tuple[tuple[bytes, ...], ...] = ()  # frames of each


def read_exchanges(conversations: Any, images: int, videos: int = 0) -> tuple[Exchange, ...]:
    """LLaVA's `conversations` -> exchanges with as many marks as images and videos.  Raises RecordError.

    Rules of the original training code: a first turn that is not human is dropped, roles alternate; with one image
    the marks of a turn become a single one at its front, followed by a newline.  With several images, which that
    code does not know, marks stay where they are.  A single video is treated as a single image; without any, VIDEO_MARK
    is text like any other.
    """
    counts = {IMAGE_MARK: ("image", images)} | ({VIDEO_MARK: ("video", videos)} if videos else {})
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("malformed", "conversations is not a list of turns")
    turns = [read_turn(turn) for turn in conversations]
    if turns[0][0] != "human":
        turns = turns[1:]
    if not turns:
        raise RecordError("no answer", "there is no turn of a human")
    for number, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[number % 2]:
            raise RecordError("roles", f"turn {number + 1} is of {role}, wanted {('human', 'gpt')[number % 2]}")
    if len(turns) % 2:
        raise RecordError("no answer", "the last turn is a question")
    exchanges = []
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
        if not answer.strip():
            raise RecordError("no answer", f"answer {len(exchanges) + 1} is empty")
        for mark, (kind, count) in counts.items():
            if mark in answer:
                raise RecordError(f"{kind} marks", f"answer {len(exchanges) + 1} holds {mark}")
            if count == 1 and images + videos == 1 and mark in question:
                question = mark_in_front(question, mark)
        exchanges.append(Exchange(question, answer))
    for mark, (kind, count) in counts.items():
        marks = sum(exchange.question.count(mark) for exchange in exchanges)
        if marks != count:
            raise RecordError(f"{kind} marks", f"{marks} {mark} marks, {count} {kind}s")
    return tuple(exchanges)


def mark_in_front(question: str, mark: str) -> str:
    """A question about one image or video, with a single mark before its text, as LLaVA's training code puts it."""
    return f"{mark}\n{question.replace(mark, '').strip()}".strip()


def read_turn(turn: Any) -> tuple[str, str]:
    """(role, text) of one turn."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise RecordError("malformed", "a turn is not {from, value}")
    if turn.get("from") not in ("human", "gpt"):
        raise RecordError("roles", f"a turn is of {str(turn.get('from'))[:40]!r}, wanted human or gpt")
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        raise RecordError("malformed", f"a turn is not Unicode text ({error})") from None
    return turn["from"], turn["value"]


def is_image_part(part: str) -> bool:
    """Is this the name of a part of a sample that holds an image?"""
    return part.lower().rsplit(".", 1)[-1] in IMAGE_PARTS


def cook(parts: Mapping[str, Any]) -> Record:
    """The parts of one sample of an energon folder -> Record.  Raises RecordError.

    Three layouts are known: ours (json {id, conversations} + images, with FRAMES in it those of videos, too),
    Pai-Megatron-Patch's (json is the list of turns + jpg), and question/answer (json {question} + txt + image).  Any
    other is read through the field map with which `energon prepare` declared the folder as one of questions and
    answers.
    """
    key = f"{parts['__shard__']}/{parts['__key__']}"
    names = [name for name in parts if is_image_part(name)]
    images = tuple(parts[name] for name in sorted(names, key=_image_number))
    try:
        content = json.loads(parts["json"]) if "json" in parts else None
    except ValueError as error:
        raise RecordError("malformed", f"json part: {error}") from None
    if isinstance(content, dict) and "conversations" in content:
        images, videos = _without_frames(images, content.get(FRAMES, []))
        exchanges = read_exchanges(content["conversations"], len(images), len(videos))
        system = content.get("system")
        if system is not None and not isinstance(system, str):
            raise RecordError("malformed", f"system is {type(system).__name__}, wanted text")
        return Record(str(content.get("id", key)), exchanges, images, system, videos)
    if isinstance(content, list):
        return Record(key, read_exchanges(content, len(images)), images)
    if isinstance(content, dict) and isinstance(content.get("question"), str) and "txt" in parts:
        answer = parts["txt"].decode("utf-8", "replace")
        return Record(key, _question_and_answer(content["question"], answer, len(images)), images)
    if "__field_map__" in parts:
        return _cook_mapped(key, {**parts, "json": content}, parts["__field_map__"])
    if content is None:
        raise RecordError("malformed", f"sample has no json part, only {', '.join(names) or 'nothing'}")
    raise RecordError("malformed", "json part is neither {conversations}, nor a list of turns, nor {question} with txt")


def _without_frames(images: tuple[bytes, ...], frames: Any) -> tuple[tuple[bytes, ...], tuple[tuple[bytes, ...], ...]]:
    """All image parts, and FRAMES -> images, and frames of each video.  Raises RecordError."""
    if not isinstance(frames, list) or not all(type(count) is int and count > 0 for count in frames):
        raise RecordError("malformed", f"{FRAMES} is {str(frames)[:40]}, wanted a list of numbers of frames")
    if sum(frames) > len(images):
        raise RecordError("malformed", f"{FRAMES} tells of {sum(frames)} frames, the sample holds {len(images)} images")
    bounds = list(itertools.accumulate(frames, initial=len(images) - sum(frames)))
    return images[: bounds[0]], tuple(images[first:end] for first, end in itertools.pairwise(bounds))


def _cook_mapped(key: str, parts: Mapping[str, Any], field_map: Mapping[str, str]) -> Record:
    """A sample of energon's VQASample: image, context and answers are found as the field map says."""
    from megatron.energon.flavors.webdataset.field_access import field_access, split_field_access

    def find(field: str) -> Any:
        if field not in field_map:
            raise RecordError("malformed", f"the folder's field_map names no {field}")
        try:
            value = field_access(parts, split_field_access(field_map[field]))
        except Exception as error:  # FieldAccessError, KeyError, IndexError, ValueError: all say that it is not there
            raise RecordError("malformed", f"no {field} at {field_map[field]}: {error}") from None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) and field != "image" else value

    answers = find("answers")
    answer = answers[0] if isinstance(answers, list) and answers else answers
    context = find("context")
    if not isinstance(context, str) or not isinstance(answer, str):
        raise RecordError("malformed", "context or answers is not text")
    images = (find("image"),) if "image" in field_map else ()
    if not all(isinstance(image, bytes) for image in images):
        raise RecordError("malformed", f"{field_map['image']} holds no image")
    return Record(key, _question_and_answer(context, answer, len(images)), images)


def _question_and_answer(question: str, answer: str, images: int) -> tuple[Exchange, ...]:
    """Question/answer layout: questions there carry no mark for their image, so it is put at the front."""
    if IMAGE_MARK not in question:
        question = f"{IMAGE_MARK}\n" * images + question
    return read_exchanges([{"from": "human", "value": question}, {"from": "gpt", "value": answer}], images)


def _image_number(part: str) -> tuple[int, str]:
    """Sort key: `jpg` (the first), then `1.jpg`, `2.jpg`, ..."""
    number = part.split(".", 1)[0]
    return (int(number) if number.isdigit() else 0, part)
