"""The folder in which a conversion grows, and the journal by which an interrupted one goes on."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_patch.atomic_files import sync
from megatron_patch.data.preparation.report import Rejection
from megatron_patch.data.preparation.workers import Done, Job
from megatron_patch.errors import UserError

JOURNAL = "journal.jsonl"
LEDGER = "ledger.json"
FORMAT = 1
SECONDS_FOR_WORKERS_TO_END = 5  # after their parent was killed


class Workspace:
    """`<output>.partial`: shards that are whole, and a journal with a line for each; becomes the output at the end.

    Raises UserError when it exists and is to be neither resumed nor replaced, when another process works in it, or when
    it began with other data or options (`began_with`).
    """

    def __init__(self, output: Path, began_with: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        self.folder = output.with_name(f"{output.name}.partial")
        self._output = output
        self._began_with = json.loads(json.dumps({"format": FORMAT, **began_with}))
        self._finished: dict[str, int] = {}  # shard -> place of its line in the journal
        if self.folder.exists() and not (resume or overwrite):
            raise UserError(
                f"{self.folder}: is an interrupted conversion; give --resume to go on, or --overwrite to begin anew"
            )
        self.resumed = resume and (self.folder / JOURNAL).is_file()
        if not self.resumed:
            self._begin()
        self._journal = (self.folder / JOURNAL).open("r+b")
        self._lock()
        if self.resumed:
            self._read_journal()
            self._remove_unfinished()

    def find(self, job: Job) -> Done | None:
        """What became of this job before the interruption.  Raises UserError when the job was another one then."""
        place = self._finished.get(job.name)
        if place is None:
            return None
        self._journal.seek(place)
        line = json.loads(self._journal.readline())
        if line["digest"] != digest_of(job):
            raise UserError(
                f"{self.folder}: the records of {job.name} are not those it was written from; the source has changed "
                "since the conversion was interrupted: give --overwrite instead of --resume to begin anew"
            )
        if line["size"] and not _is_whole(self.folder / job.name, line["size"], line["written"]):
            return None
        rejected = [Rejection.of_journal(rejection) for rejection in line["rejected"]]
        return Done(line["written"], line["text_only"], line["repeated_ids"], line["size"], rejected)

    def enter(self, job_name: str, digest: str, done: Done) -> None:
        """Note that a shard is whole."""
        line = asdict(done) | {"shard": job_name, "digest": digest}
        line["rejected"] = [list(asdict(rejection).values()) for rejection in done.rejected]
        self._append(line)

    def finish(self) -> None:
        """The folder becomes the output, in place of one that exists."""
        self._journal.close()
        (self.folder / JOURNAL).unlink()
        sync(self.folder)
        if self._output.exists():
            old = self._output.with_name(f"{self._output.name}.old-{os.getpid()}")
            self._output.rename(old)
            self.folder.rename(self._output)
            shutil.rmtree(old)
        else:
            self.folder.rename(self._output)
        sync(self._output.parent)

    def leave(self) -> None:
        """Stop, so that it can be resumed."""
        self._journal.close()

    def remove(self) -> None:
        """Stop and leave nothing."""
        self._journal.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> None:
        if self.folder.exists():
            if (self.folder / JOURNAL).is_file():
                self._journal = (self.folder / JOURNAL).open("r+b")
                self._lock()
            elif any(self.folder.iterdir()) and not (self.folder / LEDGER).is_file():
                raise UserError(f"{self.folder}: is no interrupted conversion, so it is not removed; move it away")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._journal = (self.folder / JOURNAL).open("wb")
        self._append(self._began_with)
        self._journal.close()

    def _lock(self) -> None:
        """Until every process that shares the open journal has ended, workers included."""
        deadline = time.monotonic() + SECONDS_FOR_WORKERS_TO_END
        while True:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{self.folder}: another process is converting into it; wait for it") from None
                time.sleep(0.1)

    def _read_journal(self) -> None:
        """Find the lines of finished shards; a last line that was cut off by the interruption is dropped."""
        place, first = 0, True
        for raw in self._journal:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if line is None:
                break
            if first:
                self._compare(line)
                first = False
            else:
                self._finished[line["shard"]] = place
            place += len(raw)
        if first:
            self._compare({})
        self._journal.truncate(place)

    def _compare(self, before: Mapping[str, Any]) -> None:
        names = sorted(before.keys() | self._began_with.keys())
        changed = [
            f"{name} was {before.get(name)}, is now {self._began_with.get(name)}"
            for name in names
            if before.get(name) != self._began_with.get(name)
        ]
        if changed:
            raise UserError(
                f"{self.folder}: began differently ({'; '.join(changed)}); give what it began with, or --overwrite "
                "instead of --resume to begin anew"
            )

    def _remove_unfinished(self) -> None:
        kept = {JOURNAL, *self._finished, *(f"{name}.idx" for name in self._finished)}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.seek(0, os.SEEK_END)
        self._journal.write(json.dumps(line, default=str).encode() + b"\n")
        self._journal.flush()


def digest_of(job: Job) -> str:
    """Changes when any record of the job does."""
    numbers = [number for sample in job.samples for number in (sample.number, sample.content)]
    return hashlib.blake2b(repr((job.split, numbers)).encode(), digest_size=16).hexdigest()


def _is_whole(shard: Path, size: int, samples: int) -> bool:
    index = Path(f"{shard}.idx")
    return (
        shard.is_file() and shard.stat().st_size == size and index.is_file() and index.stat().st_size == 8 * samples + 8
    )
