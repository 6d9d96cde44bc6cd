"""megatron-core 0.19.2, core/optimizer/distrib_optimizer.py:839, 1030, 1193: Adam's step without Apex and TE.

With torch's own Adam (neither Transformer Engine nor Apex installed, on any device) the distributed optimizer
  - asserts exactly one step in state_dict(), also at loading, when the state is still empty, and on a rank that owns
    no parameter (all of its stage frozen);
  - gives all parameters the same step tensor in load_state_dict(), so each of them advances the others' step;
  - asks the loaded state for a `step` that it does not hold in _set_main_param_and_optimizer_states().
A resume then crashes or goes on with a wrong Adam step: the first iteration looks right, the tenth does not.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor


def adam_state(parameter: "Tensor") -> dict[str, "Tensor"]:
    """As torch's Adam begins with, before its first step."""
    import torch

    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # where fused steps want it
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def apply() -> None:
    """Give every parameter a state of its own, with its own step; nothing unless torch's own Adam is used."""
    import torch
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return  # their FusedAdam keeps the step in the parameter group

    def seed_adam_state(self: object) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = adam_state(parameter)

    def with_state(original: Callable[..., dict]) -> Callable[..., dict]:
        def state_dict(self: object) -> dict:
            seed_adam_state(self)
            if self.optimizer.state:
                return original(self)
            # No parameter here, so no step of our own; the groups still carry one for the ranks that load them.
            inner = {key: value for key, value in self.optimizer.state_dict().items() if key != "state"}
            for group in inner["param_groups"]:
                del group["params"]
                group["step"] = 0.0
            state = {"optimizer": inner}
            if self.grad_scaler:
                state["grad_scaler"] = self.grad_scaler.state_dict()
            return state

        return state_dict

    def with_own_steps(original: Callable[..., None]) -> Callable[..., None]:
        def load_state_dict(self: object, state_dict: dict) -> None:
            seed_adam_state(self)
            original(self, state_dict)
            for state in self.optimizer.state.values():
                state["step"] = state["step"].detach().clone()

        return load_state_dict

    def without_asking_for_step(original: Callable[..., None]) -> Callable[..., None]:
        @torch.no_grad()
        def set_states(self: object, model_param: torch.nn.Parameter, tensors: dict) -> None:
            # None means "leave the step as load_state_dict() set it from the parameter group"
            original(self, model_param, {"step": None, **tensors})

        return set_states

    for method, wrapper in (
        ("state_dict", with_state),
        ("load_state_dict", with_own_steps),
        ("_set_main_param_and_optimizer_states", without_asking_for_step),
    ):
        where = touch_points.DISTRIBUTED_OPTIMIZER, f"DistributedOptimizer.{method}"
        touch_points.wrap(*where, "patches.distributed_optimizer_state", wrapper)
