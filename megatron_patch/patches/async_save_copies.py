"""megatron-core 0.19.2, core/dist_checkpointing/strategies/filesystem_async.py:243: `.to("cpu")` is all that it copies.

The process that writes an asynchronous save gets the trainer's own tensors when these are on a CPU: the queue moves
them to shared memory, training goes on in it, and the checkpoint mixes iterations.  The writer gets copies instead.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron_patch.patches import touch_points

ASYNC = "megatron.core.dist_checkpointing.strategies.async_utils"


def with_copies(schedule: Callable[..., None]) -> Callable[..., None]:
    """Wrap PersistentAsyncCaller.schedule_async_call(request): its buckets hold copies when it is called."""

    @functools.wraps(schedule)
    def schedule_copies(self: Any, request: Any) -> None:
        if request.preload_fn is not None:
            buckets = request.preload_fn.args[0]  # the very list that stands in async_fn_args
            for number, (file, key, (contents, tensors)) in enumerate(buckets):
                buckets[number] = (file, key, (contents, [(item, tensor.clone()) for item, tensor in tensors]))
        schedule(self, request)

    return schedule_copies


def apply() -> None:
    """Copy between the request for a save and the queue to its writer."""
    touch_points.wrap(ASYNC, "PersistentAsyncCaller.schedule_async_call", "patches.async_save_copies", with_copies)
