"""megatron-core 0.19.2, core/optimizer/distrib_optimizer.py:1762: the distributed optimizer's state was saved shifted.

get_parameter_state_dp_zero() puts the state of a buffer's buckets together without the padding between them;
sharded_param_state_fully_reshardable() cuts it at the parameters' places in the buffer, which count that padding.  All
behind a padded bucket is another parameter's: master weights as well as Adam's moments, and a resume goes on with them.
One bucket has no padding in front of anything.  There are several with PP above 1 and a tied embedding, and where
gradients are reduced while others are computed (--overlap-grad-reduce); whether one is padded depends on its size and
on the data-parallel ranks (a multiple of 128 and of them).

Nothing is saved so any more (own_optimizer_state.py).  The weights themselves are saved as they are: a master weight
that is not its weight tells a checkpoint that was.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.errors import UserError
from megatron_patch.patches import touch_points

if TYPE_CHECKING:
    from torch import Tensor

SHIFTED = "the checkpoint's optimizer state is another weight's: megatron-core 0.19.2 saved it shifted"
REMEDY = "its weights are right: go on from them with LOAD_OPTIM=false; what is saved from now on is whole"
# A master weight may have come from another precision than the weight beside it: half a step of bf16, and some.
RELATIVE, ABSOLUTE = 2**-7, 1e-6


def _close(saved: "Tensor", weight: "Tensor") -> bool:
    """Ten times as slow as to find them equal, which they are where the precision is that of the save."""
    import torch

    weight = weight.float()
    return torch.allclose(saved.to(weight), weight, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)


def apply() -> None:
    """Refuse a checkpoint with another parameter's state."""
    import torch

    def compared_with_the_weight(original: Callable[..., None]) -> Callable[..., None]:
        @torch.no_grad()
        def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict) -> None:
            saved = tensors.get("param")
            if (
                isinstance(saved, torch.Tensor)
                and model_param.dtype.is_floating_point
                and model_param.dtype.itemsize > 1
            ):
                own = self._get_model_param_range_map(model_param)["param"]
                weight = model_param.detach().view(-1)[own.start : own.end]
                if not torch.equal(saved.to(weight), weight) and not _close(saved, weight):
                    raise UserError(f"{SHIFTED} (a weight of {list(model_param.shape)}); {REMEDY}")
            original(self, model_param, tensors)

        return set_states

    touch_points.wrap(
        touch_points.DISTRIBUTED_OPTIMIZER,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "patches.shifted_optimizer_state",
        compared_with_the_weight,
    )
