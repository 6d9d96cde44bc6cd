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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from megatron_patch.atomic_files import atomic_file
from megatron_patch.data.loading.collator import as_it_is
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.sampler import RecordLengths
from megatron_patch.data.loading.task_encoder import TaskEncoder
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError

logger = logging.getLogger(__name__)

CHUNK_RECORDS = 256
# The config on which a record's length depends, besides the tokenizer's files.
OF_SETTINGS = ("template", "image_tokens", "tiles", "image_conv_front", "image_start_end", "longest_record")
OF_SIZES = ("any_resolution", "apply_exif_orientation")  # where sizes of images matter


def record_lengths(dataset: Dataset, encoder: TaskEncoder, config: DataConfig) -> RecordLengths:
    """Lengths of all records, from the file that an earlier run left, else measured in several processes.

    Several ranks that ask at the same time wait for the one that measures.
    """
    file = _folder(dataset) / f"llava_lengths_{_key(dataset, config)}.npz"
    with _locked(file.with_suffix(".lock")):
        if file.is_file():
            with contextlib.suppress(Exception), np.load(file) as saved:  # a damaged file is measured again
                if len(saved["tokens"]) == len(dataset):
                    return RecordLengths(saved["tokens"], saved["images" if "images" in saved else "pictures"])
        lengths = count_lengths(dataset, encoder)
        with atomic_file(file, suffix=".npz") as unfinished:  # numpy appends the suffix where it is not
            np.savez(unfinished, tokens=lengths.tokens, images=lengths.images)
    return lengths


def count_lengths(dataset: Dataset, encoder: TaskEncoder) -> RecordLengths:
    """Lengths of all records as training would see them; 0 where it would skip one for what its text is."""
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
        found = []
        for chunk in chunks:
            found.append(chunk)
            bar.update(chunk.shape[1])
    tokens, images = np.concatenate(found, axis=1)
    return RecordLengths(tokens, images)


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
        return np.array([self._length(index) for index in indices], dtype=np.int32).T

    def _length(self, index: int) -> tuple[int, int]:
        """(tokens, images) of a record; (0, 0) if it cannot be used."""
        try:
            parts = self._encoder.read_text(self._dataset, index)
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


def _folder(dataset: Dataset) -> Path:
    """Beside the data, or where that is read-only in the temporary folder."""
    meta = Path(dataset.folders[0].path) / ".nv-meta"
    if os.access(meta, os.W_OK):
        return meta
    own = Path(tempfile.gettempdir()) / f"llava_lengths_{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    return own


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a file's lock; the operating system gives it back when a process dies."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
