"""megatron-core 0.19.2, training/checkpointing.py:1218: maybe_save_dataloader_state() knows one iterator only.

An interleaved pipeline has a list of them, one per virtual pipeline stage, and every save ends in an AttributeError.
The first one's is the state that counts.
"""

from collections.abc import Callable
from typing import Any

from megatron_patch.patches import touch_points


def apply() -> None:
    """Hand over the first iterator of a list."""

    def wrapper(save_state: Callable[..., None]) -> Callable[..., None]:
        def save_state_of_first(train_iterator: Any, *args: Any, **kwargs: Any) -> None:
            first = train_iterator[0] if isinstance(train_iterator, list) else train_iterator
            save_state(first, *args, **kwargs)

        return save_state_of_first

    where = touch_points.CHECKPOINTING, "maybe_save_dataloader_state"
    touch_points.wrap(*where, "patches.interleaved_loader_state", wrapper)
