"""Time of a run: what goes into training steps, and what into evaluating and saving."""

import contextlib
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator

RECENT = 200  # steps whose median stands for a step: one slow disk or evaluation does not move it


class Timer:
    """Seconds, with the time of named side jobs taken out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._inside = 0
        self._last_step: float | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.aside: Counter[str] = Counter()  # seconds by side job

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def training(self) -> float:
        """Seconds since the start without side jobs."""
        return self.total() - self.aside.total()

    @contextlib.contextmanager
    def side_job(self, name: str) -> Iterator[None]:
        """Within it no time is training's.  Within another side job it counts as that one."""
        before, self._inside = time.perf_counter(), self._inside + 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self.aside[name] += time.perf_counter() - before

    def training_begins(self) -> None:
        """All until now was getting ready."""
        self.aside["starting"] += self.training()

    def step_done(self) -> None:
        """A training step ends here."""
        now = self.training()
        if self._last_step is not None:
            self._recent.append(now - self._last_step)
        self._last_step = now

    def seconds_left(self, steps: int) -> float | None:
        """For so many more steps, from the median of the last ones; None before there are two."""
        return steps * statistics.median(self._recent) if self._recent else None


def as_clock(seconds: float) -> str:
    """3725 -> 01:02:05."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
