"""megatron-core 0.19.2, training/initialize.py:74: the process that writes asynchronous saves imports everything again.

It starts from a server of multiprocessing's and takes its 8 seconds of processor time while the trainer builds its
model and loads its checkpoint.  CUDA asks for that; on a CPU the trainer is forked, as it is for the workers of a
loader, and what it has imported is there.
"""

from collections.abc import Callable
from typing import Any

from megatron_patch.parent_process import end_with_parent
from megatron_patch.patches import touch_points

WHO = "patches.forked_writer"
CALLER = "megatron.core.dist_checkpointing.strategies.async_utils"


def apply() -> None:
    """Fork, and let the child be what a process of its own would."""
    touch_points.wrap(CALLER, "PersistentAsyncCaller._get_process", WHO, _forked)
    touch_points.wrap(CALLER, "PersistentAsyncCaller.async_loop", WHO, _as_own_process)


def _forked(get_process: Callable[..., Any]) -> Callable[..., Any]:
    def fork(rank: int, mp_mode: str = "fork", *priorities: Any, **named: Any) -> Any:
        return get_process(rank, "fork", *priorities, **named)

    return fork


def _as_own_process(loop: Callable[..., None]) -> Callable[..., None]:
    import torch

    def own_loop(*args: Any, **kwargs: Any) -> None:
        end_with_parent()  # a fork does not inherit it
        torch.set_num_threads(1)  # nor the other threads, for which OpenMP would wait
        loop(*args, **kwargs)

    return own_loop
