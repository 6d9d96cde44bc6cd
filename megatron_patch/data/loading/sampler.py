"""Which records stand at which position of the endless training sequence.

The sequence is a function of the folders, the config and the seed alone.  Data-parallel ranks and workers take turns
along it, so that every parallelism trains on the same records in each step, and the next position is the whole state.
A position holds one record, or with packing the records of one row.
"""

import base64
import bisect
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from megatron_patch.data.loading.packing import PackedRows
from megatron_patch.errors import UserError

# Records are shuffled within windows of whole shards, so that reading stays within a few open files.
WINDOW_SHARDS = 16
WINDOW_RECORDS = 16 * 1024
STATE_WINDOWS = 64  # windows of an epoch between two random states that are kept, 2.5 kB each
WINDOWS_KEPT = 4  # a step's records lie in neighbouring windows, and are asked for in any order
BLEND_BLOCK = 1000  # positions within which a weighted blend keeps its shares exactly


@dataclass(frozen=True)
class RecordLengths:
    """What packing and grouping must know of every record.  N: records."""

    tokens: np.ndarray  # int32 [N], as trained; 0 for a record that cannot be
    images: np.ndarray  # int32 [N]
    known_fingerprint: str | None = None  # where it was stored, so that not all lengths are read for it

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any length."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        found = hashlib.sha256()
        for lengths in (self.tokens, self.images):
            for start in range(0, len(lengths), 2**20):
                found.update(lengths[start : start + 2**20].tobytes())
        return found.hexdigest()[:16]


class RecordSampler(Protocol):
    """An endless sequence of groups of records that stay together."""

    positions: int  # per epoch, in which every record stands exactly once

    def __getitem__(self, position: int) -> tuple[int, ...]:
        """Indices of the records at a position."""

    def mark(self, position: int) -> dict[str, Any]:
        """What saves the way to a position, in plain types; may be empty."""

    def restore(self, mark: dict[str, Any]) -> None:
        """Take over a mark of the same order, or an empty one: no position changes, some are reached sooner."""


class _Epoch(Protocol):
    """An order of one epoch: `epoch[offset]` -> the entry at a place of it."""

    def __getitem__(self, offset: int) -> int: ...


class _Epochs:
    """Orders that are drawn anew for every epoch."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._epochs: dict[int, _Epoch] = {}

    def draw(self, epoch: int) -> _Epoch:
        """A permutation of the positions of an epoch."""
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

    def mark(self, position: int) -> dict[str, Any]:
        """As RecordSampler: empty where an epoch is not drawn by windows."""
        epoch, offset = divmod(position, self.positions)
        self.entry(position)
        order = self._epochs[epoch]
        return {"epoch": epoch, **order.mark(offset)} if isinstance(order, Windows) else {}

    def restore(self, mark: dict[str, Any]) -> None:
        """As RecordSampler."""
        if mark:
            order = self.draw(mark["epoch"])
            order.restore(mark)
            self._epochs[mark["epoch"]] = order


def _few_kept(draw: Callable[[int], np.ndarray]) -> Any:
    """The same function of a window's number, that knows what it gave last."""
    return functools.lru_cache(WINDOWS_KEPT)(draw)


class Windows:
    """An epoch's order window by window, so that a process holds a few windows whatever the number of records.

    All permutations come one after the other from one stream of random numbers, and how much of it a permutation takes
    is known only by drawing it.  So a place far ahead costs the drawing of what lies before, about 20 ns a record; the
    stream's state is kept now and then, for ways back, and a mark of it spares a resumed run the way.
    """

    def __init__(
        self, random: np.random.RandomState, sizes: Sequence[int], entries: Callable[[int], np.ndarray]
    ) -> None:
        """sizes: of the windows, in the order of drawing; entries(window): int64 [size], what is permuted."""
        self._random, self._sizes, self._entries = random, sizes, entries
        self._starts = [0, *itertools.accumulate(sizes)]
        self._next = 0  # the window that the stream stands before
        self._states = {0: random.get_state()}  # of the stream, by the window that it stands before
        self.window = _few_kept(self._draw)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._sizes)

    def __getitem__(self, offset: int) -> int:
        number = bisect.bisect_right(self._starts, offset) - 1
        return int(self.window(number)[offset - self._starts[number]])

    def __iter__(self) -> Iterator[np.ndarray]:
        """The windows."""
        return map(self.window, range(len(self)))

    def _draw(self, number: int) -> np.ndarray:
        """int64 [size]: a window's entries, permuted."""
        known = self._known(number)
        if not known <= self._next <= number:
            self._random.set_state(self._states[known])
            self._next = known
        while self._next < number:
            self._keep_state()
            if self._sizes[self._next]:
                self._random.shuffle(_in_one_place(self._sizes[self._next]))
            self._next += 1
        self._keep_state()
        self._next += 1
        return self._random.permutation(self._entries(number))

    def _keep_state(self) -> None:
        if self._next % STATE_WINDOWS == 0 and self._next not in self._states:
            self._states[self._next] = self._random.get_state()

    def _known(self, number: int) -> int:
        """The last window up to this one before which the stream's state is known."""
        return max(window for window in self._states if window <= number)

    def mark(self, offset: int) -> dict[str, Any]:
        """A state of the stream, less than STATE_WINDOWS windows before a place."""
        number = bisect.bisect_right(self._starts, offset) - 1
        self.window(number)
        window = self._known(number)
        _, keys, place, *_ = self._states[window]  # Mersenne Twister: 624 words, and how many of them are used up
        return {"window": window, "keys": base64.b64encode(keys.astype("<u4").tobytes()).decode(), "place": int(place)}

    def restore(self, mark: dict[str, Any]) -> None:
        """Know the state that mark() gave."""
        keys = np.frombuffer(base64.b64decode(mark["keys"]), dtype="<u4")
        self._states[mark["window"]] = ("MT19937", keys, mark["place"], 0, 0.0)


def _in_one_place(size: int) -> np.ndarray:
    """int64 [size], all of whose elements are the same eight bytes: shuffling it takes from the stream what any other
    array of the size takes, at a third less of time.
    """
    return np.lib.stride_tricks.as_strided(np.zeros(1, dtype=np.int64), (size,), (0,))


class ShuffledSampler(_Epochs):
    """Every record once per epoch, each epoch in another order.

    Shards come in random order, and records are permuted within windows of shards.
    shard_counts: records per shard, in folder order.
    """

    def __init__(self, shard_counts: Sequence[int] | np.ndarray, seed: int) -> None:
        self._counts = np.asarray(shard_counts, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        super().__init__(int(self._counts.sum()))
        self._seed = seed

    def draw(self, epoch: int) -> Windows:
        """The records of an epoch."""
        # RandomState's stream is frozen (NEP 19), Generator's is not: a resumed run must find the same order after an
        # update of numpy.
        random = np.random.RandomState([self._seed % 2**32, epoch])
        order = random.permutation(len(self._counts))
        counts, starts = self._counts[order], self._starts[order]
        ends = _window_ends(counts)
        before = [0, *ends]  # shards before each window

        def records(window: int) -> np.ndarray:
            shards = slice(before[window], ends[window])
            own = zip(starts[shards].tolist(), counts[shards].tolist(), strict=True)
            return np.concatenate([np.arange(start, start + count) for start, count in own])

        sizes = np.add.reduceat(counts, before[:-1]) if ends else counts
        return Windows(random, sizes.tolist(), records)


def _window_ends(counts: np.ndarray) -> list[int]:
    """Number of shards up to the end of each window, for the records per shard in their order."""
    ends: list[int] = []
    first = before = 0  # shards and records of the windows that are closed
    for shards, records in enumerate(np.cumsum(counts).tolist(), start=1):
        if shards - first >= WINDOW_SHARDS and records - before >= WINDOW_RECORDS:
            ends.append(shards)
            first, before = shards, records
    return ends if first == len(counts) else [*ends, len(counts)]


def windows_to_pack(
    shard_counts: Sequence[int] | np.ndarray, seed: int, shuffle: bool
) -> tuple[int, Callable[[int], np.ndarray]]:
    """How many windows of records are packed, each by itself, and the records of one, int64 [any].

    shuffle: the windows of the shuffled epoch 0; else as records lie in the folder.
    """
    if shuffle:
        epoch = ShuffledSampler(shard_counts, seed).draw(0)
        return len(epoch), epoch.window
    size, records = WINDOW_RECORDS, int(np.sum(shard_counts))
    return -(-records // size), lambda window: np.arange(window * size, min((window + 1) * size, records))


class SequentialSampler:
    """Records as they lie in the folder, again and again."""

    def __init__(self, shard_counts: Sequence[int] | np.ndarray) -> None:
        self.positions = int(np.sum(shard_counts))

    def __getitem__(self, position: int) -> tuple[int, ...]:
        return (position % self.positions,)

    def mark(self, position: int) -> dict[str, Any]:
        """As RecordSampler."""
        return {}

    def restore(self, mark: dict[str, Any]) -> None:
        """As RecordSampler."""


class GroupedSampler(_Epochs):
    """Records with images and records of text alone in steps of their own, each step of records of like length.

    LLaVA's group_by_modality_length, without the number of ranks in it: of each modality, `mega_batch_mult` steps are
    sorted by length and cut into steps, and the steps are shuffled.  What does not fill a step comes last, mixed.
    """

    def __init__(
        self,
        shard_counts: Sequence[int] | np.ndarray,
        seed: int,
        lengths: RecordLengths,
        step_records: int,
        mega_batch_mult: int,
    ) -> None:
        self._shuffled = ShuffledSampler(shard_counts, seed)
        super().__init__(self._shuffled.positions)
        self._seed = seed
        self._lengths = lengths
        self._step_records = step_records
        self._group_records = step_records * mega_batch_mult

    def draw(self, epoch: int) -> np.ndarray:
        """int64 [positions]: the records of an epoch, all at once, for steps are shuffled over the whole of it."""
        records = np.concatenate(list(self._shuffled.draw(epoch)))
        random = np.random.RandomState([self._seed % 2**32, epoch, 1])
        return _grouped(records, self._lengths, self._step_records, self._group_records, random)


def _grouped(
    records: np.ndarray, lengths: RecordLengths, step_records: int, group_records: int, random: np.random.RandomState
) -> np.ndarray:
    """int64 [N]: the records in steps of one modality, `group_records` of a modality sorted by length together, the
    steps shuffled; what does not fill a step last.
    """
    with_images = lengths.images[records] > 0
    steps: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for modality in (records[with_images], records[~with_images]):
        whole = len(modality) // step_records * step_records
        rest.append(modality[whole:])
        for start in range(0, whole, group_records):
            group = modality[start : min(start + group_records, whole)]
            group = group[np.argsort(lengths.tokens[group], kind="stable")]
            steps += np.split(group, len(group) // step_records)
    return np.concatenate([*(steps[step] for step in random.permutation(len(steps))), *rest])


class WindowGroupedSampler(_Epochs):
    """As GroupedSampler within each window of records, so that a process holds a few windows.

    Shards come in random order, and their records are cut into windows of whole steps.  What fills no step of its
    modality makes one mixed step at the end of its window.  Each window has random numbers of its own: none is drawn to
    reach another.  Steps lie where training takes them, in every epoch: one that begins within a step fills that first.
    """

    VERSION = 1  # raise it whenever a position would come to mean another record

    def __init__(
        self,
        shard_counts: Sequence[int] | np.ndarray,
        seed: int,
        lengths: RecordLengths,
        step_records: int,
        mega_batch_mult: int,
    ) -> None:
        self._counts = np.asarray(shard_counts, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        super().__init__(int(self._counts.sum()))
        self._seed, self._lengths = seed, lengths
        self._step_records, self._group_records = step_records, step_records * mega_batch_mult
        least = max(WINDOW_RECORDS, WINDOW_SHARDS * self.positions // len(self._counts))
        self.window_records = -(-least // step_records) * step_records

    def draw(self, epoch: int) -> "_GroupedWindows":
        """The records of an epoch."""
        order = np.random.RandomState([self._seed % 2**32, epoch, 4]).permutation(len(self._counts))
        starts, ends = self._starts[order], np.cumsum(self._counts[order])

        def group(number: int, start: int, stop: int) -> np.ndarray:
            """int64 [stop - start]: window `number`, which holds these places of the shards in their order."""
            first, last = np.searchsorted(ends, (start, stop - 1), side="right").tolist()
            places = np.arange(start, stop)
            before = ends[first : last + 1] - self._counts[order[first : last + 1]]  # places before each shard
            shard = np.searchsorted(ends[first : last + 1], places, side="right")
            records = (starts[first : last + 1] - before)[shard] + places
            random = np.random.RandomState([self._seed % 2**32, epoch, number, 5])
            shuffled = random.permutation(records)
            return _grouped(shuffled, self._lengths, self._step_records, self._group_records, random)

        first = -epoch * self.positions % self._step_records
        return _GroupedWindows(first, self.window_records, self.positions, group)


class _GroupedWindows:
    """An epoch of WindowGroupedSampler: a first window of less than a step or none, then windows of one size."""

    def __init__(self, first: int, size: int, positions: int, group: Callable[[int, int, int], np.ndarray]) -> None:
        """group: number, first place, place behind the last -> int64 [any]: the records of a window."""
        self._first, self._size, self._positions, self._group = first, size, positions, group
        self.window = _few_kept(self._draw)

    def _start(self, number: int) -> int:
        return self._first + (number - 1) * self._size if number else 0

    def __getitem__(self, offset: int) -> int:
        number = 1 + (offset - self._first) // self._size
        return int(self.window(number)[offset - self._start(number)])

    def _draw(self, number: int) -> np.ndarray:
        return self._group(number, self._start(number), min(self._start(number + 1), self._positions))


class PackedSampler(_Epochs):
    """Rows of records; the rows stay the same, their order changes each epoch where they are shuffled.

    Windows of rows come in random order, and rows are permuted within their window.
    """

    def __init__(self, rows: PackedRows, seed: int, shuffle: bool) -> None:
        super().__init__(len(rows))
        self.rows = rows
        self._seed, self._shuffle = seed, shuffle

    def draw(self, epoch: int) -> _Epoch:
        """The rows of an epoch."""
        if not self._shuffle:
            return range(self.positions)
        random = np.random.RandomState([self._seed % 2**32, epoch, 2])
        sizes = self.rows.rows_per_window
        starts = np.cumsum(sizes) - sizes
        order = random.permutation(len(sizes))
        sizes, starts = sizes[order].tolist(), starts[order].tolist()
        return Windows(random, sizes, lambda window: starts[window] + np.arange(sizes[window]))

    def __getitem__(self, position: int) -> tuple[int, ...]:
        return self.rows[self.entry(position)]


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

    def mark(self, position: int) -> dict[str, Any]:
        """As RecordSampler: a mark of each order, where the position's block begins."""
        block = position // BLEND_BLOCK
        counts = self._counts.tolist()
        return {"parts": [order.mark(block * count) for order, count in zip(self._orders, counts, strict=True)]}

    def restore(self, mark: dict[str, Any]) -> None:
        """As RecordSampler."""
        if mark:
            for order, own in zip(self._orders, mark["parts"], strict=True):
                order.restore(own)
