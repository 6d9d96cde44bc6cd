"""The report of a preparation: records in = written + rejected, every rejection with its reason."""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_patch.data.rejection import RecordError, current_reason

SPLITS = ("train", "val", "test")
NAMED_IN_MESSAGES = 10


@dataclass(frozen=True)
class Rejection:
    """A record that is left out."""

    record: int  # its place in the source
    id: Any
    file: Any  # name or names of its images, or where it has none of its videos
    reason: str
    detail: str

    @classmethod
    def of(cls, number: int, item: Any, error: RecordError) -> "Rejection":
        """Of a record in any form."""
        record = item if isinstance(item, dict) else {}
        file = record.get("image", record.get("images", record.get("video")))
        # A record may hold anything where its names should be: shown, but not at any length.
        shown = [value if len(str(value)) <= 1000 else f"{str(value)[:1000]}..." for value in (record.get("id"), file)]
        return cls(number, *shown, error.reason, error.detail)

    @classmethod
    def of_journal(cls, line: Sequence[Any]) -> "Rejection":
        """As a journal holds it: the fields in their order."""
        record, record_id, file, reason, detail = line
        return cls(record, record_id, file, current_reason(reason), detail)

    def __str__(self) -> str:
        return f"record {self.record} (id {self.id}): {self.reason}: {self.detail}"


@dataclass
class PreparationReport:
    """The counts of a conversion."""

    source: str = ""
    records_in: int = 0
    written: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    of_other_parts: int = 0  # good texts whose images and shards are the business of other parts
    rejected: Counter = field(default_factory=Counter)  # reason -> records
    repeated_ids: int = 0  # written although another record has the same id: their contents differ
    text_only: int = 0
    examples: list[Rejection] = field(default_factory=list)  # the first ones
    seconds: float = 0.0  # until everything was on the disk
    seconds_to_reopen: float = 0.0

    def reject(self, rejection: Rejection) -> None:
        """Count a rejection."""
        self.rejected[rejection.reason] += 1
        if len(self.examples) < NAMED_IN_MESSAGES:
            self.examples.append(rejection)

    def accounted(self) -> int:
        """Records written, rejected, or left to other parts."""
        return sum(self.written.values()) + self.rejected.total() + self.of_other_parts

    def check(self) -> None:
        """in = written + rejected (+ left to other parts): otherwise this program is wrong."""
        assert self.records_in == self.accounted(), self

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, records), the most frequent first."""
        return sorted(self.rejected.items(), key=lambda item: (-item[1], item[0]))

    def to_json(self) -> dict[str, Any]:
        """What ledger.json holds: nothing that differs between equal conversions."""
        return {
            "source": self.source,
            "records_in": self.records_in,
            "written": self.written,
            "rejected": self.rejected.total(),
            "rejected_by_reason": dict(self.reasons()),
            "text_only": self.text_only,
            "repeated_ids": self.repeated_ids,
        }


class RejectionFile:
    """rejected.jsonl: takes rejections in the order in which they are found, ends sorted by record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unsorted = path.with_name(f"{path.name}.part")
        self._file: TextIO = self._unsorted.open("w", encoding="ascii")
        self._records = array("Q")
        self._offsets = array("Q", [0])

    def add(self, rejection: Rejection) -> None:
        """Append a rejection."""
        line = json.dumps(asdict(rejection), default=str) + "\n"
        self._file.write(line)
        self._records.append(rejection.record)
        self._offsets.append(self._offsets[-1] + len(line))

    def finish(self) -> None:
        """Write the file itself."""
        self._file.close()
        with self._unsorted.open("rb") as lines, self._path.open("wb") as file:
            file.writelines(self._sorted_lines(lines))
        self._unsorted.unlink()

    def close(self) -> None:
        """Stop where it is."""
        self._file.close()

    def _sorted_lines(self, lines: Any) -> Iterator[bytes]:
        starts = np.frombuffer(self._offsets, dtype=np.uint64)
        for place in np.argsort(np.frombuffer(self._records, dtype=np.uint64)) if len(self._records) else ():
            lines.seek(int(starts[place]))
            yield lines.read(int(starts[place + 1] - starts[place]))
