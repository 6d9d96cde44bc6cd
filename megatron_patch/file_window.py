"""A range of a file as a file of its own."""

import io
import os
from typing import Any


class FileWindow(io.RawIOBase):
    """Bytes [start, start + length) of an open file, or fewer when it ends earlier; only what is asked for is read.

    The file's own position is neither used nor moved, so forked processes may share the descriptor.
    """

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start = descriptor, start
        self._size = min(length, os.fstat(descriptor).st_size - start)
        self._position = 0

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
        data = os.pread(self._descriptor, length, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
