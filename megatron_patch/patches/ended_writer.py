"""megatron-core 0.19.2, core/dist_checkpointing/strategies/async_utils.py:458: a dead writer is waited for for ever.

The process that writes asynchronous saves may be killed, for want of memory most likely.  The trainer goes on without a
checkpoint, each further save takes memory that nobody frees, and at its end the run hangs.
"""

import time
from collections.abc import Callable
from typing import Any

from megatron_patch.patches import touch_points

WHO = "patches.ended_writer"
SECONDS = 0.1  # between two looks; Megatron's own


class WriterEndedError(RuntimeError):
    """The process that writes asynchronous saves is not there any more."""


def apply() -> None:
    """Look for the process whenever a save is not done yet."""
    module = "megatron.core.dist_checkpointing.strategies.async_utils"
    touch_points.wrap(module, "PersistentAsyncCaller.is_current_async_call_done", WHO, _watching)


def _watching(is_done: Callable[..., bool]) -> Callable[..., bool]:
    def watch(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        while not is_done(self, False, no_dist):
            if self.process and self.cur_item is None and not self.process.is_alive():
                raise _ended(self)
            if not blocking:
                return False
            time.sleep(SECONDS)
        return True

    return watch


def _ended(caller: Any) -> WriterEndedError:
    code = caller.process.exitcode
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    # the exit would wait until the process has read what was sent to it
    for queue in (caller._persistent_queue, caller._persistent_preload_q):
        queue.cancel_join_thread()
    return WriterEndedError(
        f"the process that writes asynchronous saves ended with {how}, so its save is no checkpoint (signal 9: the "
        "machine had no memory left; ASYNC_SAVE=false saves without copies)"
    )
