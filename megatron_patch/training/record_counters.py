"""Counters of a run over all ranks: records kept, truncated, skipped and why; work done; waits for data; memory."""

import dataclasses

import torch
from megatron.core import mpu

from megatron_patch import device
from megatron_patch.data.loading.loader import WORK, TrainLoader
from megatron_patch.data.rejection import REASONS
from megatron_patch.step_flop import Work

SKIPPED = "skipped: "
MICROSECONDS = 10**6
WORTH_TELLING = 0.1  # share of the time lost to waiting for data
ENTRIES = ("kept", "truncated", "skipped", "excluded", *(SKIPPED + reason for reason in REASONS))


@dataclasses.dataclass(frozen=True)
class Totals:
    """Over all ranks."""

    records: dict[str, int]  # by ENTRIES; a resumed run goes on counting
    work: Work  # since this start of the run
    memory_bytes: int  # peak of the process that took most
    waited_s: tuple[float, ...] = ()  # seconds that each rank has waited for batches since this start


def totals(loader: TrainLoader | None) -> Totals:
    """Sums over all data-parallel ranks; every process of the run must call it.

    Args:
        loader: of this process, None where there is none.
    """
    # the loaders of one data-parallel rank on several stages and context-parallel ranks read the same records
    speaks = mpu.is_pipeline_first_stage(ignore_virtual=True) and mpu.get_context_parallel_rank() == 0
    counts = loader.counts | loader.work if loader is not None and speaks else {}
    own = [counts.get(name, 0) for name in (*ENTRIES, *WORK)]
    # one reduction for all: sums, and a place of its own for the memory and the waits of each rank
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    memory, waits = [0] * ranks, [0] * ranks
    memory[rank] = device.peak_memory()
    waits[rank] = round(loader.waited_s * MICROSECONDS) if loader is not None else 0
    summed = torch.tensor([*own, *memory, *waits], dtype=torch.int64, device=device.current_device())
    torch.distributed.all_reduce(summed)
    found = summed.tolist()
    work = dict(zip(WORK, found[len(ENTRIES) : len(own)], strict=True))
    memory, waits = found[len(own) : -ranks], found[-ranks:]
    waited_s = tuple(wait / MICROSECONDS for wait in waits)
    return Totals(dict(zip(ENTRIES, found, strict=False)), Work(**work), max(memory), waited_s)


def waiting_share(now: Totals, before: Totals, seconds: float) -> float:
    """Share of so many seconds between two totals in which the rank that waited most had no batch to go on with.

    All ranks of a step wait for the slowest one.  An upper bound where a device still works on what came before.
    """
    waits = (later - earlier for later, earlier in zip(now.waited_s, before.waited_s, strict=True))
    return max(waits, default=0.0) / seconds


def waiting_sentence(share: float, workers: int) -> str | None:
    """A line of the log where a share worth knowing of was lost; workers: NUM_WORKERS."""
    if share < WORTH_TELLING:
        return None
    return (
        f" waiting for data: {share:.0%} of the time, on the rank that waited most; raise NUM_WORKERS ({workers}) if "
        "cores are idle, else toolkits/benchmark/benchmark_loading.py shows what a worker reads in a second"
    )


def sentence(found: dict[str, int]) -> str:
    """One line of the log, from Totals.records."""
    reasons = ", ".join(
        f"{name.removeprefix(SKIPPED)} {count}" for name, count in found.items() if count and name.startswith(SKIPPED)
    )
    parts = [f"{name} {found[name]}" for name in ("kept", "truncated", "skipped")]
    if found["excluded"]:
        parts.append(f"left out by split.yaml {found['excluded']}")
    return f" records: {' | '.join(parts)}{f' ({reasons})' if reasons else ''}"
