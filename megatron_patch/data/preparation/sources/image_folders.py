"""Images that lie in folders, found by the names in the records."""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_patch.data.preparation.shard_writer import MAX_MEMBER_BYTES
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError

# Non-blocking, or a pipe that is named like an image would stop everything.
OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class ImageFolders:
    """Folders that image names start from, tried in their order."""

    def __init__(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; wanted the folder that the records' image names start from")
        self._folders = [f"{folder}{os.sep}" for folder in folders]

    def describe(self) -> list[str]:
        """Absolute paths."""
        return [os.path.realpath(folder) for folder in self._folders]

    def places(self) -> list[Path]:
        """The folders."""
        return [Path(folder) for folder in self._folders]

    def read(self, name: str) -> bytes:
        """Bytes of the first file of this name.  Raises RecordError."""
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise RecordError("image missing", f"{name!r} points outside the image folder")
        for folder in self._folders:
            try:
                data = read_regular_file(folder + name)
            except OSError as error:
                raise RecordError("image unreadable", f"{name}: {error.strerror}") from None
            if data is not None:
                return data
        where = " or ".join(self._folders) or "an image folder: none was given"
        raise RecordError("image missing", f"{name}: not in {where}")


def read_regular_file(path: str) -> bytes | None:
    """Bytes of a file; None where there is none.  Raises OSError when it cannot be read."""
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        if status.st_size > MAX_MEMBER_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return read_exactly(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, size: int) -> bytes:
    """Up to `size` bytes from where the file stands; the kernel hands out at most 2 GiB at once."""
    data = os.read(descriptor, size)
    while len(data) < size and (more := os.read(descriptor, size - len(data))):
        data += more
    return data
