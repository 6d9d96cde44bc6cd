"""megatron-core 0.19.2, training/checkpointing.py:1218: maybe_save_dataloader_state() knows one iterator only.

An interleaved pipeline has a list of them, one per virtual stage, and every save ends in an AttributeError.  The first
virtual stage's is the one whose state counts.  Remove when test_parallelism's interleaved run saves without it.
"""

from typing import Any

TARGETS = (("megatron.training.checkpointing", "maybe_save_dataloader_state"),)


def applies(backend: str) -> bool:
    """Everywhere: this is not about the device."""
    del backend
    return True


def apply() -> None:
    """Hand over the first iterator of a list."""
    from megatron.training import checkpointing

    save_state = checkpointing.maybe_save_dataloader_state

    def save_state_of_first(train_iterator: Any, *args: Any, **kwargs: Any) -> None:
        first = train_iterator[0] if isinstance(train_iterator, list) else train_iterator
        save_state(first, *args, **kwargs)

    checkpointing.maybe_save_dataloader_state = save_state_of_first
