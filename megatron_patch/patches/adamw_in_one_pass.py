"""megatron-core 0.19.2, core/optimizer/optimizer.py:410, 1112: a mean, clipping, the step and rounding: four passes.

Gradients are divided by the tokens of the step, scaled, and read once more by the step, and the weights that it has
written are read once more to be rounded to 16 bits: four passes over memory as large as the model.  On a CPU one kernel
does all of it.  Dividing and clipping note factors, and the step applies them; gradients stay as they are.

Of the distributed optimizer, whose weights in 16 bits lie in shards, the kernel clips and steps, and Megatron rounds.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points
from megatron_patch.patches.distributed_optimizer_state import adam_state
from megatron_patch.patches.touch_points import LOOP, OPTIMIZER

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import AdamW

WHO = "patches.adamw_in_one_pass"


class Share:
    """A factor that the gradients in Megatron's buffers still lack: one over the tokens of the step.

    is_applied: by every optimizer of every process, and by the norm, so that nothing else needs to
    """

    def __init__(self) -> None:
        self.factor, self.is_applied = 1.0, False


def apply() -> None:
    """Have torch's AdamW, where it is used and its tensors lie on a CPU, step so."""
    share = Share()
    module = "megatron.core.distributed.distributed_data_parallel"
    touch_points.wrap(module, "DistributedDataParallel.scale_gradients", WHO, partial(_sharing, share))
    touch_points.wrap(OPTIMIZER, "get_grad_norm_fp32", WHO, partial(_of_shares, share))
    touch_points.wrap(LOOP, "get_megatron_optimizer", WHO, partial(_with_own_steps, share))
    touch_points.wrap(OPTIMIZER, "clip_grad_by_total_norm_fp32", WHO, _noted)
    symbol = "Float16OptimizerWithFloat16Params._copy_main_params_to_model_params"
    touch_points.wrap(OPTIMIZER, symbol, WHO, _unless_rounded)


class OnePass:
    """The step of an AdamW of torch's.

    rounded: {parameter: the model's weight in 16 bits that it is the master of}
    has_rounded: the model's weights are those of the last step
    """

    def __init__(self, optimizer: "AdamW", rounded: dict["Tensor", "Tensor"], share: Share) -> None:
        self._optimizer, self._rounded, self._share, self.has_rounded = optimizer, rounded, share, False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.gradient_factor = 1.0

    def __call__(self) -> None:
        """Of all parameters that have a gradient; in a trace by the name of torch's own.

        Raises:
            RuntimeError: of one the kernel cannot do it.
        """
        from torch.profiler import record_function

        with record_function("Optimizer.step#AdamW.step"):
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group)
        self.has_rounded = bool(self._rounded)

    def _step(self, parameter: "Tensor", group: dict[str, Any]) -> None:
        from megatron_patch import kernels

        state = self._optimizer.state[parameter]
        if not state:
            state |= adam_state(parameter)
        state["step"] += 1
        weight, rounded = parameter.detach(), self._rounded.get(parameter)
        tensors = weight, parameter.grad, state["exp_avg"], state["exp_avg_sq"], rounded
        settings = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        if not kernels.adamw(*tensors, int(state["step"]), *settings, parameter.gradient_factor * self._share.factor):
            raise RuntimeError(f"AdamW's kernel cannot step {list(parameter.shape)} of {parameter.dtype}")


def _with_own_steps(share: Share, build: Callable[..., Any]) -> Callable[..., Any]:
    def build_own(*args: Any, **kwargs: Any) -> Any:
        found = build(*args, **kwargs)
        parts = [part for part in getattr(found, "chained_optimizers", [found]) if part.optimizer is not None]
        own = [part for part in parts if _can_step(part.optimizer)]
        for part in own:
            part.optimizer.step = OnePass(part.optimizer, _weights_of_masters(part), share)
        share.factor, share.is_applied = 1.0, _is_so_everywhere(own == parts)
        return found

    return build_own


def _is_so_everywhere(here: bool) -> bool:
    """Of all processes, whose norm is one, and of which one may have no compiler."""
    import torch

    said = torch.tensor(int(here))
    torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MIN)
    return bool(said)


def _weights_of_masters(part: Any) -> dict["Tensor", "Tensor"]:
    """{master: weight}; empty where weights lie in shards or in fp32, or the kernel does not round to their dtype."""
    import torch

    groups = zip(getattr(part, "fp32_from_float16_groups", []), getattr(part, "float16_groups", []), strict=True)
    found = {master: weight for pair in groups for master, weight in zip(*pair, strict=True)}
    fits = all(weight.dtype is torch.bfloat16 and weight.is_contiguous() for weight in found.values())
    return found if fits else {}


def _can_step(optimizer: Any) -> bool:
    import torch

    from megatron_patch.kernels.build import library

    if type(optimizer) is not torch.optim.AdamW or library() is None:
        return False  # None where nothing is trained
    plain = all(not group["amsgrad"] and not group["maximize"] for group in optimizer.param_groups)
    tensors = [parameter.data for group in optimizer.param_groups for parameter in group["params"]]
    return plain and all(
        type(tensor) is torch.Tensor and tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()
        for tensor in tensors
    )


def _sharing(share: Share, scale: Callable[..., None]) -> Callable[..., None]:
    def note(self: Any, scaling_factor: Any) -> None:
        if share.is_applied:
            share.factor = float(scaling_factor)  # each chunk of a model is told the same
        else:
            scale(self, scaling_factor)

    return note


def _of_shares(share: Share, get_norm: Callable[..., Any]) -> Callable[..., Any]:
    def norm(*args: Any, **kwargs: Any) -> Any:
        return get_norm(*args, **kwargs) * share.factor

    return norm


def _noted(clip: Callable[..., None]) -> Callable[..., None]:
    def note(parameters: Iterable["Tensor"], max_norm: float, total_norm: float, use_decoupled_grad: bool = False):
        parameters, factor = list(parameters), max_norm / (total_norm + 1e-6)  # as Megatron's
        if not isinstance(factor, float) or not all(hasattr(parameter, "gradient_factor") for parameter in parameters):
            clip(parameters, max_norm, total_norm, use_decoupled_grad)
            return
        for parameter in parameters:
            parameter.gradient_factor = min(1.0, factor)

    return note


def _unless_rounded(copy: Callable[..., None]) -> Callable[..., None]:
    def copy_unless_rounded(self: Any) -> None:
        step = getattr(self.optimizer, "step", None)
        if isinstance(step, OnePass) and step.has_rounded:
            step.has_rounded = False  # another caller may have changed the masters by other means
        else:
            copy(self)

    return copy_unless_rounded
