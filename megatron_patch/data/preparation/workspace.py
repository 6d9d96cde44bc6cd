"""The folder in which a conversion grows, and the journals by which an interrupted one goes on.

`<output>.partial` holds shards that are whole, and a journal with a line for each; it becomes the output at the end.
A conversion by one process (or by one that has others work for it) has one journal, parts have one each.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_patch.atomic_files import sync
from megatron_patch.data.preparation.journal import Journal, differences, ended_parts
from megatron_patch.data.preparation.parts import Part, parts_in, refuse_another_count
from megatron_patch.data.preparation.workers import Done, Job
from megatron_patch.errors import UserError
from megatron_patch.sight import Sight
from megatron_patch.sight import differences as unlike

JOURNAL = "journal.jsonl"
LEDGER = "ledger.json"
FORMAT = 1


class Workspace(Protocol):
    """What a conversion asks of its folder."""

    folder: Path

    def find(self, job: Job) -> Done | None:
        """What became of this job before.  Raises UserError when the job was another one then."""

    def enter(self, job_name: str, digest: str, done: Done) -> None:
        """Note that a shard is whole."""

    def finish(self) -> None:
        """All is done."""

    def refuse(self) -> None:
        """Stop because something is wrong with the data or the options."""

    def leave(self) -> None:
        """Stop, so that it can be resumed."""


class WholeWorkspace:
    """Of a conversion that is not in parts.

    Raises UserError when it exists and is to be neither resumed nor replaced, when another process works in it, or when
    it began with other data or options (`began_with`).
    """

    def __init__(self, output: Path, began_with: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        self.folder = partial_of(output)
        self._output = output
        began_with = _plain(began_with)
        if (parts := parts_in(self.folder)) and not overwrite:
            raise UserError(
                f"{self.folder}: holds parts of a conversion ({', '.join(map(str, parts))}); give --join when all are "
                "done, or --overwrite to begin anew"
            )
        if self.folder.exists() and not (resume or overwrite):
            raise UserError(
                f"{self.folder}: is an interrupted conversion; give --resume to go on, or --overwrite to begin anew"
            )
        self._resumed = resume and (self.folder / JOURNAL).is_file()
        if not self._resumed:
            self._begin(began_with)
        self._journal = Journal(self.folder / JOURNAL)
        if self._resumed:
            self._journal.read()
            if different := differences(self._journal.began_with, began_with):
                raise _began_differently(self.folder, different)
            _remove_unfinished(self.folder, [self._journal])

    def find(self, job: Job) -> Done | None:
        """What became of this job before the interruption."""
        return self._journal.find(job)

    def enter(self, job_name: str, digest: str, done: Done) -> None:
        """Note that a shard is whole."""
        self._journal.enter(job_name, digest, done)

    def finish(self) -> None:
        """The folder becomes the output, in place of one that exists."""
        _become(self._output, self.folder, [self._journal])

    def refuse(self) -> None:
        """Without a trace, unless there was one before."""
        self._journal.close()
        if not self._resumed:
            shutil.rmtree(self.folder, ignore_errors=True)

    def leave(self) -> None:
        """Stop, so that it can be resumed."""
        self._journal.close()

    def _begin(self, began_with: Mapping[str, Any]) -> None:
        if self.folder.exists():
            journals = [JOURNAL] if (self.folder / JOURNAL).is_file() else []
            journals += [part.journal for part in parts_in(self.folder)]
            opened = [Journal(self.folder / name) for name in journals]  # nobody works in it
            if not opened and any(self.folder.iterdir()) and not (self.folder / LEDGER).is_file():
                raise _foreign(self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        Journal.begin(self.folder / JOURNAL, began_with)


class PartWorkspace:
    """Of one part; others may be at work in the same folder, on other machines.

    Raises UserError as WholeWorkspace, and when the folder belongs to a conversion in another number of parts or in
    none, or other parts see other files (`seen`, of sight.look) or began with other data or options.
    """

    def __init__(
        self, output: Path, began_with: Mapping[str, Any], seen: Sight, part: Part, resume: bool, overwrite: bool
    ) -> None:
        self.folder = partial_of(output)
        path = self.folder / part.journal
        began_with = _plain(began_with)
        there = parts_in(self.folder)
        self._refuse_others(part, there)
        for other in there:
            if other != part and (other_began := Journal.beginning(self.folder / other.journal)):
                _compare(self.folder, other, other_began, began_with, seen)
        if path.exists() and not (resume or overwrite):
            raise UserError(
                f"{self.folder}: part {part} was interrupted or is done; give --resume to go on, or --overwrite to "
                "begin it anew"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        Journal.begin(path, {**began_with, "seen": seen})
        self._journal = Journal(path)
        self._journal.read()
        if not resume or not self._journal.began_with:
            self._journal.restart({**began_with, "seen": seen})
        else:
            _compare(self.folder, part, self._journal.began_with, began_with, seen)

    def find(self, job: Job) -> Done | None:
        """What became of this job before the interruption."""
        return self._journal.find(job)

    def enter(self, job_name: str, digest: str, done: Done) -> None:
        """Note that a shard is whole, its index included: this machine may be gone when the parts are joined."""
        if done.written:
            sync(self.folder / f"{job_name}.idx")
        self._journal.enter(job_name, digest, done)

    def finish(self) -> None:
        """The part can be joined."""
        sync(self.folder)
        self._journal.end()
        self._journal.close()

    def refuse(self) -> None:
        """What is done stays: others are at work in the folder."""
        self._journal.close()

    def leave(self) -> None:
        """Stop, so that it can be resumed."""
        self._journal.close()

    def _refuse_others(self, part: Part, there: Iterable[Part]) -> None:
        if (self.folder / JOURNAL).is_file():
            raise UserError(
                f"{self.folder}: is a conversion that is not in parts; go on with it without --part and with --resume, "
                "or remove it"
            )
        refuse_another_count(self.folder, part)
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() and not there else []
        if not all(name.startswith("journal-") for name in names):  # another part may be making its journal just now
            raise _foreign(self.folder)


class JoinedWorkspace:
    """Of all parts, each of which has ended.  Writes no shards.

    Raises UserError when parts are missing, unfinished, at work, of several conversions, or saw other files.
    """

    def __init__(self, output: Path, began_with: Mapping[str, Any], seen: Sight) -> None:
        self.folder = partial_of(output)
        self._output = output
        self._journals = ended_parts(self.folder, "--part and --resume")
        for part, journal in self._journals.items():
            _compare(self.folder, part, journal.began_with, _plain(began_with), seen)
        _remove_unfinished(self.folder, self._journals.values())

    def find(self, job: Job) -> Done:
        """What its part has made of it.  Raises UserError when that is not there any more."""
        part = Part.of_job(job.number, len(self._journals))
        done = self._journals[part].find(job)
        if done is None:
            raise UserError(
                f"{self.folder}: {job.name} of part {part} is missing or damaged; give the command of --part {part} "
                "with --resume, then --join"
            )
        return done

    def enter(self, job_name: str, digest: str, done: Done) -> None:
        """Nothing is made here."""
        raise AssertionError(job_name)

    def finish(self) -> None:
        """The folder becomes the output, in place of one that exists."""
        _become(self._output, self.folder, list(self._journals.values()))

    def refuse(self) -> None:
        """What the parts have done stays."""
        self.leave()

    def leave(self) -> None:
        """Stop, so that it can be joined later."""
        for journal in self._journals.values():
            journal.close()


def partial_of(output: Path) -> Path:
    """Where an output grows."""
    return output.with_name(f"{output.name}.partial")


def _plain(began_with: Mapping[str, Any]) -> dict[str, Any]:
    """As a journal gives it back."""
    return json.loads(json.dumps({"format": FORMAT, **began_with}))


def _compare(folder: Path, part: Part, before: Mapping[str, Any], now: Mapping[str, Any], seen: Sight) -> None:
    """Raises UserError unless a part began with what is so now, on a machine that sees the same files."""
    settings = {name: value for name, value in before.items() if name != "seen"}
    if different := differences(settings, now):
        raise _began_differently(f"{folder}: part {part}", different)
    if different := unlike(before["seen"], seen):
        raise UserError(
            f"{folder}: part {part} saw other files on its machine than this one sees ({'; '.join(different[:3])}); "
            "mount the same folders on all, and give the command of the part that lacked them with --overwrite"
        )


def _began_differently(what: object, different: Iterable[str]) -> UserError:
    return UserError(
        f"{what}: began differently ({'; '.join(different)}); give what it began with, or --overwrite instead of "
        "--resume to begin anew"
    )


def _foreign(folder: Path) -> UserError:
    return UserError(f"{folder}: is no interrupted conversion, so it is not removed; move it away")


def _remove_unfinished(folder: Path, journals: Iterable[Journal]) -> None:
    kept = set()
    for journal in journals:
        kept |= {journal.path.name, *journal.finished, *(f"{name}.idx" for name in journal.finished)}
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _become(output: Path, folder: Path, journals: Iterable[Journal]) -> None:
    for journal in journals:
        journal.close()
        journal.path.unlink()
    sync(folder)
    if output.exists():
        old = output.with_name(f"{output.name}.old-{os.getpid()}")
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old)
    else:
        folder.rename(output)
    sync(output.parent)
