"""Which of many millions of records were there before, in eight bytes each."""

import hashlib

import numpy as np


def hash_of(data: bytes) -> int:
    """64 bits: for millions of records a chance collision is less likely than 1 in 10,000."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Deduplicator:
    """Remembers 64-bit hashes in sorted runs, the next at most half as long as the one before it."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Hashes uint64 [N] in their order -> bool [N]: is it there already, from before or earlier among these?"""
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        repeated = np.zeros(len(hashes), dtype=bool)
        repeated[1:] = ordered[1:] == ordered[:-1]
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, ordered), len(run) - 1)
            repeated |= run[places] == ordered
        new = ordered[~repeated]
        if len(new):
            self._runs.append(new)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")  # of two sorted halves: a merge
            self._runs.append(merged)
        found = np.empty(len(hashes), dtype=bool)
        found[order] = repeated
        return found
