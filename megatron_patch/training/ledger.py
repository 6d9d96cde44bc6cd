"""The account of records over all ranks: kept, truncated, skipped and why."""

import torch
from megatron.core import mpu

from megatron_patch import device
from megatron_patch.data.rejection import REASONS

SKIPPED = "skipped: "
ENTRIES = ("kept", "truncated", "skipped", "excluded", *(SKIPPED + reason for reason in REASONS))


def totals(counts: dict[str, int]) -> dict[str, int]:
    """Sum of the loaders' counts over all data-parallel ranks; every process of the run must call it.

    Args:
        counts: of this process's loader, empty where there is none.
    """
    # the loaders of one data-parallel rank on several stages and context-parallel ranks read the same records
    speaks = mpu.is_pipeline_first_stage(ignore_virtual=True) and mpu.get_context_parallel_rank() == 0
    own = [counts.get(name, 0) if speaks else 0 for name in ENTRIES]
    summed = torch.tensor(own, dtype=torch.int64, device=device.current_device())
    torch.distributed.all_reduce(summed)
    return dict(zip(ENTRIES, summed.tolist(), strict=True))


def sentence(found: dict[str, int]) -> str:
    """One line of the log."""
    reasons = ", ".join(
        f"{name.removeprefix(SKIPPED)} {count}" for name, count in found.items() if count and name.startswith(SKIPPED)
    )
    parts = [f"{name} {found[name]}" for name in ("kept", "truncated", "skipped")]
    if found["excluded"]:
        parts.append(f"left out by split.yaml {found['excluded']}")
    return f" records: {' | '.join(parts)}{f' ({reasons})' if reasons else ''}"
