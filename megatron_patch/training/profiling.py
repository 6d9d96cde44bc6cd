"""Traces of chosen iterations on chosen ranks, by torch's profiler.

Megatron has one too (--use-pytorch-profiler), but it counts iterations from this start of a run, not as the log does,
and loses what it has when the run ends within the range.  For Nsight Systems its ranges (--profile) are used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_patch.atomic_files import atomic_file


class Tracer:
    """Wraps Megatron's train_step(..., iteration=...), whose iteration counts from 0.

    Args:
        first, last: iterations as the log counts them, both included.
        rank: of this process.
        folder: rank_000_iterations_10-12.json.gz is written there; chrome://tracing and Perfetto read it.
    """

    def __init__(self, first: int, last: int, rank: int, folder: Path) -> None:
        self._first, self._last = first, last
        self._file = folder / f"rank_{rank:03d}_iterations_{first}-{last}.json.gz"
        self._profile: torch.profiler.profile | None = None

    def around(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """train_step that is traced from `first` to `last`."""

        def wrapped(*args: Any, iteration: int, **kwargs: Any) -> Any:
            if self._profile is None and self._first <= iteration + 1 <= self._last:
                self._profile = torch.profiler.profile(record_shapes=True)
                self._profile.start()
            result = train_step(*args, iteration=iteration, **kwargs)
            if iteration + 1 >= self._last:
                self.finish()
            return result

        return wrapped

    def finish(self) -> None:
        """Write what was traced, also when the run ends within the range."""
        if self._profile is None:
            return
        self._profile.stop()
        with atomic_file(self._file, suffix=".gz") as unfinished:  # compressed where the name ends so
            self._profile.export_chrome_trace(str(unfinished))
        self._profile = None
        print(f"profile: {self._file}", flush=True)
