"""A range of a file reads like a file of its own."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

from megatron_patch.file_window import FileWindow


def test_it_ends_where_the_range_or_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as file:
        window = FileWindow(file.fileno(), 10, 20)
        assert window.read() == bytes(range(10, 30)) and window.read(5) == b""
        assert window.seek(-4, os.SEEK_END) == 16 and window.read(100) == bytes(range(26, 30))
        window.seek(3)
        assert window.seek(2, os.SEEK_CUR) == 5 and window.read(2) == bytes([15, 16]) and window.tell() == 7
        cut = FileWindow(file.fileno(), 90, 20)
        assert cut.seek(0, os.SEEK_END) == 10 and cut.read(1) == b""
        assert file.tell() == 0, "the file's own position is not moved"


def test_archives_within_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    inner, tar = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("name", b"content")
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    path.write_bytes(b"before" + inner.getvalue() + tar.getvalue() + b"behind")
    with open(path, "rb") as file:
        with zipfile.ZipFile(FileWindow(file.fileno(), 6, len(inner.getvalue()))) as archive:
            assert archive.read("name") == b"content"
        start = 6 + len(inner.getvalue())
        with tarfile.open(fileobj=FileWindow(file.fileno(), start, len(tar.getvalue()))) as archive:
            assert archive.getnames() == ["empty"]
