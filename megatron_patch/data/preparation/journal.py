"""The journal of a conversion: what it began with, then a line for each shard that is whole."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_patch.atomic_files import atomic_file
from megatron_patch.data.preparation.parts import Part, parts_in
from megatron_patch.data.preparation.report import Rejection
from megatron_patch.data.preparation.workers import Done, Job
from megatron_patch.errors import UserError

SECONDS_FOR_WORKERS_TO_END = 5  # after their parent was killed
END = {"end": True}  # the last line of a part that has done all of its jobs


class Journal:
    """A file that exists, opened for this process alone; read() tells what stands in it.

    Raises UserError when another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began_with: dict[str, Any] = {}
        self.finished: dict[str, int] = {}  # shard -> place of its line
        self.ended = False  # END was reached
        self._file = path.open("r+b")
        self._lock()

    @staticmethod
    def begin(path: Path, began_with: Mapping[str, Any]) -> None:
        """Make the file, unless it is there."""
        with suppress(FileExistsError), atomic_file(path, replace=False) as beside:
            beside.write_text(json.dumps(began_with) + "\n")

    @staticmethod
    def beginning(path: Path) -> dict[str, Any]:
        """What another process's journal began with; nothing where that is not to be read (any more)."""
        try:
            with path.open("rb") as file:
                return json.loads(file.readline())
        except (OSError, ValueError):
            return {}

    def restart(self, began_with: Mapping[str, Any]) -> None:
        """Forget all that stands in it."""
        self._file.truncate(0)
        self.began_with, self.finished, self.ended = dict(began_with), {}, False
        self._append(began_with)

    def read(self) -> None:
        """Find the lines of finished shards; a last line that was cut off by the interruption is dropped."""
        place, first = 0, True
        for raw in self._file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if line is None:
                break
            if first:
                self.began_with = line
                first = False
            elif line == END:
                self.ended = True
            else:
                self.finished[line["shard"]] = place
            place += len(raw)
        self._file.truncate(place)

    def find(self, job: Job) -> Done | None:
        """What became of a job, if its shard is still whole beside the journal.

        Raises UserError when the job was another one then.
        """
        place = self.finished.get(job.name)
        if place is None:
            return None
        self._file.seek(place)
        line = json.loads(self._file.readline())
        if line["digest"] != digest_of(job):
            raise UserError(
                f"{self.path.parent}: the records of {job.name} are not those it was written from; the source has "
                "changed since the conversion was interrupted: give --overwrite instead of --resume to begin anew"
            )
        if line["size"] and not _is_whole(self.path.with_name(job.name), line["size"], line["written"]):
            return None
        rejected = [Rejection.of_journal(rejection) for rejection in line["rejected"]]
        return Done(line["written"], line["text_only"], line["repeated_ids"], line["size"], rejected)

    def enter(self, job_name: str, digest: str, done: Done) -> None:
        """Note that a shard is whole."""
        line = asdict(done) | {"shard": job_name, "digest": digest}
        line["rejected"] = [list(asdict(rejection).values()) for rejection in done.rejected]
        self._append(line)

    def end(self) -> None:
        """Note that all is done."""
        self._append(END)
        os.fsync(self._file)

    def close(self) -> None:
        """Let others open it."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(line, default=str).encode() + b"\n")
        self._file.flush()

    def _lock(self) -> None:
        """Until every process that shares the open journal has ended, workers included."""
        deadline = time.monotonic() + SECONDS_FOR_WORKERS_TO_END
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.path.parent}: another process is converting into it ({self.path.name}); wait for it"
                    ) from None
                time.sleep(0.1)


def ended_parts(folder: Path, again: str) -> dict[Part, Journal]:
    """The journals of all parts of a folder, read; again: the options by which a part goes on, for the message.

    Raises UserError unless all of one number are there and have ended.
    """
    there = parts_in(folder)
    counts = sorted({part.count for part in there})
    if len(counts) != 1:
        what = ", ".join(map(str, there)) or "none"
        raise UserError(
            f"{folder}: holds the parts {what}, wanted 1/N to N/N of one N; give the commands with --part first, then "
            "--join"
        )
    missing = {Part(number, counts[0]) for number in range(1, counts[0] + 1)} - set(there)
    problems = [f"part {part} has not begun" for part in sorted(missing)]
    journals = {part: Journal(folder / part.journal) for part in there}
    for part, journal in journals.items():
        journal.read()
        if not journal.ended:
            problems.append(f"part {part} has not ended")
    if problems:
        raise UserError(f"{folder}: {', '.join(problems)}; give the command of each with {again}, then --join")
    return journals


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name was this, is now that` for each value that differs."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name} was {before.get(name)}, is now {now.get(name)}" for name in names if before.get(name) != now.get(name)
    ]


def digest_of(job: Job) -> str:
    """Changes when any record of the job does."""
    numbers = [number for sample in job.samples for number in (sample.number, sample.content)]
    return hashlib.blake2b(repr((job.split, numbers)).encode(), digest_size=16).hexdigest()


def _is_whole(shard: Path, size: int, samples: int) -> bool:
    index = Path(f"{shard}.idx")
    return (
        shard.is_file() and shard.stat().st_size == size and index.is_file() and index.stat().st_size == 8 * samples + 8
    )
