"""A progress bar on the terminal from which the launcher was started, if there was one.

processes.py passes on what processes print line by line, so none of them sees a terminal: the launcher names its own in
LLAVA_TERMINAL.  The lines of the log go there too, by another process, at any moment.  So the bar leaves the cursor at
its beginning: a line that comes overwrites it, and the next step draws it anew below.
"""

import os
from typing import Any, TextIO

from tqdm import tqdm

TERMINAL = "LLAVA_TERMINAL"


class _ReturningCursor:
    """A terminal on which what tqdm draws stands alone on its line, the cursor before it."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)

    def write(self, text: str) -> None:
        drawn = text.strip("\r\n")
        self._terminal.write(f"\x1b[2K{drawn}\r" if drawn else text)


class ProgressBar:
    """Iterations done, rate and time left; nothing at all without a terminal."""

    def __init__(self, total: int, rank: int) -> None:
        """total: iterations of the whole run; rank: of this process, of which 0 alone draws."""
        self._total = total
        self._terminal: TextIO | None = None
        self._bar: tqdm | None = None
        if rank == 0 and os.environ.get(TERMINAL):
            try:
                self._terminal = open(os.environ[TERMINAL], "w")  # noqa: SIM115 - as long as the run
            except OSError:
                return  # closed or another user's: the lines of the log say the same

    def show(self, iteration: int) -> None:
        """`iteration` is done."""
        if self._terminal is None:
            return
        if self._bar is None:
            file = _ReturningCursor(self._terminal)
            self._bar = tqdm(
                total=self._total, initial=iteration, unit="step", dynamic_ncols=True, file=file, desc="training"
            )
        self._bar.update(iteration - self._bar.n)

    def close(self) -> None:
        """Leave the last state standing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
