"""megatron-core 0.19.2, core/optimizer/distrib_optimizer.py:1690: one rank gathers and saves the state of all ranks.

Or every rank gathers it; and each loads the whole of it to keep a part.  A rank owns a range of a parameter's elements,
which is a few boxes of the parameter where it does not begin and end with a row.  Here each rank saves and loads its
own boxes, in place.  The checkpoint's tensors are the same, cut elsewhere: any layout loads them, and those of before
are loaded as well.

What is gathered also loses its place (line 1762): behind a bucket with padding it is cut out shifted
(shifted_optimizer_state.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_patch.patches import touch_points
from megatron_patch.patches.loaded_in_place import joined

if TYPE_CHECKING:
    from torch import Tensor

WHO = "patches.own_optimizer_state"
PREFIX = "optimizer.state"  # of the tensors' names in a checkpoint


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(first indices, sizes) of the boxes that elements `begin` to `end` of a tensor of `shape` consist of, in order.

    The end of one row, whole rows and the beginning of another: at most 2 * len(shape) - 1.
    """
    row = math.prod(shape[1:])
    first, last = math.ceil(begin / row), end // row  # of the whole rows, and behind them
    if first > last:
        parts = [(begin, end)]
    else:
        parts = [(begin, first * row), (first * row, last * row), (last * row, end)]
    for start, stop in parts:
        index = start // row
        if start % row == 0 and stop % row == 0 and start < stop:
            yield (index, *(0 for _ in shape[1:])), ((stop - start) // row, *shape[1:])
        elif start < stop:
            for indices, sizes in boxes(shape[1:], start - index * row, stop - index * row):
                yield (index, *indices), (1, *sizes)


def parts(piece: Any, begins: int, own: range, state: "Tensor", **changes: Any) -> Iterator[Any]:
    """Megatron's ShardedTensors of a rank's state of a parameter, or of a piece of it as each half of a gated MLP.

    Args:
        piece: ShardedTensor of the model's state.
        begins: the piece's first element in the parameter, flattened.
        own: the rank's elements of the parameter, flattened.
        state: of these elements, flat.
        changes: what is another than the piece's.
    """
    begin, end = max(own.start, begins), min(own.stop, begins + math.prod(piece.local_shape))
    if begin >= end:
        return
    lead = piece.prepend_axis_num  # layers stand in front of a tensor as one more dimension
    for indices, sizes in boxes(piece.local_shape, begin - begins, end - begins):
        count = math.prod(sizes)
        offset = [start + index for start, index in zip(piece.global_offset, (0,) * lead + indices, strict=True)]
        shape = (1,) * lead + sizes
        yield replace(
            piece,
            data=state[begin - own.start : begin - own.start + count].view(shape),
            dtype=state.dtype,
            local_shape=shape,
            global_offset=tuple(offset),
            axis_fragmentations=None,  # not of one size
            prepend_axis_num=0,
            **changes,
        )
        begin += count


def apply() -> None:
    """Save and load what a rank owns."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    def owned(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, range]]:
        for by_dtype in optimizer.gbuf_ranges:
            for buckets in by_dtype.values():
                for bucket in buckets:
                    for parameter, places in bucket["param_map"].items():
                        yield parameter, range(places["param"].start, places["param"].end)

    def tensors_of(optimizer: Any, parameter: torch.nn.Parameter, loading: bool) -> dict[str, torch.Tensor]:
        found = optimizer._get_main_param_and_optimizer_states(parameter)
        found.pop("step", None)  # is with the parameter groups
        if loading:  # in fp32 it is the weight itself, with which what is loaded will be compared
            found["param"] = torch.empty_like(found["param"])
        return {name: tensor.detach().float() for name, tensor in found.items()}

    def sharded_state(_: Any):
        def sharded(self: Any, model_state: dict, is_loading: bool = False, metadata: Any = None) -> dict:
            of_model = extract_sharded_tensors_and_factories(model_state)[0]
            wholes = {whole.data: whole for whole in nested_values(of_model)}
            state = {}
            for number, (parameter, own) in enumerate(owned(self)):
                whole = wholes[parameter]
                pieces = list(nested_values(whole.build())) if isinstance(whole, ShardedTensorFactory) else [whole]
                # its data-parallel ranks write the parts of one copy: the first in the other dimensions
                replica = (*whole.replica_id[:2], self.distributed_optimizer_instance_id)
                state[number] = {}
                for name, tensor in tensors_of(self, parameter, is_loading).items():
                    found = (
                        part
                        for piece in pieces
                        for part in parts(
                            piece,
                            piece.data.storage_offset() - parameter.storage_offset(),
                            own,
                            tensor,
                            key=f"{PREFIX}.{name}.{piece.key}",
                            replica_id=replica,
                        )
                    )
                    state[number][name] = dict(enumerate(found))
            return state

        return sharded

    def load_state(_: Any):
        @torch.no_grad()
        def load(self: Any, state: dict) -> None:
            for number, (parameter, _) in enumerate(owned(self)):
                own = {
                    name: joined([part.flatten() for part in loaded.values()]) for name, loaded in state[number].items()
                }
                self._set_main_param_and_optimizer_states(parameter, own)
            if hasattr(self.optimizer, "_sync_hdo_state_to_sub_optimizers"):  # that steps on the host
                self.optimizer._sync_hdo_state_to_sub_optimizers()

        return load

    for method, wrapper in (
        ("sharded_param_state_fully_reshardable", sharded_state),
        ("load_parameter_state_from_fully_reshardable", load_state),
    ):
        touch_points.wrap(touch_points.DISTRIBUTED_OPTIMIZER, f"DistributedOptimizer.{method}", WHO, wrapper)
