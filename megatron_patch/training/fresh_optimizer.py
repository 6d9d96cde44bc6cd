"""A run that goes on without the optimizer's state: saved without it (SAVE_OPTIM=false), or told so (LOAD_OPTIM=false).

Megatron has two ways of its own with that: it stops at a checkpoint that lacks the state unless --no-load-optim is
typed, and with it begins the warm-up of the learning rate anew, because the schedule is stored with the optimizer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.training import get_args
from megatron.training.utils import print_rank_0

from megatron_patch.checkpoint_files import TRACKER, checkpoint_format, newest_iteration, read_metadata

OPTIMIZER = ("optimizer", "chained_")  # begin the names of its state in a torch_dist checkpoint


def _resumed(load: str | None, step: int | None) -> Path | None:
    """Folder of the iteration that a run goes on from; None: it begins."""
    if load is None or not (Path(load) / TRACKER).is_file():
        return None
    return newest_iteration(Path(load)) if step is None else Path(load) / f"iter_{step:07}"


def _has_optimizer(iteration: Path) -> bool:
    """Is the optimizer's state in it?  Of another format than torch_dist Megatron itself says so."""
    if checkpoint_format(iteration) != "torch_dist":
        return True
    return any(name.startswith(OPTIMIZER) for name in read_metadata(iteration).state_dict_metadata)


def keep_schedule(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's load_checkpoint(model, optimizer, opt_param_scheduler, ...) -> (iteration, ...)."""

    def load(model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        settings = get_args()
        folder = None if optimizer is None else _resumed(settings.load, settings.ckpt_step)
        why = "LOAD_OPTIM=false"
        if folder is not None and not settings.no_load_optim and not _has_optimizer(folder):
            settings.no_load_optim, why = True, "it was saved with SAVE_OPTIM=false"
        result = load_checkpoint(model, optimizer, opt_param_scheduler, *args, **kwargs)
        if folder is not None and settings.no_load_optim:
            opt_param_scheduler.step(result[0] * settings.global_batch_size)  # counts samples
            print_rank_0(
                f"goes on from {folder} without its optimizer's state ({why}): Adam's moments begin at zero, so losses "
                "differ from those of a run that has them; the learning rate goes on"
            )
        return result

    return load
