"""megatron-core 0.19.2, core/optimizer/optimizer.py:1200: no Adam goes on with the state that the other kind has saved.

FusedAdam (Transformer Engine, Apex) keeps the step in the parameter group, as an int, and asks the group for
`bias_correction`; torch's own Adam keeps the step with each parameter.  A run that was saved without Transformer Engine
then ends with "KeyError: 'bias_correction'" where it is there, and the other way round with "KeyError: 'step'".  The
moments are the same, so what is loaded is turned into what the optimizer has.
"""

from collections.abc import Callable
from typing import Any

from megatron_patch.patches import touch_points

FUSED_ADAMS_OWN = "bias_correction"


def turn_into_fused(defaults: dict[str, Any], groups: list[dict[str, Any]], states: dict[int, dict[str, Any]]) -> None:
    """Step and missing settings into the groups, in place.

    Args:
        defaults: the optimizer's settings.
        groups, states: `param_groups` and `state` of what it is about to load.
    """
    for group in groups:
        steps = {int(states[number].pop("step")) for number in group["params"] if "step" in states.get(number, {})}
        if "step" in group and not steps:
            steps = {int(group["step"])}
        if steps:
            group["step"] = max(steps)
        for name, value in defaults.items():
            group.setdefault(name, value)


def turn_into_torchs(groups: list[dict[str, Any]], states: dict[int, dict[str, Any]]) -> None:
    """The step from the groups to the parameters that have none, in place.  Arguments as turn_into_fused()."""
    import torch

    for group in groups:
        step = group.pop("step", None)
        for number in group["params"]:
            if step is not None and "step" not in states.get(number, {"step": None}):
                states[number]["step"] = torch.tensor(float(step))


def apply() -> None:
    """Have every Adam look at what it loads."""
    import torch

    def turned(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        groups, states = state_dict["param_groups"], state_dict["state"]
        if FUSED_ADAMS_OWN in optimizer.defaults:
            turn_into_fused(optimizer.defaults, groups, states)
        elif isinstance(optimizer, torch.optim.Adam):
            turn_into_torchs(groups, states)

    def looking(build: Callable[..., None]) -> Callable[..., None]:
        def init(self: object, optimizer: torch.optim.Optimizer | None, *args: Any, **kwargs: Any) -> None:
            build(self, optimizer, *args, **kwargs)
            if optimizer is not None:
                optimizer.register_load_state_dict_pre_hook(turned)

        return init

    touch_points.wrap(touch_points.OPTIMIZER, "MegatronOptimizer.__init__", "patches.adam_of_another_kind", looking)
