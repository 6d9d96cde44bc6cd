"""megatron-core 0.19.2, core/optimizer/__init__.py:557: torch's AdamW is built without `fused`.

Without Transformer Engine and Apex, Megatron takes torch.optim.AdamW as it comes.  On a GPU its `foreach` way makes
temporaries as large as all weights (27 GB for a 7B), on a CPU it goes through memory once per operation; the fused way
goes through it once, in place.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points
from megatron_patch.patches.touch_points import LOOP

if TYPE_CHECKING:
    import torch


def apply() -> None:
    """Have torch's AdamW, where it is used, make its steps fused."""
    touch_points.wrap(LOOP, "get_megatron_optimizer", "patches.fused_adamw", _with_fused_steps)


def _with_fused_steps(build: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def build_fused(*args: Any, **kwargs: Any) -> Any:
        found = build(*args, **kwargs)
        for part in getattr(found, "chained_optimizers", [found]):
            if isinstance(part.optimizer, torch.optim.AdamW):  # None where nothing is trained
                _set_fused(part.optimizer)
                # a checkpoint brings its groups with it, of a run before this or with other optimizers too
                part.optimizer.register_load_state_dict_post_hook(_set_fused)
        return found

    return build_fused


def _set_fused(optimizer: "torch.optim.AdamW") -> None:
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)
