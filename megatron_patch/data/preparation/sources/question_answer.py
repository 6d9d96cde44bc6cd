"""Prompts and answers as files: `k.jpg`, `k.txt` (the answer) and `k.json` ({"question"}), in a folder or in tars."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.data.conversation import IMAGE_MARK
from megatron_patch.data.preparation.sources.base import Source, SourceRecord
from megatron_patch.data.preparation.sources.image_folders import read_regular_file
from megatron_patch.data.record import IMAGE_PARTS
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError

Place = tuple[str, int, int]  # file, offset and bytes; -1 bytes: the whole file


@dataclass
class _Sample:
    """Files of one key, found so far."""

    key: str
    places: dict[str, Place] = field(default_factory=dict)  # "json", "txt", "image" -> where
    image: str = ""  # file name of the image
    twice: str = ""  # file name of a second file of one kind

    def is_whole(self) -> bool:
        return len(self.places) == 3


class QuestionAnswerSource(Source):
    """A folder (searched below, too) or tars; a key is a file's path without its last suffix.

    Samples come in the order of the names in a folder, and in the order in which they are complete in a tar.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if not path.exists():
                raise UserError(f"{path}: no such file; wanted a folder or a tar of k.jpg, k.txt and k.json")
            if not path.is_dir() and not _is_plain_tar(path):
                raise UserError(f"{path}: is neither a folder nor an uncompressed tar; unpack it first")
        self._paths = list(paths)

    @property
    def name(self) -> str:
        """The first path, and how many more there are."""
        more = len(self._paths) - 1
        return f"{self._paths[0]} and {more} more" if more else str(self._paths[0])

    def describe(self) -> dict[str, Any]:
        """Paths and sizes; what is in them is compared record by record."""
        sizes = [path.stat().st_size if path.is_file() else None for path in self._paths]
        return {"source": [str(path.resolve()) for path in self._paths], "bytes": sizes}

    def places(self) -> list[Path]:
        """Folders and tars."""
        return self._paths

    def count(self) -> int:
        """Samples, whole or not."""
        return sum(1 for _ in self.items())

    def items(self) -> Iterator[dict[str, Any]]:
        """{id, image, places, twice} of each sample."""
        for path in self._paths:
            for sample in _in_folder(path) if path.is_dir() else _in_tar(path):
                yield {"id": sample.key, "image": sample.image or None, "places": sample.places, "twice": sample.twice}

    def read(self, item: dict[str, Any]) -> SourceRecord:
        """Question and answer, the mark of the image at the front of the question."""
        places = item["places"]
        if item["twice"]:
            raise RecordError("malformed", f"{item['twice']} and another file of its kind have the same key")
        if "json" not in places:
            raise RecordError("malformed", f"there is no {item['id']}.json with the question")
        if "txt" not in places:
            raise RecordError("no answer", f"there is no {item['id']}.txt with the answer")
        try:
            content = json.loads(_read(places["json"]))
            answer = _read(places["txt"]).decode("utf-8-sig")
        except (ValueError, RecursionError) as error:
            raise RecordError("malformed", f"{item['id']}: {error}") from None
        question = content.get("question") if isinstance(content, dict) else None
        if not isinstance(question, str):
            raise RecordError("malformed", f"{item['id']}.json: has no text as its question")
        if "image" not in places:
            raise RecordError("image missing", f"there is no {item['id']}.jpg")
        return SourceRecord(item["id"], turns_of(question, answer, 1), item["image"], [places["image"]])

    def read_image(self, reference: Place) -> bytes:
        """Bytes at a place."""
        return _read(reference)


def turns_of(question: str, answer: Any, images: int) -> list[dict[str, Any]]:
    """LLaVA's turns; a question without marks gets those of its images at the front."""
    if IMAGE_MARK not in question:
        question = f"{IMAGE_MARK}\n" * images + question
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _in_folder(root: Path) -> Iterator[_Sample]:
    """Samples below a folder, one folder at a time, in the order of their names."""
    for folder, below, names in os.walk(root):
        below.sort()
        prefix = os.path.relpath(folder, root) + "/" if folder != str(root) else ""
        sample = _Sample("")
        # By key first: "a.txt" would come between "a-1.jpg" and "a-1.txt" otherwise.
        for key, suffix in sorted(os.path.splitext(prefix + name) for name in names):
            if key != sample.key:
                yield from [sample] if sample.places else []
                sample = _Sample(key)
            _place(sample, key + suffix, (os.path.join(root, key + suffix), 0, -1))
        yield from [sample] if sample.places else []


def _in_tar(path: Path) -> Iterator[_Sample]:
    """Samples of a tar as they become complete, then the incomplete ones."""
    begun: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # or it would keep every member it has seen
                if not member.isfile():
                    continue
                name = member.name.removeprefix("./")
                key = os.path.splitext(name)[0]
                sample = begun.setdefault(key, _Sample(key))
                _place(sample, name, (str(path), member.offset_data, member.size))
                if sample.is_whole():
                    yield begun.pop(key)
                elif not sample.places:
                    del begun[key]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: is broken ({error}); make it again") from error
    yield from begun.values()


def _place(sample: _Sample, name: str, place: Place) -> None:
    """Note where a file of a sample lies; files of other kinds are no part of it."""
    suffix = os.path.splitext(name)[1][1:].lower()
    kind = "image" if suffix in IMAGE_PARTS else suffix
    if kind not in ("image", "json", "txt"):
        return
    if kind in sample.places:
        sample.twice = name
    if kind == "image":
        sample.image = name
    sample.places[kind] = place


def _read(place: Place) -> bytes:
    """Bytes at a place.  Raises RecordError."""
    path, offset, size = place
    try:
        if size < 0:
            data = read_regular_file(path)
        else:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise RecordError("image unreadable", f"{path}: {error.strerror}") from None
    if data is None or len(data) < size:
        raise RecordError("image missing", f"{path}: is not there any more, or shorter than it was")
    return data


def _is_plain_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except (tarfile.TarError, OSError):
        return False
    return True
