"""Which record stands at which position of the endless training sequence.

The sequence is a function of the folder and the seed alone.  Data-parallel ranks and workers take turns along it, so
that every layout trains on the same records in each step, and the position of the next record is the whole state.
"""

import itertools
from collections.abc import Sequence

import numpy as np

# Records are shuffled within windows of whole shards, so that reading stays within a few open files.
WINDOW_SHARDS = 16
WINDOW_RECORDS = 16 * 1024


class ShuffledOrder:
    """Every record once per epoch, each epoch in another order.  `shard_counts`: records per shard, in folder order."""

    def __init__(self, shard_counts: Sequence[int], seed: int) -> None:
        self._shard_counts = list(shard_counts)
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        """Position in the endless sequence -> index of the record in the folder."""
        epoch, offset = divmod(position, sum(self._shard_counts))
        if epoch not in self._epochs:
            # A batch may reach over the end of an epoch: keep the neighbour, drop what is older.
            self._epochs = {kept: order for kept, order in self._epochs.items() if abs(kept - epoch) == 1}
            self._epochs[epoch] = _shuffle(self._shard_counts, self._seed, epoch)
        return int(self._epochs[epoch][offset])


class StoredOrder:
    """Records as they lie in the folder, again and again."""

    def __init__(self, shard_counts: Sequence[int]) -> None:
        self._records = sum(shard_counts)

    def __getitem__(self, position: int) -> int:
        """Position in the endless sequence -> index of the record in the folder."""
        return position % self._records


def _shuffle(shard_counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
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
    return np.concatenate([random.permutation(records) for records in windows])
