"""megatron-core 0.19.2, core/dist_checkpointing/strategies/filesystem_async.py:53: a process for a queue of one answer.

Results of the write go through a queue of multiprocessing's manager, a process that is spawned at the first save and
imports the entry script again: some seconds, and several hundred megabytes for the rest of the run.  A synchronous save
writes with threads of the process that reads the queue, so an ordinary queue does.  The manager of an asynchronous save
would also outlive a trainer that is killed.
"""

import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_patch.parent_process import end_with_parent
from megatron_patch.patches import touch_points

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def within_process(_: Callable[..., Any]) -> Callable[..., Any]:
    """Replace get_write_results_queue(mp_mode): only asynchronous saves, by another process, get a manager's."""
    own: queue.Queue[Any] = queue.Queue()
    managed: list[Any] = []  # one, which keeps its manager

    def get_queue(mp_mode: str = "spawn") -> Any:
        from megatron.training import global_vars

        # without a training there are no arguments, and get_args() raises
        if not getattr(global_vars._GLOBAL_ARGS, "async_save", False):
            return own
        if not managed:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(end_with_parent)
            managed.append(manager.Queue())
        return managed[0]

    return get_queue


def apply() -> None:
    """Choose the queue by --async-save."""
    touch_points.wrap(WRITER, "get_write_results_queue", "patches.synchronous_save_queue", within_process)
