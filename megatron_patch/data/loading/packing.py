"""Records packed into rows of so many tokens: which records share a row, and how the rows are kept.

Rows are packed window by window, each by itself, so that packing and reading hold one window whatever the number of
records.  Four bytes stand for a record.
"""

import bisect
import functools
import heapq
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

WINDOWS_KEPT = 4  # whose rows are held: neighbouring ones are asked for in any order
RECORDS_FILE, WINDOWS_FILE = "records.npy", "windows.npy"


def best_fit(tokens: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [N]: the row of each record, for records of tokens [N], at most capacity each; longest first, best fit.

    Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms" (1974): asymptotically
    at most 11/9 of the fewest possible rows.
    """
    order = np.argsort(-tokens.astype(np.int64), kind="stable")
    bits = [1 << left for left in range(capacity + 1)]
    free: list[list[int]] = [[] for _ in bits]  # rows by the tokens left in them; of several, the first row is taken
    some = 0  # bit `left` is set where there are such rows: the next one from a length on is found by a shift
    rows = 0
    chosen: list[int] = []
    for length in tokens[order].tolist():
        fits = some >> length
        if fits:
            left = length + (fits & -fits).bit_length() - 1
            row = heapq.heappop(free[left])
            if not free[left]:
                some ^= bits[left]
        else:
            left, row = capacity, rows
            rows += 1
        chosen.append(row)
        left -= length
        heapq.heappush(free[left], row)
        some |= bits[left]
    found = np.empty(len(tokens), dtype=np.int64)
    found[order] = chosen
    return found


def pack(records: np.ndarray, tokens: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [N]: the records row after row, each as PackedRows keeps it; records [N] of tokens [N].

    Within a row the records keep the order in which they came.
    """
    rows = best_fit(tokens, capacity)
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    is_last = np.append(rows[1:] != rows[:-1], True)[: len(rows)]
    return records[order] * 2 + is_last


class PackedRows:
    """`rows[number]` -> indices of a row's records."""

    def __init__(self, records: np.ndarray, windows: np.ndarray, capacity: int) -> None:
        """records: uint [N], 2 x index + 1 for the last record of a row, row after row.

        windows: int64 [windows, 3], in each so many rows, records and tokens.
        """
        self._records, self._capacity = records, capacity
        self.rows_per_window = windows[:, 0]
        self._tokens = int(windows[:, 2].sum())
        self._first_rows = [0, *itertools.accumulate(windows[:, 0].tolist())]
        self._first_records = [0, *itertools.accumulate(windows[:, 1].tolist())]
        self._window = functools.lru_cache(WINDOWS_KEPT)(self._read)

    @classmethod
    def of(cls, packed: Iterable[tuple[np.ndarray, int]], records: int, capacity: int) -> "PackedRows":
        """Rows in memory.  packed: of each window what pack() gives, and its tokens."""
        kept = np.empty(records, dtype=_kind(records))
        return cls(kept, _fill(kept, packed), capacity)

    @staticmethod
    def write(folder: Path, packed: Iterable[tuple[np.ndarray, int]], records: int) -> None:
        """The same as files of an existing folder, without holding them in memory."""
        kept = np.lib.format.open_memmap(folder / RECORDS_FILE, "w+", dtype=_kind(records), shape=(records,))
        windows = _fill(kept, packed)
        kept.flush()
        np.save(folder / WINDOWS_FILE, windows)

    @classmethod
    def open(cls, folder: Path, records: int, capacity: int) -> "PackedRows":
        """What write() left, mapped into memory.  Raises OSError and ValueError where it is damaged."""
        kept = np.lib.format.open_memmap(folder / RECORDS_FILE, mode="r")
        windows = np.array(np.lib.format.open_memmap(folder / WINDOWS_FILE, mode="r"))
        if len(kept) != records or windows[:, 1].sum() != records:
            raise ValueError(f"{folder}: rows of {len(kept)} records, wanted {records}")
        return cls(kept, windows, capacity)

    def __len__(self) -> int:
        return self._first_rows[-1]

    def __getitem__(self, row: int) -> tuple[int, ...]:
        window = bisect.bisect_right(self._first_rows, row) - 1
        records, ends = self._window(window)
        place = row - self._first_rows[window]
        return tuple(records[ends[place - 1] if place else 0 : ends[place]].tolist())

    @property
    def fullness(self) -> float:
        """Share of positions that hold a token."""
        return self._tokens / (self._capacity * len(self))

    def _read(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of a window's records, row after row, and int64 [rows] where each row ends among them."""
        kept = self._records[self._first_records[window] : self._first_records[window + 1]]
        return (kept >> 1).astype(np.int64), np.flatnonzero(kept & 1) + 1


def _kind(records: int) -> type[np.unsignedinteger]:
    """Of the numbers that stand for so many records."""
    return np.uint32 if 2 * records <= 2**32 else np.uint64


def _fill(kept: np.ndarray, packed: Iterable[tuple[np.ndarray, int]]) -> np.ndarray:
    """Write the windows' rows into `kept`; returns int64 [windows, 3]: rows, records, tokens of each."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for records, tokens in packed:
        kept[start : start + len(records)] = records
        start += len(records)
        found.append((int((records & 1).sum()), len(records), tokens))
    assert start == len(kept), f"{start} records were packed, wanted {len(kept)}"
    return np.array(found, dtype=np.int64).reshape(-1, 3)
