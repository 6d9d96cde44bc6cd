"""Which record of a step goes to which rank and micro-batch, so that the slowest rank has as little to do as possible.

All ranks wait for each other at the end of a step.  The loss is a sum over the labels of a step, so dealing its records
out in another way changes nothing but rounding.  A plan is a function of the records' lengths alone, in whole numbers:
every rank makes it for itself, and all come to the same one on any machine.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

Plan = list[list[list[int]]]  # [ranks][micro-batches][records]: places of the step's N records, each once


@dataclass(frozen=True)
class RecordCost:
    """FLOP of training on the contents of a record, as step_flop.py counts them.

    The head is not among them: it works at trained positions, whose number is not known before a record is read.
    """

    token: int
    pair: int  # of tokens of a record, the one at or before the other
    image: int  # a tile is an image of its own

    def text(self, tokens: int) -> int:
        """Of a row of so many tokens, padding included."""
        return tokens * self.token + tokens * (tokens + 1) // 2 * self.pair


@dataclass(frozen=True)
class Layout:
    """How the N = ranks x micro_batches x records of a step are shared out."""

    ranks: int
    micro_batches: int  # of one rank
    records: int  # of a micro-batch

    @property
    def step_records(self) -> int:
        """N."""
        return self.ranks * self.micro_batches * self.records


def in_turn(layout: Layout) -> Plan:
    """The plan without balance: ranks take turns, a micro-batch at a time."""
    size, stride = layout.records, layout.ranks * layout.records
    return [
        [
            list(range(batch * stride + rank * size, batch * stride + (rank + 1) * size))
            for batch in range(layout.micro_batches)
        ]
        for rank in range(layout.ranks)
    ]


def rank_costs(plan: Plan, tokens: Sequence[int], images: Sequence[int], cost: RecordCost) -> list[int]:
    """FLOP of each rank: every row of a micro-batch is padded to the longest.

    Args:
        tokens: [N], of a batch of that record alone, padded.
        images: [N].
    """
    return [sum(_of_micro_batch(places, tokens, images, cost) for places in batches) for batches in plan]


def balanced(tokens: Sequence[int], images: Sequence[int], cost: RecordCost, layout: Layout) -> Plan:
    """The plan whose slowest rank has least to do, of three; never worse than in_turn().

    The problem is NP-hard (multiprocessor scheduling).  Graham's longest processing time first ("Bounds on
    multiprocessing timing anomalies", 1969) is within 4/3 of the best where counts are free; here every rank takes the
    same number.  It is done once with micro-batches of like length, which pads least, and are exchanged between ranks
    while that helps; and once with single records, which a rank then sorts into micro-batches: better where a rank has
    few of them.

    Args: as rank_costs().
    """
    by_length = sorted(range(len(tokens)), key=lambda place: (-tokens[place], -images[place], place))
    groups = _cut(by_length, layout.records)
    costs = [_of_micro_batch(group, tokens, images, cost) for group in groups]
    of_groups = _exchanged(_longest_first(costs, layout.ranks), costs)
    in_length = {place: number for number, place in enumerate(by_length)}
    of_records = _longest_first(
        [cost.text(length) + cost.image * count for length, count in zip(tokens, images, strict=True)], layout.ranks
    )
    plans = [
        in_turn(layout),
        [[groups[group] for group in dealt] for dealt in of_groups],
        [_cut(sorted(dealt, key=in_length.__getitem__), layout.records) for dealt in of_records],
    ]

    def badness(plan: Plan) -> tuple[int, int]:
        costs = rank_costs(plan, tokens, images, cost)
        return max(costs), sum(costs)

    return min(plans, key=badness)


def _of_micro_batch(places: Sequence[int], tokens: Sequence[int], images: Sequence[int], cost: RecordCost) -> int:
    longest = max(tokens[place] for place in places)
    return len(places) * cost.text(longest) + cost.image * sum(images[place] for place in places)


def _cut(places: Sequence[int], size: int) -> list[list[int]]:
    return [list(places[start : start + size]) for start in range(0, len(places), size)]


def _longest_first(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Items dealt to ranks, as many to each: the most expensive first, to the rank that has least to do."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    free = [(0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, rank = heapq.heappop(free)
        dealt[rank].append(item)
        if len(dealt[rank]) < len(costs) // ranks:
            heapq.heappush(free, (load + costs[item], rank))
    return dealt


def _exchanged(dealt: list[list[int]], costs: Sequence[int]) -> list[list[int]]:
    """The same with items exchanged between the rank that has most to do and the three that have least."""
    loads = [sum(costs[item] for item in items) for items in dealt]
    for _ in range(4 * len(dealt)):
        ranks = sorted(range(len(dealt)), key=lambda rank: loads[rank])
        most, found = ranks[-1], None
        for least in ranks[:3]:
            gap = loads[most] - loads[least]
            # half of the gap, moved, would make the two equal
            found = max(
                (
                    (min(moved, gap - moved), here, there)
                    for here, one in enumerate(dealt[most])
                    for there, other in enumerate(dealt[least])
                    if 0 < (moved := costs[one] - costs[other]) < gap
                ),
                default=None,
            )
            if found is not None:
                break
        if found is None:
            break
        _, here, there = found
        dealt[most][here], dealt[least][there] = dealt[least][there], dealt[most][here]
        for rank in (most, least):
            loads[rank] = sum(costs[item] for item in dealt[rank])
    return dealt
