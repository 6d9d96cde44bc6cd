"""Transformer layers of decoder, tower and projector, from megatron-core parts, for both implementations.

Local layers keep their norms apart, Transformer Engine's fuse them into the linear layers.  The key maps give both the
same names in a checkpoint, so one checkpoint serves both.
"""

import copy
import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_patch.model.attention import ScaledDotProductAttention
from megatron_patch.model.elementwise import RMSNorm, SwiGLU
from megatron_patch.model.linear import Column, Row
from megatron_patch.model.self_attention import LocalSelfAttention
from megatron_patch.weight_names import NORM_KEYS_AS_TRANSFORMER_ENGINE


def _uses_transformer_engine(config: TransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


class LocalNorm:
    """RMSNorm or torch's LayerNorm over `hidden_size`, as `config.normalization` says.

    Megatron's WrappedTorchNorm refuses sequence parallelism; all it takes is the mark by which Megatron sums the
    gradients of parameters that see only a part of the sequence.  A class, because Megatron hands functions in a spec
    through unbuilt.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> RMSNorm | torch.nn.LayerNorm:
        """The module itself."""
        kind = RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class LocalMLP(MLP):
    """Megatron's MLP, whose SwiGLU goes over memory once and keeps nothing but its input for the backward pass."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, **kwargs: object) -> None:
        if config.gated_linear_unit and config.activation_func is F.silu:
            config = copy.copy(config)
            config.use_te_activation_func = True  # Megatron's name for: submodules bring the activation
            submodules = dataclasses.replace(submodules, activation_func=lambda config: SwiGLU())
        super().__init__(config, submodules, **kwargs)


def norm_builder(config: TransformerConfig) -> object:
    """Builder of a norm outside the layers: final norm, tower's ln_pre."""
    if _uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return LocalNorm


def transformer_layer(config: TransformerConfig, mask: AttnMaskType) -> ModuleSpec:
    """One pre-norm layer: attention with `mask`, then the MLP."""
    if _uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import (
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )

        column, row, core, norm, head_norm, attention, mlp, keys = (
            *(TELayerNormColumnParallelLinear, TERowParallelLinear, TEDotProductAttention),
            *(IdentityOp, TENorm, SelfAttention, MLP, {}),
        )
    else:
        column, row, core, norm, head_norm, attention, mlp, keys = (
            *(Column, Row, ScaledDotProductAttention),
            *(LocalNorm, LocalNorm, LocalSelfAttention, LocalMLP, NORM_KEYS_AS_TRANSFORMER_ENGINE),
        )
    if not config.qk_layernorm:
        head_norm = None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=core,
                    linear_proj=row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=partial(mlp.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def decoder_block(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's layers on this pipeline stage, and the final norm."""
    layer = transformer_layer(config, AttnMaskType.causal)
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm_builder(config))


def tower_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The tower's layers, all on the first stage.  No final norm: LLaVA takes an inner layer's hidden states."""
    return TransformerBlockSubmodules(layer_specs=[transformer_layer(config, AttnMaskType.no_mask)] * config.num_layers)


def projector_layers(config: TransformerConfig, projector_type: str) -> MLPSubmodules:
    """The projector's linear layers.  A single linear layer gathers its output, which Transformer Engine's cannot."""
    if _uses_transformer_engine(config) and projector_type != "linear":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
