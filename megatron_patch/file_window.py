"""A range of a file as a file of its own."""

import io
import os
from collections.abc import Callable
from typing import Any


class RangeFile(io.RawIOBase):
    """`size` bytes as a file; read(start, length) gives a range of them, and is asked for no more than is wanted."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        """True, as BufferedReader asks."""
        return True

    def seekable(self) -> bool:
        """True, as BufferedReader asks."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place; returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Present place."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the present place on; returns the bytes read."""
        length = max(0, min(len(buffer), self._size - self._position))
        data = self._read(self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class FileWindow(RangeFile):
    """Bytes [start, start + length) of an open file, or fewer when it ends earlier; only what is asked for is read.

    The file's own position is neither used nor moved, so forked processes may share the descriptor.
    """

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        size = min(length, os.fstat(descriptor).st_size - start)
        super().__init__(lambda place, count: os.pread(descriptor, count, start + place), size)
