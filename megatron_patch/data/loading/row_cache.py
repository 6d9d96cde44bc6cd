"""Packed rows of a dataset: few are packed by each process for itself, many once per folder and mapped into memory."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from megatron_patch.atomic_files import atomic_folder
from megatron_patch.data.loading.collator import as_it_is
from megatron_patch.data.loading.lengths import locked
from megatron_patch.data.loading.packing import PackedRows, pack
from megatron_patch.data.loading.sampler import RecordLengths, windows_to_pack

FORMAT = 1  # of the files; raise it whenever rows would come to hold other records
LEAST_RECORDS = 2**20  # are packed in a second and take 4 MB: fewer are not worth a file
MOST_PROCESSES = 16  # that pack


def packed_rows(
    shard_counts: Sequence[int] | np.ndarray,
    seed: int,
    lengths: RecordLengths,
    capacity: int,
    shuffle: bool,
    folder: Path,
    start: int = 0,
) -> PackedRows:
    """Rows of `capacity` tokens for the records of some shards, of which the first is number `start` in `lengths`.

    shuffle: records are packed in the windows of the shuffled epoch 0; else as they lie in the folder.
    Many rows are kept in `folder`; several ranks that ask at the same time wait for the one that packs.
    """
    records = int(np.sum(shard_counts))
    packing = _Packing(shard_counts, seed, lengths.tokens[start : start + records], capacity, shuffle)
    if records < LEAST_RECORDS:
        return PackedRows.of(packing, records, capacity)
    told = [FORMAT, lengths.fingerprint, start, seed if shuffle else None, capacity]
    key = hashlib.sha256(json.dumps(told).encode() + np.asarray(shard_counts, dtype="<i8").tobytes()).hexdigest()[:16]
    cache = folder / f"llava_rows_{key}"
    with locked(cache.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError):  # absent, or damaged
            return PackedRows.open(cache, records, capacity)
        shutil.rmtree(cache, ignore_errors=True)
        with atomic_folder(cache) as unfinished:
            PackedRows.write(unfinished, _in_processes(packing, records), records)
    return PackedRows.open(cache, records, capacity)


class _Packing(TorchDataset):
    """`packing[window]` -> a window's records as pack() gives them, and their tokens."""

    def __init__(
        self, shard_counts: Sequence[int] | np.ndarray, seed: int, tokens: np.ndarray, capacity: int, shuffle: bool
    ) -> None:
        self._windows, self._window = windows_to_pack(shard_counts, seed, shuffle)
        self._tokens, self._capacity = tokens, capacity

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        if number >= len(self):
            raise IndexError(number)
        records = self._window(number)
        tokens = self._tokens[records]
        return pack(records, tokens, self._capacity), int(tokens.sum(dtype=np.int64))


def _in_processes(packing: _Packing, records: int) -> Iterator[tuple[np.ndarray, int]]:
    """The windows in their order, packed by as many processes as there are cores."""
    from tqdm import tqdm

    cores = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    workers = cores if cores > 1 and len(packing) > 4 * cores else 0
    windows = DataLoader(
        packing,
        batch_size=None,
        num_workers=workers,
        collate_fn=as_it_is,
        multiprocessing_context="fork" if workers else None,
    )
    with tqdm(total=records, unit=" records", desc="packing rows", mininterval=1.0) as bar:
        for packed, tokens in windows:
            yield packed, tokens
            bar.update(len(packed))
