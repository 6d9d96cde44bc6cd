"""Megatron's self-attention, with as few passes over memory on a CPU as the compiled kernels allow.

Megatron copies the queries out of what the projection returns, turns queries and keys into new tensors, and joins the
three gradients again.  The kernel reads all three where the projection left them, turns them in the cache, and writes
the gradients into one tensor.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_patch.kernels import PackedRow, packed_row
from megatron_patch.model.attention import ScaledDotProductAttention
from megatron_patch.model.cpu_attention import attention_of_mixed, takes_compiled


class LocalSelfAttention(SelfAttention):
    """Attention of whole records, of packed rows too; cached answers and what else is asked of it are Megatron's."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **asked: object,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] -> [S, B, H] and the bias that is not added yet; the rest as Megatron's."""
        plain = hidden_states.is_cpu and attention_mask is None and all(value is None for value in asked.values())
        packed = packed_row(packed_seq_params.cu_seqlens_q) if plain and packed_seq_params is not None else None
        if not (plain and self._in_few_passes(hidden_states, rotary_pos_emb, packed)):
            asked |= {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
            return super().forward(hidden_states, attention_mask, **asked)
        mixed, _ = self.linear_qkv(hidden_states)
        context = attention_of_mixed(
            mixed,
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
            self.core_attention.scale(self.hidden_size_per_attention_head),
            self.core_attention.is_causal,
            rotary_pos_emb,
            packed,
        )
        return self.linear_proj(context)

    def _in_few_passes(self, hidden_states: Tensor, angles: object, packed: PackedRow | None) -> bool:
        """Whether the kernel does all that this layer does between its projections, on a CPU."""
        config = self.config
        length = hidden_states.shape[0] * (self.world_size if config.sequence_parallel else 1)
        if packed is not None:
            length = packed.longest
        return (
            takes_compiled(length, hidden_states.dtype)
            and isinstance(self.core_attention, ScaledDotProductAttention)
            and self.core_attention.attends_whole_records()
            and (packed is None or self.core_attention.is_causal)
            and (angles is None or self._turns_halves(angles, length))
            and config.num_query_groups >= self.world_size  # else a rank takes a part of what its group projects
            and not (config.qk_layernorm or config.attention_output_gate or config.no_rope_freq)
            and not (config.fine_grained_activation_offloading or self.checkpoint_core_attention)
        )

    def _turns_halves(self, angles: object, length: int) -> bool:
        """Whether each head is turned whole, its halves against each other, by angles that all records share."""
        config = self.config
        return (
            isinstance(angles, torch.Tensor)
            and angles.shape == (length, 1, 1, self.hidden_size_per_attention_head)
            and not (config.apply_rope_fusion or config.rotary_interleaved)
            and config.mrope_section is None
            and self._yarn_concentration_factor == 1.0
        )
