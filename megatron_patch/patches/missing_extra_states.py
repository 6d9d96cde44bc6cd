"""megatron-core 0.19.2, core/dist_checkpointing/serialization.py:58: layers ask for extra states that nobody wrote.

Transformer Engine's norms and attention keep an `_extra_state` (of fp8), the local layers have none.  A checkpoint that
the local layers wrote then does not load into those of Transformer Engine: "Missing key in checkpoint state_dict" of
torch's planner.  An extra state that the checkpoint lacks is not asked for; a weight is.
"""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint_files import read_metadata
from megatron_patch.patches import touch_points


def without_missing_extra_states(wanted: Any, stored: Container[str]) -> Any:
    """A sharded state dict, of dicts and lists, less the `_extra_state` objects whose keys are not in `stored`."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    def is_missing(value: Any) -> bool:
        is_extra = isinstance(value, ShardedObject) and value.key.endswith("_extra_state")
        return is_extra and value.unique_key not in stored

    if isinstance(wanted, dict):
        kept = {key: value for key, value in wanted.items() if not is_missing(value)}
        return {key: without_missing_extra_states(value, stored) for key, value in kept.items()}
    if isinstance(wanted, list):
        return [without_missing_extra_states(value, stored) for value in wanted]
    return wanted


def apply() -> None:
    """Let dist_checkpointing.load() look at what is there first."""

    def tolerant(load: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(sharded_state_dict: dict, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
            stored = read_metadata(Path(checkpoint_dir)).state_dict_metadata
            return load(without_missing_extra_states(sharded_state_dict, stored), checkpoint_dir, *args, **kwargs)

        return wrapped

    touch_points.wrap("megatron.core.dist_checkpointing", "load", "patches.missing_extra_states", tolerant)
