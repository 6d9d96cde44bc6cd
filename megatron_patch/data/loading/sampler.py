"""Which records stand at which position of the endless training sequence.

The sequence is a function of the folders, the config and the seed alone.  Data-parallel ranks and workers take turns
along it, so that every parallelism trains on the same records in each step, and the next position is the whole state.
A position holds one record, or with packing the records of one row.
"""

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from megatron_patch.errors import UserError

# Records are shuffled within windows of whole shards, so that reading stays within a few open files.
WINDOW_SHARDS = 16
WINDOW_RECORDS = 16 * 1024
BLEND_BLOCK = 1000  # positions within which a weighted blend keeps its shares exactly


@dataclass(frozen=True)
class RecordLengths:
    """What packing and grouping must know of every record.  N: records."""

    tokens: np.ndarray  # int32 [N], as trained; 0 for a record that cannot be
    images: np.ndarray  # int32 [N]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any length."""
        return hashlib.sha256(self.tokens.tobytes() + self.images.tobytes()).hexdigest()[:16]

    def part(self, start: int, stop: int) -> "RecordLengths":
        """Those of a range of records."""
        return RecordLengths(self.tokens[start:stop], self.images[start:stop])


class RecordSampler(Protocol):
    """An endless sequence of groups of records that stay together."""

    positions: int  # per epoch, in which every record stands exactly once

    def __getitem__(self, position: int) -> tuple[int, ...]:
        """Indices of the records at a position."""


class _Epochs:
    """Orders that are drawn anew for every epoch."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._epochs: dict[int, np.ndarray] = {}

    def draw(self, epoch: int) -> np.ndarray:
        """int64 [positions]: a permutation."""
        raise NotImplementedError

    def entry(self, position: int) -> int:
        """Entry of the permutation that belongs to a position of the endless sequence."""
        epoch, offset = divmod(position, self.positions)
        if epoch not in self._epochs:
            # A batch may reach over the end of an epoch: keep the neighbour, drop what is older.
            self._epochs = {kept: order for kept, order in self._epochs.items() if abs(kept - epoch) == 1}
            self._epochs[epoch] = self.draw(epoch)
        return int(self._epochs[epoch][offset])

    def __getitem__(self, position: int) -> tuple[int, ...]:
        """Where entries are records."""
        return (self.entry(position),)


class ShuffledSampler(_Epochs):
    """Every record once per epoch, each epoch in another order.  `shard_counts`: records per shard, in folder order."""

    def __init__(self, shard_counts: Sequence[int], seed: int) -> None:
        super().__init__(sum(shard_counts))
        self._shard_counts = list(shard_counts)
        self._seed = seed

    def draw(self, epoch: int) -> np.ndarray:
        """The records of an epoch."""
        return np.concatenate(shuffled_windows(self._shard_counts, self._seed, epoch))


class SequentialSampler:
    """Records as they lie in the folder, again and again."""

    def __init__(self, shard_counts: Sequence[int]) -> None:
        self.positions = sum(shard_counts)

    def __getitem__(self, position: int) -> tuple[int, ...]:
        return (position % self.positions,)


class GroupedSampler(_Epochs):
    """Records with images and records of text alone in steps of their own, each step of records of like length.

    LLaVA's group_by_modality_length, without the number of ranks in it: of each modality, `mega_batch_mult` steps are
    sorted by length and cut into steps, and the steps are shuffled.  What does not fill a step comes last, mixed.
    """

    def __init__(
        self,
        shard_counts: Sequence[int],
        seed: int,
        lengths: RecordLengths,
        step_records: int,
        mega_batch_mult: int,
    ) -> None:
        super().__init__(sum(shard_counts))
        self._shuffled = ShuffledSampler(shard_counts, seed)
        self._seed = seed
        self._lengths = lengths
        self._step_records = step_records
        self._group_records = step_records * mega_batch_mult

    def draw(self, epoch: int) -> np.ndarray:
        """The records of an epoch."""
        records = self._shuffled.draw(epoch)
        with_images = self._lengths.images[records] > 0
        steps: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for modality in (records[with_images], records[~with_images]):
            whole = len(modality) // self._step_records * self._step_records
            rest.append(modality[whole:])
            for start in range(0, whole, self._group_records):
                group = modality[start : min(start + self._group_records, whole)]
                group = group[np.argsort(self._lengths.tokens[group], kind="stable")]
                steps += np.split(group, len(group) // self._step_records)
        random = np.random.RandomState([self._seed % 2**32, epoch, 1])
        return np.concatenate([*(steps[step] for step in random.permutation(len(steps))), *rest])


class PackedSampler(_Epochs):
    """Rows of records that together fill `capacity` tokens; the rows stay the same, their order changes each epoch.

    shuffle: records are packed in windows of shards and rows shuffled; else as they lie in the folder, in stored order.
    """

    def __init__(
        self, shard_counts: Sequence[int], seed: int, lengths: RecordLengths, capacity: int, shuffle: bool
    ) -> None:
        if shuffle:
            windows = shuffled_windows(shard_counts, seed, epoch=0)
        else:
            records = np.arange(sum(shard_counts))
            windows = np.split(records, range(WINDOW_RECORDS, len(records), WINDOW_RECORDS))
        packed = [pack(window, lengths.tokens[window], capacity) for window in windows]
        self._rows = [row for rows in packed for row in rows]
        self._rows_per_window = [len(rows) for rows in packed]
        self._seed = seed
        self._shuffle = shuffle
        self.fullness = float(lengths.tokens.sum()) / (
            capacity * len(self._rows)
        )  # share of positions that hold a token
        super().__init__(len(self._rows))

    def draw(self, epoch: int) -> np.ndarray:
        """The rows of an epoch."""
        if not self._shuffle:
            return np.arange(self.positions)
        random = np.random.RandomState([self._seed % 2**32, epoch, 2])
        starts = [0, *itertools.accumulate(self._rows_per_window)]
        windows = [
            starts[window] + random.permutation(self._rows_per_window[window])
            for window in random.permutation(len(self._rows_per_window))
        ]
        return np.concatenate(windows)

    def __getitem__(self, position: int) -> tuple[int, ...]:
        return self._rows[self.entry(position)]


class BlendSampler:
    """Positions dealt to several orders by weight: in every block of positions each has its share, at random places.

    An order that is through begins its next epoch.  `starts`: index of each order's first record.
    """

    def __init__(
        self, orders: Sequence[RecordSampler], starts: Sequence[int], weights: Sequence[float], seed: int
    ) -> None:
        self.positions = sum(order.positions for order in orders)
        self._orders, self._starts, self._seed = list(orders), list(starts), seed
        exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLEND_BLOCK
        counts = np.floor(exact).astype(np.int64)
        # Largest remainders; a weight too small for a place in a block would never be seen.
        for part in np.argsort(counts - exact, kind="stable")[: BLEND_BLOCK - counts.sum()]:
            counts[part] += 1
        if (counts == 0).any():
            raise UserError(
                f"weights {', '.join(map(str, weights))}: one of them is less than 1/{BLEND_BLOCK} of their sum, so "
                "its folder would never be read; raise it or leave the folder out"
            )
        self._counts = counts
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> tuple[int, ...]:
        block, offset = divmod(position, BLEND_BLOCK)
        if self._block is None or self._block[0] != block:
            parts = np.repeat(np.arange(len(self._counts)), self._counts)
            parts = np.random.RandomState([self._seed % 2**32, block, 3]).permutation(parts)
            ranks = np.empty(BLEND_BLOCK, dtype=np.int64)  # how many places of the same part come before, in the block
            for part, count in enumerate(self._counts):
                ranks[parts == part] = np.arange(count)
            self._block = (block, parts, ranks)
        part = int(self._block[1][offset])
        own = block * int(self._counts[part]) + int(self._block[2][offset])
        return tuple(self._starts[part] + index for index in self._orders[part][own])


def pack(records: np.ndarray, tokens: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Fill rows of `capacity` tokens, best fit, longest first; records [N] of tokens [N], at most capacity each.

    Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms" (1974): asymptotically
    at most 11/9 of the fewest possible rows.  Within a row the records keep the order in which they came.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), in order
    for place in np.argsort(-tokens, kind="stable").tolist():
        length = int(tokens[place])
        fit = bisect.bisect_left(free, (length, -1))
        left, row = free.pop(fit) if fit < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        bisect.insort(free, (left - length, row))
    return [tuple(records[sorted(row)].tolist()) for row in rows]


def shuffled_windows(shard_counts: Sequence[int], seed: int, epoch: int) -> list[np.ndarray]:
    """Permutation of all records: shards in random order, then records within windows of shards."""
    # RandomState's stream is frozen (NEP 19), Generator's is not: a resumed run must find the same order after an
    # update of numpy.
    random = np.random.RandomState([seed % 2**32, epoch])
    starts = [0, *itertools.accumulate(shard_counts)]
    windows: list[np.ndarray] = []
    window: list[np.ndarray] = []
    for shard in random.permutation(len(shard_counts)):
        window.append(np.arange(starts[shard], starts[shard + 1]))
        if len(window) >= WINDOW_SHARDS and sum(map(len, window)) >= WINDOW_RECORDS:
            windows.append(np.concatenate(window))
            window = []
    if window:
        windows.append(np.concatenate(window))
    return [random.permutation(records) for records in windows]
