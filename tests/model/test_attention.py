"""The attention of layers without Transformer Engine."""

from tests.programs import in_warm_process


def test_grouped_queries_under_a_mask_are_spread_exactly() -> None:
    """torch's fast CUDA kernels take one of the two; what the expansion computes is what torch computes for both."""
    program = """
from types import SimpleNamespace
from megatron_patch import device
device.install()
import torch
from torch.nn import functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.attention import ScaledDotProductAttention
config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=8, num_query_groups=2)
groups = SimpleNamespace(tp=None, cp=None)
attention = ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self", 0.0, pg_collection=groups)
query, key, value = torch.randn(12, 3, 8, 8), torch.randn(12, 3, 2, 8), torch.randn(12, 3, 2, 8)
masked = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
q, k, v = (states.permute(1, 2, 0, 3) for states in (query, key, value))
expected = F.scaled_dot_product_attention(q, k, v, attn_mask=~masked, enable_gqa=True)
torchs = F.scaled_dot_product_attention
def watched(*states, enable_gqa, **rest):
    print("grouped" if enable_gqa or states[0].shape[1] != states[1].shape[1] else "spread")
    return torchs(*states, enable_gqa=enable_gqa, **rest)
F.scaled_dot_product_attention = watched
found = attention(query, key, value, masked)
print(torch.equal(found, expected.permute(2, 0, 1, 3).flatten(2)))
"""
    assert in_warm_process(program).split() == ["spread", "True"]
