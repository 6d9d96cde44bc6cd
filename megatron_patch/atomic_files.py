"""Write beside, then rename: under a result's own name lies something whole, or what lay there before.

Both context managers hand out a place beside the target, `TARGET.tmp-<process id>`.  When the block ends well it gets
the target's name; on any exception it is removed, with the folders above that were made for it.  After a kill it stays
under a name that nobody reads, and the target is untouched.

`durable` is for what a crash of the machine, not only of the process, must not leave empty: the bytes are on the disk
before the name is given.  The new name itself may be lost with the machine (the old file is there then); who needs it
calls sync() on the folder.  It costs a wait for the disk, so what can be made again does without.

Written otherwise, and why: a shard (shard_writer.Shard) stays open over many calls and is synced through its own
descriptor, for speed; a conversion's folder (workspace.Workspace) stays on purpose, to be resumed; a checkpoint's
deletion (checkpoint_retention) is the reverse, first a rename; quickstart.sh and setup_environment.sh are bash.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(target: Path, *, durable: bool = False, replace: bool = True, suffix: str = "") -> Iterator[Path]:
    """The path of a new file, to be written and closed within the block.

    Args:
        durable: its bytes are on the disk before it gets its name.
        replace: a target that exists is replaced; else it is an error, also when it appears meanwhile.
        suffix: end of the temporary name, for writers that go by it.
    Raises:
        FileExistsError: the target exists, and is not to be replaced.
        OSError: it cannot be written.
    """
    beside = target.with_name(f"{target.name}.tmp-{os.getpid()}{suffix}")
    with _parents_of(target):
        try:
            yield beside
            if durable:
                sync(beside)
            if replace:
                os.replace(beside, target)
            else:
                _rename_to_new(beside, target)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder, to be filled within the block; the target must not exist or be empty.

    What is written in it is as durable as its writers make it.

    Raises:
        FileExistsError: the target was filled by someone else meanwhile.
        OSError: the folder cannot be made or written.
    """
    target = target.absolute()
    beside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    with _parents_of(target):
        beside.mkdir()
        try:
            yield beside
            try:
                os.rename(beside, target)  # onto an empty folder or nothing
            except OSError as error:
                if not target.exists():
                    raise
                raise FileExistsError(error.errno, error.strerror, str(target)) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def write_text(target: Path, text: str, *, durable: bool = False) -> None:
    """Write a small file in UTF-8, as atomic_file()."""
    with atomic_file(target, durable=durable) as beside:
        beside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_new(beside: Path, target: Path) -> None:
    try:
        os.link(beside, target)  # unlike a rename it fails when the target appeared meanwhile
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(beside, target)


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders above; those made here that are empty at the end are removed."""
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in made:  # nearest first; one that holds something stays
            with suppress(OSError):
                parent.rmdir()
