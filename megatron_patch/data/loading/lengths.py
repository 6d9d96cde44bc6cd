"""Length in tokens of every record of a dataset, measured once and kept beside its folder.

Packing and grouping need all lengths before the first batch; images are not read for it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from megatron_patch.atomic_files import atomic_file
from megatron_patch.data.loading.collator import as_it_is
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.dataset import META, Dataset, Parts
from megatron_patch.data.loading.sampler import RecordLengths
from megatron_patch.data.loading.task_encoder import TaskEncoder
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.object_storage import Absent, StorageError

logger = logging.getLogger(__name__)

CHUNK_RECORDS = 256
FINGERPRINT_BYTES = 16
# The config on which a record's length depends, besides the tokenizer's files.
OF_SETTINGS = ("template", "image_tokens", "tiles", "image_conv_front", "image_start_end", "longest_record")
OF_SIZES = ("any_resolution", "apply_exif_orientation")  # where sizes of images matter


def record_lengths(dataset: Dataset, encoder: TaskEncoder, config: DataConfig) -> RecordLengths:
    """Lengths of all records, from the file that an earlier run left, else measured in several processes.

    Several ranks that ask at the same time wait for the one that measures.
    """
    file = lengths_folder(dataset) / f"llava_lengths_{_key(dataset, config)}.npy"
    records = len(dataset)
    with locked(file.with_suffix(".lock")):
        if not file.is_file():
            _fetch(dataset, file)
        with contextlib.suppress(OSError, ValueError):  # absent, or damaged: then measured again
            return open_lengths(file, records)
        chunks = _former_lengths(file.with_suffix(".npz"), records) or _measured(dataset, encoder)
        with atomic_file(file) as unfinished:
            write_lengths(unfinished, chunks, records)
        _publish(dataset, file)
    return open_lengths(file, records)


def write_lengths(file: Path, chunks: Iterable[np.ndarray], records: int) -> None:
    """Write lengths as int32 [2, records] in numpy's format, and their fingerprint behind it.

    chunks: int32 [2, any], tokens and images of some records, in order; they need not be in memory together.
    """
    found = np.lib.format.open_memmap(file, "w+", dtype=np.int32, shape=(2, records))
    start = 0
    for chunk in chunks:
        found[:, start : start + chunk.shape[1]] = chunk
        start += chunk.shape[1]
    assert start == records, f"lengths of {start} records, wanted {records}"
    found.flush()
    with file.open("ab") as end:
        end.write(RecordLengths(*found).fingerprint.encode())


def open_lengths(file: Path, records: int | None = None) -> RecordLengths:
    """What write_lengths() left, mapped into memory.

    Raises OSError where it is absent, ValueError where it is damaged or not of so many records.
    """
    found = np.lib.format.open_memmap(file, mode="r")
    fingerprint = _behind(file, found)
    if found.ndim != 2 or len(found) != 2 or found.dtype != np.int32 or len(fingerprint) != FINGERPRINT_BYTES:
        raise ValueError(f"{file}: no lengths of records")
    if records is not None and found.shape[1] != records:
        raise ValueError(f"{file}: lengths of {found.shape[1]} records, wanted {records}")
    return RecordLengths(*found, known_fingerprint=fingerprint.decode())


def _behind(file: Path, array: np.memmap) -> bytes:
    """What stands in a file behind its array."""
    with file.open("rb") as content:
        content.seek(array.offset + array.nbytes)
        return content.read()


def _former_lengths(file: Path, records: int) -> list[np.ndarray] | None:
    """The lengths that an older version left, as one chunk; None where there are none of so many records."""
    with contextlib.suppress(Exception), np.load(file) as saved:
        if len(saved["tokens"]) == records:
            return [np.array([saved["tokens"], saved["images" if "images" in saved else "pictures"]])]
    return None


def _measured(dataset: Dataset, encoder: TaskEncoder) -> Iterator[np.ndarray]:
    """int32 [2, any] for chunk after chunk: lengths as training would see them; 0 for a record that it would skip for
    what its text is.
    """
    from tqdm import tqdm

    cores = len(os.sched_getaffinity(0))
    workers = cores if cores > 1 and len(dataset) > 4 * CHUNK_RECORDS else 0
    chunks = DataLoader(
        _Chunks(dataset, encoder),
        batch_size=None,
        num_workers=workers,
        collate_fn=as_it_is,
        multiprocessing_context="fork" if workers else None,
    )
    with tqdm(total=len(dataset), unit=" records", desc="measuring lengths", mininterval=1.0) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(chunk.shape[1])


class _Chunks(TorchDataset):
    """`chunks[number]` -> int32 [2, records]: tokens and images of CHUNK_RECORDS records."""

    def __init__(self, dataset: Dataset, encoder: TaskEncoder) -> None:
        self._dataset, self._encoder = dataset, encoder

    def __len__(self) -> int:
        return -(-len(self._dataset) // CHUNK_RECORDS)

    def __getitem__(self, number: int) -> np.ndarray:
        if number >= len(self):
            raise IndexError(number)
        first = number * CHUNK_RECORDS
        indices = range(first, min(first + CHUNK_RECORDS, len(self._dataset)))
        reads = self._dataset.reads(indices, [self._encoder.config.sizes_matter] * len(indices))
        return np.array([self._length(read) for read in reads], dtype=np.int32).T

    def _length(self, read: Callable[[], Parts | None]) -> tuple[int, int]:
        """(tokens, images) of a record; (0, 0) if it cannot be used."""
        try:
            parts = read()
            if parts is None:
                return 0, 0
            text = self._encoder.encode_text(cook(parts))
            # fixed tiles are as many for each image, and multiplied where they are needed
            return len(text.tokens), text.tiles // self._encoder.config.tiles
        except (RecordError, OSError, ValueError, tarfile.TarError):
            return 0, 0


def _key(dataset: Dataset, config: DataConfig) -> str:
    """Changes with anything that a length depends on."""
    values = {name: getattr(config, name) for name in OF_SETTINGS}
    if config.sizes_matter:
        values |= {name: str(getattr(config, name)) for name in OF_SIZES}
    told = hashlib.sha256(json.dumps([dataset.fingerprint, values]).encode())
    if Path(config.template).is_file():
        told.update(Path(config.template).read_bytes())
    for file in sorted(Path(config.tokenizer_path).iterdir()):
        if file.is_file() and ("token" in file.name or file.suffix == ".model"):
            told.update(file.name.encode() + file.read_bytes())
    return told.hexdigest()[:16]


def _fetch(dataset: Dataset, file: Path) -> None:
    """The file that lies beside a dataset in object storage, if one does, for the processes of this node."""
    if store := dataset.folders[0].store:
        with contextlib.suppress(Absent), atomic_file(file) as unfinished:
            unfinished.write_bytes(store.read(f"{META}/{file.name}"))


def _publish(dataset: Dataset, file: Path) -> None:
    """Put the file beside a dataset in object storage, where that may be written."""
    if store := dataset.folders[0].store:
        try:
            store.write(f"{META}/{file.name}", file.read_bytes())
        except StorageError as error:
            logger.warning("%s; the lengths stay on this machine, in %s", error, file)


def lengths_folder(dataset: Dataset) -> Path:
    """Beside the data, or where that is read-only or in object storage in the temporary folder."""
    if not dataset.folders[0].store:
        meta = Path(dataset.folders[0].path) / META
        if os.access(meta, os.W_OK):
            return meta
    own = Path(tempfile.gettempdir()) / f"llava_lengths_{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    return own


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a file's lock; the operating system gives it back when a process dies."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
