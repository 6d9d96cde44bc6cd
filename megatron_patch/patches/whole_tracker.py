"""megatron-core 0.19.2, training/checkpointing.py:1010: the tracker file is emptied, then written.

A kill or a full disk in between leaves an empty one, and the run can neither be resumed nor exported.  It is written
beside and renamed instead.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_patch.atomic_files import atomic_file
from megatron_patch.checkpoint_files import TRACKER
from megatron_patch.patches import touch_points


@contextlib.contextmanager
def _whole(path: str) -> Iterator[IO[str]]:
    # durable: an empty tracker after a crash of the machine would leave every checkpoint without a name
    with atomic_file(Path(path), durable=True) as beside, open(beside, "w") as stream:
        yield stream


def apply() -> None:
    """Replace the `open` that checkpointing.py uses, for the tracker alone."""

    def wrapper(usual: Callable[..., Any]) -> Callable[..., Any]:
        def open_tracker_whole(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            tracker = mode == "w" and os.path.basename(str(path)) == TRACKER
            return _whole(str(path)) if tracker else usual(path, mode, *args, **kwargs)

        return open_tracker_whole

    touch_points.wrap(touch_points.CHECKPOINTING, "maybe_msc.open", "patches.whole_tracker", wrapper)
