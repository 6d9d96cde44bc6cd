"""Low-rank adapters around Megatron's linear layers: what they add, how they are cut, how a checkpoint holds them.

They live in a module of their own (LlavaModel.adapters) and are hooked onto the layers of the base, whose names,
checkpoints and layers, local ones or Transformer Engine's, stay as they are.  Their numbers and names: lora.py.

Tensor parallelism cuts what the layer's own weight is cut along: of column-parallel layers B [out, r] along its
outputs, of row-parallel ones A [r, in] along its inputs; the other matrix is whole on every rank.  Between the ranks
goes only the narrow product [S, B, r].
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_patch import device
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.lora import PARTS, Linear, LoraConfig, linears_of
from megatron_patch.model.recomputation import not_keeping


class LinearAdapter(torch.nn.Module):
    """The adapters of the linear layers that one matrix of Megatron holds.

    Args:
        held: all that the matrix holds, in order.
        adapted: those of them with an adapter; not empty.
        blocks: the matrix holds them interleaved in so many blocks on all ranks together: query groups, or 1.
        config: of the layer: parallelism, parameter type.
        group: tensor-parallel processes.
    """

    def __init__(
        self,
        held: Iterable[Linear],
        adapted: Iterable[Linear],
        lora: LoraConfig,
        blocks: int,
        config: TransformerConfig,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        held, adapted = tuple(held), tuple(adapted)
        size = group.size()
        self.lora, self._group = lora, group
        self.row_parallel = adapted[0].row_parallel
        self._sequence_parallel = config.sequence_parallel
        self._several = size > 1
        self._blocks = blocks // size if blocks > 1 else 1
        # (its name, or None: no adapter; elements in each block)
        self._columns = [
            (one.target if one in adapted else None, one.outputs // (1 if self.row_parallel else size) // self._blocks)
            for one in held
        ]

        def empty(*shape: int) -> torch.nn.Parameter:
            on = device.current_device()
            return torch.nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=on))

        cut = size if self.row_parallel else 1
        self.lora_A = torch.nn.ParameterDict({one.target: empty(lora.rank, one.inputs // cut) for one in adapted})
        cut = 1 if self.row_parallel else size
        self.lora_B = torch.nn.ParameterDict({one.target: empty(one.outputs // cut, lora.rank) for one in adapted})
        cut_ones, whole_ones = (self.lora_A, self.lora_B) if self.row_parallel else (self.lora_B, self.lora_A)
        for weight in cut_ones.values():
            set_tensor_model_parallel_attributes(weight, True, int(self.row_parallel), 1)
        for weight in whole_ones.values():
            weight.sequence_parallel = config.sequence_parallel  # then its gradient is of a part of the tokens

    @torch.no_grad()
    def reset(self, name: str, seed: int) -> None:
        """A as torch.nn.Linear draws weights, uniform within 1 / sqrt(in), as peft does; B zero.

        Every A has a generator of its own, of the seed and its name, and is drawn whole, then cut: no layout of ranks
        changes it.
        """
        rank = self._group.rank()
        for target, weight in self.lora_A.items():
            self.lora_B[target].zero_()
            if weight.is_meta:
                continue
            digest = hashlib.sha256(f"{seed} {name}.{target}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            inputs = weight.shape[1] * (self._group.size() if self.row_parallel else 1)
            bound = 1 / math.sqrt(inputs)
            whole = torch.empty(self.lora.rank, inputs).uniform_(-bound, bound, generator=generator)
            begin = rank * weight.shape[1] if self.row_parallel else 0
            weight.copy_(whole[:, begin : begin + weight.shape[1]])

    def forward(self, states: Tensor) -> Tensor:
        """states [S, B, in], as the layer is given them -> [S, B, out] to be added to what it returns.

        Under tensor parallelism `in` or `out` are this rank's part, and of the sequence it is the layer's.
        """
        with not_keeping(states):
            narrow = self._narrow(states)
        narrow = self._across_ranks(narrow) * self.lora.scaling
        wide = {
            target: F.linear(part, weight)
            for (target, weight), part in zip(self.lora_B.items(), narrow.split(self.lora.rank, dim=-1), strict=True)
        }
        if len(self._columns) == 1:
            return wide[self._columns[0][0]]
        like = next(iter(wide.values()))
        pieces = [
            like.new_zeros(*like.shape[:-1], self._blocks, width)
            if target is None
            else wide[target].unflatten(-1, (self._blocks, width))
            for target, width in self._columns
        ]
        return torch.cat(pieces, dim=-1).flatten(-2)

    def _narrow(self, states: Tensor) -> Tensor:
        """A x of all adapters [S, B, adapters * r]."""
        if not self.training or self.lora.dropout == 0:
            return F.linear(states, torch.cat(list(self.lora_A.values())))
        # A mask for each adapter, as peft draws them.  Ranks that hold other elements or tokens draw other masks:
        # layers under sequence parallelism run with a random state of each rank's own already.
        if self.row_parallel and self._several and not self._sequence_parallel:
            with get_cuda_rng_tracker().fork():
                return self._narrow_with_dropout(states)
        return self._narrow_with_dropout(states)

    def _narrow_with_dropout(self, states: Tensor) -> Tensor:
        return torch.cat(
            [F.linear(F.dropout(states, self.lora.dropout), weight) for weight in self.lora_A.values()], dim=-1
        )

    def _across_ranks(self, narrow: Tensor) -> Tensor:
        """What the layer does with its own input or output, done with the narrow product."""
        if not self._several:
            return narrow
        across = {  # row-parallel, sequence-parallel
            (False, False): copy_to_tensor_model_parallel_region,
            (False, True): gather_from_sequence_parallel_region,
            (True, False): reduce_from_tensor_model_parallel_region,
            (True, True): reduce_scatter_to_sequence_parallel_region,
        }
        return across[self.row_parallel, self._sequence_parallel](narrow, group=self._group)


class Adapters(torch.nn.ModuleDict):
    """All adapters of one pipeline stage: <module of LlavaModel>.<layer, from 0>.<Megatron's linear layer>."""

    def __init__(self, lora: LoraConfig, geometry: LlavaGeometry, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.lora, self._geometry, self._group = lora, geometry, group

    def attach(self, part: str, number: int, layer: torch.nn.Module, config: TransformerConfig) -> None:
        """Give the linear layers of a part's transformer layer (its number from 0) their adapters."""
        adapted = self.lora.linears(self._geometry, part)
        groups = self._geometry.language.groups if part == "language_model" else self._geometry.tower.heads
        of_layer = torch.nn.ModuleDict()
        for megatron in dict.fromkeys(one.megatron for one in adapted):
            held, own = (
                [one for one in linears if one.megatron == megatron]
                for linears in (linears_of(self._geometry, part), adapted)
            )
            blocks = groups if megatron.endswith("linear_qkv") else 1
            adapter = LinearAdapter(held, own, self.lora, blocks, config, self._group)
            of_layer[megatron.rpartition(".")[2]] = adapter
            _hook(layer.get_submodule(megatron), adapter)
        if len(of_layer):
            if PARTS[part] not in self:
                self[PARTS[part]] = torch.nn.ModuleDict()
            self[PARTS[part]][str(number)] = of_layer

    def adapters(self) -> Iterator[tuple[str, LinearAdapter]]:
        """(name below this module, adapter) of each matrix of Megatron's."""
        for name, module in self.named_modules():
            if isinstance(module, LinearAdapter):
                yield name, module

    def reset(self, seed: int) -> None:
        """Draw the adapters' first weights; before training B is zero, and they add nothing."""
        for name, adapter in self.adapters():
            adapter.reset(name, seed)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """For Megatron's checkpoints: each matrix under its name, whole or cut along its axis."""
        state: ShardedStateDict = {}
        for name, adapter in self.adapters():
            own = adapter.state_dict(prefix="", keep_vars=True)
            cut, axis = ("lora_A", 1) if adapter.row_parallel else ("lora_B", 0)
            axes = {key: axis for key in own if key.startswith(f"{cut}.")}
            group = (metadata or {}).get("dp_cp_group")
            state |= make_sharded_tensors_for_checkpoint(
                own, f"{prefix}{name}.", axes, sharded_offsets, tp_group=self._group, dp_cp_group=group
            )
        return state


def _hook(linear: torch.nn.Module, adapter: LinearAdapter) -> None:
    """Have a linear layer's output [S, B, out] be the adapter's, too.

    Transformer Engine fuses norm and linear layer; the adapter is given what the norm returns, which is asked for then
    and taken out of the output again.
    """
    fused = hasattr(linear, "return_layernorm_output")
    if fused:
        linear.return_layernorm_output = True

    def add(_: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
        if not fused:
            product, bias = output
            return product + adapter(inputs[0]), bias
        if len(output) == 3:
            product, bias, states = output
        else:
            (product, states), bias = output
        return product + adapter(states), bias

    linear.register_forward_hook(add)
