"""Core attention on torch's scaled_dot_product_attention, for layers without Transformer Engine.

Megatron's own DotProductAttention materialises the [S, S] scores (277 ms against 67 ms at S = 1024, H = 512, B = 2 on
two threads) and knows no context parallelism.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_patch.model.cpu_attention import cpu_attention, packed_attention
from megatron_patch.model.key_value_cache import KeyValueCache

SHORT_RECORD = 512  # tokens; with four records of 725 tokens both ways of _packed() take the same time, on a CPU


def zigzag_positions(local_length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Positions [local_length] of one sequence that context-parallel rank `rank` of `size` holds.

    Megatron cuts a sequence into 2 * size chunks and gives rank r chunks r and 2 * size - 1 - r, which balances the
    causal work.
    """
    chunk = local_length // 2
    first = torch.arange(chunk, device=device)
    return torch.cat([first + rank * chunk, first + (2 * size - 1 - rank) * chunk])


def packed_zigzag_positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Positions in a packed row that context-parallel rank `rank` of `size` holds: of each record its zigzag part.

    cu_seqlens: [records + 1], first positions of the records, then the end; every length a multiple of 2 * size.
    """
    starts = cu_seqlens.tolist()
    return torch.cat(
        [
            start + zigzag_positions((end - start) // size, rank, size, cu_seqlens.device)
            for start, end in itertools.pairwise(starts)
        ]
    )


@functools.lru_cache(maxsize=8)  # all layers ask the same of a micro-batch, and a pipeline has several under way
def places_side_by_side(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each token [T] of a packed row stands in [longest, records], flattened: records as columns of a batch."""
    records = len(lengths)
    return torch.cat([torch.arange(length) * records + record for record, length in enumerate(lengths)]).to(device)


class ScaledDotProductAttention(MegatronModule):
    """A `core_attention` with the constructor and the call of Megatron's DotProductAttention.

    Under context parallelism the keys and values of all ranks are gathered and masked by position; queries stay local.
    Packed rows (Megatron's `thd`) are attended record by record, so nothing is computed that would be masked.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        del attention_type, cp_comm_type
        self.layer_number = layer_number
        self.cache: KeyValueCache | None = None  # while answers are generated
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(head_dim)
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, heads, d], key and value [S, B, groups, d] -> [S, B, heads * d].

        With packed_seq_params [T, heads, d], [T, groups, d] -> [T, heads * d], T tokens of all records of the row.
        `attention_mask` is Megatron's: True means masked, broadcastable to [B, 1, S, S].
        """
        if attention_bias is not None:
            raise ValueError("ScaledDotProductAttention takes no attention_bias")
        if self.cache is not None:
            return self.cache.attend(self.layer_number, query, key, value, self.softmax_scale)
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None:
            if mask_type != AttnMaskType.causal or attention_mask is not None:
                raise ValueError("ScaledDotProductAttention attends packed records causally, without another mask")
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q)
        if mask_type == AttnMaskType.causal and attention_mask is None:
            return self._causal(query, *self._over_ranks(key, value))
        allowed = None if attention_mask is None or mask_type == AttnMaskType.no_mask else ~attention_mask
        return self._attend(query, key, value, allowed=allowed)

    @property
    def is_causal(self) -> bool:
        """A token sees itself and those before it, where nothing else is asked for."""
        return self.attn_mask_type == AttnMaskType.causal

    def scale(self, width: int) -> float:
        """By which the scores of heads of `width` channels are multiplied."""
        return width**-0.5 if self.softmax_scale is None else self.softmax_scale

    def attends_whole_records(self) -> bool:
        """Without dropout now, without the keys of other ranks or of an answer's earlier tokens."""
        return self.context_group is None and self.cache is None and not (self.training and self.dropout)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Block-diagonal attention: causal attention over each record of a packed row.

        A compiled kernel takes all of them at once.  Without one long records go one by one, so that nothing is
        computed that would be masked.  Short ones go side by side, padded for this product alone: there the calls
        would take longer than the products.
        """
        if query.is_cpu and self.attends_whole_records():
            context = packed_attention(query, key, value, self.scale(query.shape[-1]), cu_seqlens)
            if context is not None:
                return context
        size = 1 if self.context_group is None else self.context_group.size()
        bounds = (cu_seqlens // size).tolist()  # each rank holds an equal part of every record
        lengths = tuple(end - start for start, end in itertools.pairwise(bounds))
        if self.context_group is None and len(lengths) > 1 and max(lengths) <= SHORT_RECORD:
            return self._side_by_side(query, key, value, lengths)
        # [size, T, groups, d]: the parts of a record lie at the same place of every rank's row
        key, value = (states.unflatten(0, (size, -1)) for states in self._over_ranks(key, value))
        return torch.cat(
            [
                self._causal(
                    query[start:end, None],
                    key[:, start:end].flatten(0, 1)[:, None],
                    value[:, start:end].flatten(0, 1)[:, None],
                )[:, 0]
                for start, end in itertools.pairwise(bounds)
            ]
        )

    def _side_by_side(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """[T, heads, d] -> [T, heads * d], the records as rows of one batch, as long as the longest."""
        rows, longest = len(lengths), max(lengths)
        place = places_side_by_side(lengths, query.device)

        def as_rows(states: Tensor) -> Tensor:  # [longest, rows, heads, d], zeros behind the end of each
            empty = states.new_zeros(longest * rows, *states.shape[1:])
            return empty.index_copy(0, place, states).unflatten(0, (longest, rows))

        context = self._causal(as_rows(query), as_rows(key), as_rows(value))
        return context.flatten(0, 1).index_select(0, place)

    def _over_ranks(self, *states: Tensor) -> tuple[Tensor, ...]:
        """Each [S, ...] -> [size * S, ...], the parts of all context-parallel ranks behind each other."""
        if self.context_group is None:
            return states
        return tuple(
            gather_from_sequence_parallel_region(part.contiguous(), group=self.context_group) for part in states
        )

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention; key and value are those of all context-parallel ranks, the query is this rank's."""
        if self.context_group is None:
            return self._attend(query, key, value, is_causal=True)
        return self._attend(query, key, value, allowed=self._causal_over_ranks(query.shape[0], query.device))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[S, B, heads, d] -> [S, B, heads * d]; `allowed` is True where a query may look."""
        if allowed is None and query.is_cpu and not (self.training and self.dropout):
            context = cpu_attention(query, key, value, self.scale(query.shape[-1]), is_causal)
            if context is not None:
                return context
        if allowed is not None and query.shape[2] != key.shape[2]:
            # torch's fast CUDA kernels take grouped queries or a mask; with both it would hold the [S, S] scores
            key, value = (states.repeat_interleave(query.shape[2] // key.shape[2], 2) for states in (key, value))
        context = F.scaled_dot_product_attention(
            *(states.permute(1, 2, 0, 3) for states in (query, key, value)),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _causal_over_ranks(self, local_length: int, device: torch.device) -> Tensor:
        """Mask [local_length, size * local_length], True where the query may look."""
        rank, size = self.context_group.rank(), self.context_group.size()
        mine = zigzag_positions(local_length, rank, size, device)
        everyone = torch.cat([zigzag_positions(local_length, other, size, device) for other in range(size)])
        return mine[:, None] >= everyone[None, :]
