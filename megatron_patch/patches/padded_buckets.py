"""megatron-core 0.19.2, core/optimizer/distrib_optimizer.py:1762: the distributed optimizer's state is saved shifted.

get_parameter_state_dp_zero() puts the state of a buffer's buckets together without the padding between them;
sharded_param_state_fully_reshardable() cuts it at the parameters' places in the buffer, which count that padding.  All
behind a padded bucket is another parameter's: master weights as well as Adam's moments, and a resume goes on with them.
One bucket has no padding in front of anything.  There are several with PP above 1 and a tied embedding, and where
gradients are reduced while others are computed (--overlap-grad-reduce); whether one is padded depends on its size and
on the data-parallel ranks (a multiple of 128 and of them).

The weights themselves are saved as they are.  So a master weight that is not its weight tells a checkpoint that was
saved so.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from megatron_patch.errors import UserError
from megatron_patch.patches import touch_points

WHO = "patches.padded_buckets"
SHIFTED = "the checkpoint's optimizer state is another weight's: megatron-core 0.19.2 saved it shifted"
REMEDY = "its weights are right: go on from them with LOAD_OPTIM=false; what is saved from now on is whole"
# A master weight may have come from another precision than the weight beside it: half a step of bf16, and some.
RELATIVE, ABSOLUTE = 2**-7, 1e-6


def places_without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """{parameter: (start, end, bucket)} among the buckets' elements put together without the padding between them."""
    shifts, whole = [], 0
    for bucket in buffer.buckets:
        shifts.append(bucket.offset - whole)
        whole += bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


@contextmanager
def _without_padding(buffers: list[Any]):
    kept = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            buffer.param_index_map = places_without_padding(buffer)
        yield
    finally:
        for buffer, places in zip(buffers, kept, strict=True):
            buffer.param_index_map = places


def apply() -> None:
    """Save each parameter's own state; refuse a checkpoint that holds another's."""
    import torch

    def with_own_places(original: Callable[..., Any]) -> Callable[..., Any]:
        def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _without_padding(self.buffers):
                return original(self, *args, **kwargs)

        return sharded_state

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
                weight = model_param.detach().view(-1)[own.start : own.end].float()
                if not torch.allclose(saved.to(weight), weight, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True):
                    raise UserError(f"{SHIFTED} (a weight of {list(model_param.shape)}); {REMEDY}")
            original(self, model_param, tensors)

        return set_states

    for method, wrapper in (
        ("sharded_param_state_fully_reshardable", with_own_places),
        ("_set_main_param_and_optimizer_states", compared_with_the_weight),
    ):
        touch_points.wrap(touch_points.DISTRIBUTED_OPTIMIZER, f"DistributedOptimizer.{method}", WHO, wrapper)
