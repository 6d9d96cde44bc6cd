"""What BALANCE_COST=true saves: the slowest data-parallel rank of each step, before and after, for a mix of lengths.

    python toolkits/benchmark/simulate_balance.py [--lengths DATASET/.nv-meta/llava_lengths_*.npy] [--micro-batch 4]

Prints a table: what the slowest rank has to do beside the mean rank (medians over steps), with ranks that take turns
and with equal work; then how long the step is with equal work beside before, padding and waiting together, in sum over
all steps.  Costs are FLOP of LLaVA-1.5-7B, stage 2, padding included.  Without --lengths the mix is LLaVA-1.5's 665k
records, with the lengths of texts that megatron_patch/length_mix.py assumes.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.length_mix import MIX665K
from megatron_patch.step_balance import Layout, RecordCost, balanced, in_turn, rank_costs
from megatron_patch.step_flop import Frozen, Work, step_flop
from toolkits.benchmark.known_models import llava

IMAGE_TOKENS, LONGEST = 576, 2048
TARGET_RECORDS = 30_000  # of all steps of a row, about


def stage_2_cost() -> RecordCost:
    """Of a record, with the vision tower frozen."""
    geometry = llava("llama-7b")
    units = Work(tokens=1), Work(pairs=1), Work(images=1)
    return RecordCost(*(step_flop(geometry, Frozen(vision_tower=True), unit) for unit in units))


def read_lengths(file: Path) -> tuple[list[int], list[int]]:
    """Tokens and images of every usable record of a dataset, in random order."""
    import numpy as np

    saved = np.load(file)  # int32 [2, records]
    tokens, images = (saved["tokens"], saved["images"]) if file.suffix == ".npz" else saved
    kept = tokens > 0
    found = list(zip(tokens[kept].tolist(), images[kept].tolist(), strict=True))
    random.Random(0).shuffle(found)
    return [tokens for tokens, _ in found], [images for _, images in found]


def rows(
    tokens: Sequence[int], images: Sequence[int], ranks: Sequence[int], sizes: Sequence[int], deep: Sequence[int]
) -> Iterator[tuple[Layout, int, float, float, float, float]]:
    """For each layout: steps, slowest by mean rank before and after, time after by time before, ms of a plan."""
    cost = stage_2_cost()
    for layout in (Layout(rank, micro_batches, size) for rank in ranks for size in sizes for micro_batches in deep):
        need = layout.step_records
        steps = max(5, min(len(tokens), TARGET_RECORDS) // need)
        before, after = [], []
        spent = 0.0
        for step in range(steps):
            places = [(step * need + place) % len(tokens) for place in range(need)]
            own = [tokens[place] for place in places], [images[place] for place in places]
            before.append(rank_costs(in_turn(layout), *own, cost))
            began = time.perf_counter()
            plan = balanced(*own, cost, layout)
            spent += time.perf_counter() - began
            after.append(rank_costs(plan, *own, cost))
        ratios = [
            statistics.median(max(costs) * layout.ranks / sum(costs) for costs in found) for found in (before, after)
        ]
        yield layout, steps, *ratios, sum(map(max, after)) / sum(map(max, before)), spent / steps * 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="measured lengths of a dataset")
    parser.add_argument("--data-parallel", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8], help="of a rank in a step")
    arguments = parser.parse_args()
    if arguments.lengths:
        tokens, images = read_lengths(arguments.lengths)
    else:
        mix = MIX665K.sample(TARGET_RECORDS, IMAGE_TOKENS, LONGEST)
        tokens, images = [record.tokens for record in mix], [record.images for record in mix]
    print(
        f"{len(tokens)} records, {statistics.mean(tokens):.0f} tokens on average, "
        f"median {statistics.median(tokens):.0f}, longest {max(tokens)}"
    )
    print("| DP | BATCH_SIZE | GLOBAL_BATCH_SIZE | steps | slowest / mean, in turn | balanced | step time | plan, ms |")
    print("|---|---|---|---|---|---|---|---|")
    table = rows(tokens, images, arguments.data_parallel, arguments.micro_batch, arguments.micro_batches)
    for layout, steps, before, after, shorter, plan_ms in table:
        print(
            f"| {layout.ranks} | {layout.records} | {layout.step_records} | {steps} | {before:.3f} | {after:.3f} | "
            f"{shorter:.1%} | {plan_ms:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
