"""LLaVA's own JSON: a list, or one per line, of {id, image?, conversations: [{from: human or gpt, value}]}."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.data.preparation.json_stream import count_key, stream_records
from megatron_patch.data.preparation.sources.base import Source, SourceRecord, as_object, describe_file
from megatron_patch.data.preparation.sources.image_folders import ImageFolders
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError


class JsonSource(Source):
    """A JSON file whose records name images in folders."""

    keys: Sequence[str] = ("conversations",)  # one of them holds the turns of a record

    def __init__(self, path: Path, image_roots: Sequence[Path]) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; wanted the JSON file with the conversations")
        self._path = path
        self._folders = ImageFolders(image_roots)

    @property
    def name(self) -> str:
        """Path of the JSON file."""
        return str(self._path)

    def describe(self) -> dict[str, Any]:
        """File and folders."""
        return {**describe_file(self._path), "image_roots": self._folders.describe()}

    def places(self) -> list[Path]:
        """File and folders."""
        return [self._path, *self._folders.places()]

    def count(self) -> int:
        """Records that have a conversation, counted by its key."""
        return count_key(self._path, self.keys)

    def items(self) -> Iterator[Any]:
        """The values of the JSON file."""
        return stream_records(self._path)

    def read_image(self, reference: str) -> bytes:
        """Bytes of the file of this name."""
        return self._folders.read(reference)


class LlavaSource(JsonSource):
    """LLaVA-Pretrain, CC3M-595K, Instruct-150K, mix665k and whatever is written like them."""

    def read(self, item: Any) -> SourceRecord:
        """The record itself; an image may be one name or a list of names."""
        record = as_object(item)
        names = read_names(record, "image")
        if isinstance(video := record.get("video"), str | list) and video:
            raise RecordError("video", "the record is about a video; give it to convert_llava_video_to_wds.py")
        system = record.get("system")
        if system is not None and not isinstance(system, str):
            raise RecordError("malformed", f"system is {type(system).__name__}, wanted text")
        return SourceRecord(
            record.get("id"), record.get("conversations"), record["image"] if names else None, names, system
        )


def read_names(record: dict[str, Any], key: str) -> list[str]:
    """The file names under a key, which may hold one name, a list of names, or nothing.  Raises RecordError."""
    named = record.get(key)
    names = [] if named in (None, "") else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) and name for name in names):
        raise RecordError("malformed", f"{key} is neither a file name nor a list of file names")
    return names
