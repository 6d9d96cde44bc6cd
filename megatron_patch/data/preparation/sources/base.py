"""What the converters' core asks of a source of records."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.rejection import RecordError


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A record in LLaVA's form, its conversations not checked yet."""

    record_id: Any  # None: it has none
    conversations: Any  # [{"from": "human" or "gpt", "value": text}, ...]
    image_names: str | list[str] | None = None  # the images' names, as they are kept in the shard
    images: Sequence[Any] = ()  # what Source.read_image takes, one per image; plain values, sent to another process
    system: str | None = None
    video_names: str | list[str] | None = None  # the videos' names, as they are kept in the shard
    videos: Sequence[Any] = ()  # what Source.read_video takes, one per video


class Source(ABC):
    """Records in an order that never changes.  Lives in the main process and, as a copy, in each worker."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Path, for messages and the ledger."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What must still be the same when an interrupted conversion goes on: {name: plain value}."""

    @abstractmethod
    def places(self) -> list[Path]:
        """Files and folders that it reads, those that are there: what other machines must see as well."""

    @abstractmethod
    def count(self) -> int:
        """The number of records, or of those that have a conversation, without converting them."""

    @abstractmethod
    def items(self) -> Iterator[Any]:
        """The records as they are, one at a time.  Raises UserError when the source itself is broken."""

    @abstractmethod
    def read(self, item: Any) -> SourceRecord:
        """One of items() in LLaVA's form.  Raises RecordError."""

    @abstractmethod
    def read_image(self, reference: Any) -> bytes:
        """An image's bytes as they are, not checked yet; called in the workers.  Raises RecordError."""

    def read_video(self, reference: Any) -> list[bytes]:
        """A video's frames as encoded images, not checked yet; called in the workers.  Raises RecordError."""
        raise NotImplementedError(f"{type(self).__name__} gives no videos")


def as_object(item: Any) -> dict[str, Any]:
    """The item itself.  Raises RecordError unless it is a JSON object."""
    if not isinstance(item, dict):
        raise RecordError("malformed", f"a record is {type(item).__name__}, wanted an object")
    return item


def describe_file(path: Path) -> dict[str, Any]:
    """A file as describe() tells it: its content is compared record by record."""
    return {"source": str(path.resolve()), "bytes": path.stat().st_size}
