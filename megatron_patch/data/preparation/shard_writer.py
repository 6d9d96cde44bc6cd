"""Shards written directly: ustar archives, their `.idx` files and the `.nv-meta` folder of megatron-energon 7.4.

Keys are numbers, so that energon's silent traps (dots, duplicates and capitals in names) cannot occur.
"""

import json
import os
import struct
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from megatron_patch.atomic_files import sync, write_text

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits of ustar's size field
BUFFERED_BYTES = 1 << 20  # a shard is written in pieces of about this size ...
BUFFERED_PIECES = 500  # ... or of so many buffers, fewer than the 1024 that the kernel takes at once

# The fields of a ustar header around its name, size and checksum.  Source: POSIX.1-1988, pax(1), "ustar Interchange
# Format".  Owner and time are constant, so that equal data give equal shards.
_MODE_AND_OWNER = b"0000644\0" + b"0000000\0" + b"0000000\0"
_TIME = b"0" * 11 + b"\0"
_TYPE_TO_END = struct.pack("1s100s6s2s32s32s8s8s155s12x", b"0", b"", b"ustar\0", b"00", b"", b"", b"", b"", b"")
# The checksum counts its own eight bytes as spaces.
_CONSTANT_SUM = sum(_MODE_AND_OWNER) + sum(_TIME) + sum(_TYPE_TO_END) + 8 * ord(" ")
_PADDING = [bytes(-size % BLOCK_BYTES) for size in range(BLOCK_BYTES)]


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file of `size` bytes."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100 and 0 <= size <= MAX_MEMBER_BYTES, (name, size)
    octal = b"%011o\0" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(encoded) + sum(octal))
    return b"".join((encoded.ljust(100, b"\0"), _MODE_AND_OWNER, octal, _TIME, checksum, _TYPE_TO_END))


class Shard:
    """One shard and its index, written as `<name>.part` and given its name when it is whole and on the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        # A name of its own: what a killed process left, or one on another machine still writes, is never touched.
        self._part = folder / f"{name}.part-{os.urandom(8).hex()}"
        self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._written = 0
        self._offsets: list[int] = []

    @property
    def samples(self) -> int:
        """Samples so far."""
        return len(self._offsets)

    def add(self, number: int, parts: Mapping[str, bytes]) -> None:
        """Append a sample, {part name: bytes}; its number must differ from those of all other samples of the folder."""
        self._offsets.append(self._written + self._buffered)
        for part, data in parts.items():
            self._pieces += (tar_header(f"{number:08d}.{part}", len(data)), data, _PADDING[len(data) % BLOCK_BYTES])
            self._buffered += BLOCK_BYTES + len(data) + -len(data) % BLOCK_BYTES
        if self._buffered > BUFFERED_BYTES or len(self._pieces) > BUFFERED_PIECES:
            self._flush()

    def close(self) -> int:
        """End the shard, write its index (the offset of each sample's first header, then the end) and give both their
        names; returns the shard's bytes.  The index is small: whoever finishes the folder puts it on the disk."""
        end = self._written + self._buffered
        self._pieces.append(END_OF_ARCHIVE)
        self._buffered += len(END_OF_ARCHIVE)
        self._flush()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        index = struct.pack(f"<{len(self._offsets) + 1}Q", *self._offsets, end)
        index_part = self._part.with_name(f"{self._part.name}.idx")
        index_part.write_bytes(index)
        index_part.rename(f"{self._path}.idx")
        self._part.rename(self._path)
        return self._written

    def abandon(self) -> None:
        """Remove what was written so far."""
        os.close(self._descriptor)
        self._part.unlink()

    def _flush(self) -> None:
        for first in range(0, len(self._pieces), BUFFERED_PIECES):
            pieces = self._pieces[first : first + BUFFERED_PIECES]
            size = sum(map(len, pieces))
            done = os.writev(self._descriptor, pieces)
            if done < size:  # a signal, a file larger than 2 GiB, or a disk that fills up: then the next call says so
                rest = memoryview(b"".join(pieces))[done:]
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        self._written += self._buffered
        self._pieces, self._buffered = [], 0


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def write_meta(folder: Path, splits: Mapping[str, Mapping[str, int]]) -> None:
    """Write `.nv-meta` for {split: {shard name: samples}}; an empty split gets no entry."""
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    counts = {name: count for shards in splits.values() for name, count in shards.items()}
    info = {"energon_version": version("megatron-energon"), "shard_counts": counts}
    write_text(meta / ".info.json", json.dumps(info, indent=2) + "\n", durable=True)
    lines = ["split_parts:"]
    for split, shards in splits.items():
        if shards:
            lines += [f"  {split}:", *(f"  - {name}" for name in shards)]
    write_text(meta / "split.yaml", "\n".join([*lines, "exclude: []", ""]), durable=True)
    kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors:\n  layout: llava\n"
    write_text(meta / "dataset.yaml", kind, durable=True)
    sync(meta)
