"""megatron-core 0.19.2 with --use-torch-fsdp2: gradients, checkpoints and resumes of fully sharded weights.

- core/distributed/data_parallel_base.py:45: scale_gradients() does nothing, so that a loss per token is never divided
  by the number of tokens; Adam with clipping hides it, SGD is wrong by that factor.
- core/distributed/torch_fully_sharded_data_parallel.py:137: every weight is cut along axis 0, which the ranks need not
  divide (a class token, 17 positions), and which two halves of a gated MLP share.
- the same, :181: load_state_dict() does nothing, as training.py:2204 has Megatron leave model and optimizer alone:
  Adam's state is then never restored.  Here both are loaded, each rank's pieces.
- core/dist_checkpointing/optimizer.py: to_local() makes a new view each time, by which no parameter is found again.
- core/optimizer/clip_grads.py: a mesh of replicas and pieces has no one group over which norms are summed.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points
from megatron_patch.patches.touch_points import LOOP, OPTIMIZER

if TYPE_CHECKING:
    import torch

PLACE = "patches.torch_fsdp2"
WRAPPER = "megatron.core.distributed.torch_fully_sharded_data_parallel"


def apply() -> None:
    """Mend all of it; what is not fully sharded goes the way it went."""
    touch_points.wrap(WRAPPER, "fully_shard", PLACE, _with_placement)
    touch_points.wrap(WRAPPER, "TorchFullyShardedDataParallel.__init__", PLACE, _unmarked)
    touch_points.wrap(WRAPPER, "TorchFullyShardedDataParallel.load_state_dict", PLACE, _loading)
    touch_points.wrap(
        "megatron.core.distributed.data_parallel_base", "_BaseDataParallel.scale_gradients", PLACE, _scaling
    )
    touch_points.wrap("megatron.core.dist_checkpointing.optimizer", "to_local_if_dtensor", PLACE, _the_same_tensor)
    touch_points.wrap(
        "megatron.core.optimizer.clip_grads", "get_data_parallel_group_if_dtensor", PLACE, _group_of_pieces
    )
    for kind in ("FP32Optimizer", "Float16OptimizerWithFloat16Params"):
        touch_points.wrap(OPTIMIZER, f"{kind}.load_state_dict", PLACE, _with_pieces)
    touch_points.wrap(LOOP, "load_checkpoint", PLACE, _of_model_and_optimizer)


def _with_placement(fully_shard: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import Shard

    where = [""]  # kind of device of the weights; some modules that are wrapped have none
    made: dict[str, DeviceMesh] = {}

    def shard(module: Any, *args: Any, mesh: Any, **kwargs: Any) -> Any:
        where[0] = next((weight.device.type for weight in module.parameters()), where[0]) or mesh.device_type
        if where[0] not in made:
            made[where[0]] = _mesh(mesh.get_group(), where[0])
        mesh = made[where[0]]
        pieces = mesh.size(mesh.ndim - 1)
        gated = {id(layer.weight) for name, layer in module.named_modules() if name.endswith("mlp.linear_fc1")}

        def place(weight: "torch.nn.Parameter") -> Shard:
            axes = range(weight.ndim)
            # two matrices lie behind each other along axis 0
            axes = axes[1:] if id(weight) in gated and weight.ndim > 1 else axes
            axis = next((axis for axis in axes if weight.shape[axis] % pieces == 0), None)
            if axis is None:
                raise ValueError(f"no axis of a weight {list(weight.shape)} can be shared out over {pieces} ranks")
            return Shard(axis)

        # gradients of 16 bits are summed over the ranks in 32
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        return fully_shard(module, *args, mesh=mesh, shard_placement_fn=place, mp_policy=policy, **kwargs)

    return shard


def _mesh(group: "torch.distributed.ProcessGroup", kind: str) -> Any:
    """The data-parallel ranks; for FSDP=hybrid (nodes, ranks of a node): the weights are there once on each."""
    from megatron.training import get_args
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    tensor = get_args().tensor_model_parallel_size
    of_node = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // tensor)
    if get_args().fsdp != "hybrid" or group.size() <= of_node:
        return DeviceMesh.from_group(group, kind)
    sizes = group.size() // of_node, of_node, tensor
    return init_device_mesh(kind, sizes, mesh_dim_names=("replicas", "pieces", "tensor"))["replicas", "pieces"]


def _unmarked(build: Callable[..., None]) -> Callable[..., None]:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.transformer_layer import TransformerLayer

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # not the output layer, whose weight the loss takes outside of its forward pass
        kwargs["sub_modules_to_wrap"] = {TransformerLayer, LanguageModelEmbedding, RotaryEmbedding}
        build(self, *args, **kwargs)
        for weight in self.module.parameters():
            # Megatron would narrow the checkpoint's entries itself, along axis 0; model/fully_sharded.py does it
            weight.__dict__.pop("is_torch_fsdp2_param", None)

    return init


def _loading(_: Callable[..., None]) -> Callable[..., Any]:
    def load_state_dict(self: Any, state_dict: Any, strict: bool = True) -> Any:
        return self.module.load_state_dict(state_dict, strict=strict)

    return load_state_dict


def _scaling(scale: Callable[..., None]) -> Callable[..., None]:
    def scale_gradients(self: Any, scaling_factor: Any) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is None:
            scale(self, scaling_factor)
            return
        for weight in self.module.parameters():
            if weight.grad is not None:
                # FSDP2 has taken the mean over the ranks; wanted is their sum
                weight.grad._local_tensor.mul_(scaling_factor * mesh.size())

    return scale_gradients


def _the_same_tensor(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor: getattr(tensor, "_local_tensor", tensor)


def _group_of_pieces(find: Callable[..., Any]) -> Callable[..., Any]:
    def group_of(tensor: Any, data_parallel_group: Any = None) -> Any:
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is None or mesh.ndim == 1:
            return find(tensor, data_parallel_group)
        return mesh.get_group(mesh.ndim - 1)  # the replicas have the same pieces

    return group_of


def _with_pieces(load: Callable[..., None]) -> Callable[..., None]:
    """The state's tensors are this rank's pieces; torch's optimizers want them as their weights are."""
    from torch.distributed.tensor import DTensor

    def like(weight: Any, piece: Any) -> Any:
        if not isinstance(weight, DTensor) or isinstance(piece, DTensor) or piece.ndim == 0:
            return piece
        return DTensor.from_local(
            piece, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        inner = state_dict.get("optimizer", state_dict)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for number, state in inner["state"].items():
            if not isinstance(number, int):
                continue  # the step that all of them share
            state.update({name: like(weights[number], value) for name, value in state.items()})
        if "fp32_from_fp16_params" in state_dict:
            for own, saved in zip(self.fp32_from_float16_groups, state_dict["fp32_from_fp16_params"], strict=True):
                saved[:] = [like(weight, value) for weight, value in zip(own, saved, strict=True)]
        load(self, state_dict)

    return load_state_dict


def _of_model_and_optimizer(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def load(*args: Any, **kwargs: Any) -> Any:
        return load_checkpoint(*args, **kwargs | {"skip_load_to_model_and_opt": False})

    return load
