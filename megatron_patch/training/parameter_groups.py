"""Learning rate and weight decay of each module, and what was typed on resuming holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_patch.llava_kinds import NEWLINE
from megatron_patch.lora import PARTS

LANGUAGE_MODEL = "language_model"  # has the run's own learning rate and weight decay
TYPED = ("max_lr", "min_lr", "start_wd", "end_wd")  # of a parameter group


@dataclass(frozen=True)
class ModuleOverrides:
    """What is typed for one module; None: as for the language model."""

    learning_rate: float | None = None  # highest; the lowest keeps the ratio of MIN_LR to LR
    weight_decay: float | None = None


def read_overrides(args: Any) -> dict[str, ModuleOverrides]:
    """ModuleOverrides by module of LlavaModel from Megatron's arguments."""
    return {
        module: ModuleOverrides()
        if part == LANGUAGE_MODEL
        else ModuleOverrides(getattr(args, f"{part}_lr"), getattr(args, f"{part}_weight_decay"))
        for part, module in PARTS.items()
    } | {NEWLINE: ModuleOverrides()}


def with_modules(
    standard_overrides: Callable[..., dict], overrides: Callable[[], dict[str, ModuleOverrides]]
) -> Callable[..., dict]:
    """Wrap Megatron's get_standard_config_overrides(config): every parameter group belongs to one module.

    Groups carry the module's name, by which a checkpoint's are found again.
    """
    from megatron.core.optimizer import ParamKey

    def with_groups(config: Any) -> dict:
        found = standard_overrides(config=config)
        for module, chosen in overrides().items():
            group: dict[str, Any] = {"module": module}
            if chosen.learning_rate is not None:
                ratio = (config.min_lr or 0.0) / config.lr
                group |= {"max_lr": chosen.learning_rate, "min_lr": chosen.learning_rate * ratio}
            if chosen.weight_decay is not None:
                group |= {"start_wd": chosen.weight_decay, "end_wd": chosen.weight_decay}
            found[ParamKey(name=f"*{module}.*")] = group
        return found

    return with_groups


def keep_typed(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's load_checkpoint(model, optimizer, opt_param_scheduler, ...).

    Loading replaces the groups' overrides by the saved ones, of which --override-opt-param-scheduler knows nothing.
    """

    def load(model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        groups = [] if optimizer is None else optimizer.param_groups
        typed = [{name: group[name] for name in TYPED if name in group} for group in groups]
        result = load_checkpoint(model, optimizer, opt_param_scheduler, *args, **kwargs)
        for group, kept in zip([] if optimizer is None else optimizer.param_groups, typed, strict=True):
            for name in TYPED:
                group.pop(name, None)
            group.update(kept)
        if typed and opt_param_scheduler is not None:
            opt_param_scheduler.step(0)  # the overrides of the present step, from what was typed
        return result

    return load
