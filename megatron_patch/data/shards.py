"""Shards written directly: ustar archives, their `.idx` files and the `.nv-meta` folder of megatron-energon 7.4.

Keys are sequential numbers, so that energon's silent traps (dots, duplicates and capitals in names) cannot occur.
"""

import itertools
import json
import struct
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits of ustar's size field


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file, with constant owner and time so that equal data give equal shards.

    Source: POSIX.1-1988, pax(1), "ustar Interchange Format".
    """
    encoded = name.encode("ascii")
    assert len(encoded) <= 100 and 0 <= size <= MAX_MEMBER_BYTES, (name, size)
    before = struct.pack(
        "100s8s8s8s12s12s", encoded, b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"0" * 11
    )
    after = struct.pack("1s100s6s2s32s32s8s8s155s12x", b"0", b"", b"ustar\0", b"00", b"", b"", b"", b"", b"")
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


class ShardWriter:
    """Writes the samples of one split into shards `<split>-000000.tar`, ... of at most `samples_per_shard`."""

    def __init__(self, folder: Path, split: str, samples_per_shard: int) -> None:
        self.counts: dict[str, int] = {}  # shard name -> samples
        self._folder = folder
        self._split = split
        self._samples_per_shard = samples_per_shard
        self._file: BinaryIO | None = None
        self._offsets: list[int] = []
        self._samples = 0

    @property
    def samples(self) -> int:
        """Samples written so far."""
        return self._samples

    def write(self, number: int, parts: Mapping[str, bytes]) -> None:
        """Append a sample, {part name: bytes}; its number must differ from those of all other samples of the folder."""
        if self._file is None:
            self._file = (self._folder / self._shard_name()).open("wb")
        key = f"{number:08d}"
        self._offsets.append(self._file.tell())
        for part, data in parts.items():
            self._file.write(tar_header(f"{key}.{part}", len(data)))
            self._file.write(data)
            self._file.write(bytes(-len(data) % BLOCK_BYTES))
        self._samples += 1
        if len(self._offsets) == self._samples_per_shard:
            self.close()

    def close(self) -> None:
        """End the open shard and write its index: the offset of each sample's first header, then the end."""
        if self._file is None:
            return
        offsets = [*self._offsets, self._file.tell()]
        self._file.write(END_OF_ARCHIVE)
        self._file.close()
        name = self._shard_name()
        (self._folder / f"{name}.idx").write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
        self.counts[name] = len(self._offsets)
        self._file = None
        self._offsets = []

    def abandon(self) -> None:
        """Close the open file without ending the shard: the folder is going to be removed."""
        if self._file is not None:
            self._file.close()

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self.counts):06d}.tar"


def write_meta(folder: Path, splits: Mapping[str, Mapping[str, int]]) -> None:
    """Write `.nv-meta` for {split: {shard name: samples}}; an empty split gets no entry."""
    meta = folder / ".nv-meta"
    meta.mkdir()
    counts = {name: count for shards in splits.values() for name, count in shards.items()}
    info = {"energon_version": version("megatron-energon"), "shard_counts": counts}
    (meta / ".info.json").write_text(json.dumps(info, indent=2) + "\n")
    lines = ["split_parts:"]
    for split, shards in splits.items():
        if shards:
            lines += [f"  {split}:", *(f"  - {name}" for name in shards)]
    (meta / "split.yaml").write_text("\n".join([*lines, "exclude: []", ""]))
    (meta / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors:\n  layout: llava\n"
    )


def read_back(folder: Path, splits: Sequence[str]) -> dict[str, int]:
    """Reopen the folder with energon's own loader and read a few records of each split; returns {split: records}.

    Raises whatever energon raises: a folder that cannot be read back is a fault of this file, not of the user.
    """
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless
    from megatron.energon.errors import reraise_exception

    class RawEncoder(DefaultTaskEncoder):
        """Hands samples over as they are."""

        decoder = None
        cookers = [Cooker(stateless(lambda sample: sample))]

        @stateless
        def batch(self, samples: list) -> list:
            """A batch is the list of its samples."""
            return samples

    found = {}
    for split in splits:
        dataset = get_val_dataset(
            str(folder),
            split_part=split,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception),
            batch_size=1,
            task_encoder=RawEncoder(),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'pin_memory'")
            for (sample,) in itertools.islice(get_loader(dataset), 4):
                json.loads(sample["json"])
        found[split] = len(dataset)
    return found
