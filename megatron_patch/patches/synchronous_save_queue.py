"""megatron-core 0.19.2, core/dist_checkpointing/strategies/filesystem_async.py:53: a process for a queue of one answer.

Results of the write go through a queue of multiprocessing's manager, a process that is spawned at the first save and
imports the entry script again: some seconds, and several hundred megabytes for the rest of the run.  A synchronous save
writes with threads of the process that reads the queue, so an ordinary queue does.
"""

import queue
from collections.abc import Callable
from typing import Any

from megatron_patch.patches import touch_points

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def within_process(usual: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap get_write_results_queue(mp_mode): only asynchronous saves, written by another process, get a manager's."""
    own: queue.Queue[Any] = queue.Queue()

    def get_queue(mp_mode: str = "spawn") -> Any:
        from megatron.training import global_vars

        # without a training there are no arguments, and get_args() raises
        asynchronous = getattr(global_vars._GLOBAL_ARGS, "async_save", False)
        return usual(mp_mode) if asynchronous else own

    return get_queue


def apply() -> None:
    """Choose the queue by --async-save."""
    touch_points.wrap(WRITER, "get_write_results_queue", "patches.synchronous_save_queue", within_process)
