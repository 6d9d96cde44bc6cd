"""Record counters of a run over all ranks: records kept, truncated, skipped and why; work done; memory taken."""

import dataclasses

import torch
from megatron.core import mpu

from megatron_patch import device
from megatron_patch.data.loading.loader import WORK, TrainLoader
from megatron_patch.data.rejection import REASONS
from megatron_patch.step_flop import Work

SKIPPED = "skipped: "
ENTRIES = ("kept", "truncated", "skipped", "excluded", *(SKIPPED + reason for reason in REASONS))


@dataclasses.dataclass(frozen=True)
class Totals:
    """Over all ranks."""

    records: dict[str, int]  # by ENTRIES; a resumed run goes on counting
    work: Work  # since this start of the run
    memory_bytes: int  # peak of the process that took most


def totals(loader: TrainLoader | None) -> Totals:
    """Sums over all data-parallel ranks; every process of the run must call it.

    Args:
        loader: of this process, None where there is none.
    """
    # the loaders of one data-parallel rank on several stages and context-parallel ranks read the same records
    speaks = mpu.is_pipeline_first_stage(ignore_virtual=True) and mpu.get_context_parallel_rank() == 0
    counts = loader.counts | loader.work if loader is not None and speaks else {}
    own = [counts.get(name, 0) for name in (*ENTRIES, *WORK)]
    # one reduction for both: sums, and a place of its own for the memory of each rank
    memory = [0] * torch.distributed.get_world_size()
    memory[torch.distributed.get_rank()] = device.peak_memory()
    summed = torch.tensor([*own, *memory], dtype=torch.int64, device=device.current_device())
    torch.distributed.all_reduce(summed)
    found = summed.tolist()
    work = dict(zip(WORK, found[len(ENTRIES) : len(own)], strict=True))
    return Totals(dict(zip(ENTRIES, found, strict=False)), Work(**work), max(found[len(own) :]))


def sentence(found: dict[str, int]) -> str:
    """One line of the log, from Totals.records."""
    reasons = ", ".join(
        f"{name.removeprefix(SKIPPED)} {count}" for name, count in found.items() if count and name.startswith(SKIPPED)
    )
    parts = [f"{name} {found[name]}" for name in ("kept", "truncated", "skipped")]
    if found["excluded"]:
        parts.append(f"left out by split.yaml {found['excluded']}")
    return f" records: {' | '.join(parts)}{f' ({reasons})' if reasons else ''}"
