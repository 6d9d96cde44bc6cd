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
    """Folders that names of images, or of videos, start from, tried in their order."""

    def __init__(self, folders: Sequence[Path], kind: str = "image") -> None:
        """kind: `image` or `video`, for messages."""
        for folder in folders:
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: no such folder; wanted the folder that the records' {kind} names start from"
                )
        self._kind = kind
        self._folders = [f"{folder}{os.sep}" for folder in folders]

    def describe(self) -> list[str]:
        """Absolute paths."""
        return [os.path.realpath(folder) for folder in self._folders]

    def places(self) -> list[Path]:
        """The folders."""
        return [Path(folder) for folder in self._folders]

    def read(self, name: str) -> bytes:
        """Bytes of the first file of this name.  Raises RecordError."""
        self._check_inside(name)
        for folder in self._folders:
            try:
                data = read_regular_file(folder + name)
            except OSError as error:
                raise RecordError("image unreadable", f"{name}: {error.strerror}") from None
            if data is not None:
                return data
        raise RecordError(f"{self._kind} missing", f"{name}: {self._nowhere()}")

    def find(self, name: str) -> str:
        """Path of the first file or folder of this name.  Raises RecordError."""
        self._check_inside(name)
        for folder in self._folders:
            if os.path.exists(folder + name):
                return folder + name
        raise RecordError(f"{self._kind} missing", self._nowhere())

    def _check_inside(self, name: str) -> None:
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise RecordError(f"{self._kind} missing", f"{name!r} points outside the {self._kind} folder")

    def _nowhere(self) -> str:
        article = "an" if self._kind == "image" else "a"
        return f"not in {' or '.join(self._folders) or f'{article} {self._kind} folder: none was given'}"


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
