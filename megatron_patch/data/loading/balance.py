"""Positions of micro-batches where the records of a step are dealt to the ranks for equal work (step_balance.py)."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.sampler import RecordLengths, RecordSampler
from megatron_patch.errors import UserError
from megatron_patch.step_balance import Layout, balanced


class BalancedPositions(Sampler[Sequence[int]]):
    """Positions of one rank's micro-batches, for ever; steps begin at `start`, which must be a step's beginning.

    Ranks change places from step to step, so that none gets all the cheap records, the unusable ones among them.
    """

    def __init__(
        self,
        start: int,
        rank: int,
        layout: Layout,
        order: RecordSampler,
        lengths: RecordLengths,
        config: DataConfig,
    ) -> None:
        self._start, self._rank, self._layout = start, rank, layout
        self._order, self._lengths, self._config = order, lengths, config

    def __iter__(self) -> Iterator[Sequence[int]]:
        config, ranks, step_records = self._config, self._layout.ranks, self._layout.step_records
        start = self._start
        while True:
            indices = [self._order[position][0] for position in range(start, start + step_records)]
            tokens = [config.padded_length(tokens) for tokens in self._lengths.tokens[indices].tolist()]
            images = (self._lengths.images[indices] * config.tiles).tolist()
            plan = balanced(tokens, images, config.balance_cost, self._layout)
            for places in plan[(self._rank + start // step_records) % ranks]:
                yield [start + place for place in places]
            start += step_records


def layout_of(step_records: int, ranks: int, micro_batch_size: int) -> Layout:
    """Of a step.  Raises UserError where it cannot be shared out."""
    micro_batches, rest = divmod(step_records, ranks * micro_batch_size)
    if rest or not micro_batches:
        raise UserError(
            f"balance_cost: a step of {step_records} records cannot be shared out over {ranks} data-parallel ranks in "
            f"micro-batches of {micro_batch_size}; make GLOBAL_BATCH_SIZE a multiple of {ranks * micro_batch_size}"
        )
    return Layout(ranks, micro_batches, micro_batch_size)
