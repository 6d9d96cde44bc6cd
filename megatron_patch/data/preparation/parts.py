"""A conversion shared out to jobs that know nothing of each other but the folder they write into."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.errors import UserError

_JOURNAL = re.compile(r"journal-(\d+)-of-(\d+)\.jsonl")


@dataclass(frozen=True, order=True)
class Part:
    """The number-th of `count` shares of the shards, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """`2/3`.  Raises UserError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        part = cls(int(found[1]), int(found[2])) if found else None
        if part is None or not 1 <= part.number <= part.count:
            raise UserError(f"--part {text}: wanted I/N, the I-th of N parts from 1, as in 1/16 to 16/16")
        return part

    @classmethod
    def of_job(cls, number: int, count: int) -> "Part":
        """Whose job it is, the number-th of all from 0: parts take turns."""
        return cls(number % count + 1, count)

    @property
    def journal(self) -> str:
        """Name of its journal."""
        return f"journal-{self.number}-of-{self.count}.jsonl"


def refuse_another_count(folder: Path, part: Part) -> None:
    """Raises UserError when the parts in this folder are of another number."""
    counts = sorted({other.count for other in parts_in(folder)} - {part.count})
    if counts:
        raise UserError(
            f"{folder}: was begun in {counts[0]} parts, --part {part} is of {part.count}; give I/{counts[0]}, or "
            "remove it"
        )


def parts_in(folder: Path) -> list[Part]:
    """Those that have begun in this folder."""
    names = (_JOURNAL.fullmatch(path.name) for path in folder.glob("journal-*"))
    return sorted(Part(int(name[1]), int(name[2])) for name in names if name)
