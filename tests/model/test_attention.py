"""The attention of layers without Transformer Engine."""

import pytest

from megatron_patch.cpp_compiler import cpp_compiler
from tests.programs import WITHOUT_COMPILER, in_warm_process


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


@pytest.mark.parametrize(
    ("environment", "longest"),
    [
        pytest.param({}, 1024, marks=pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")),
        (WITHOUT_COMPILER, 128),
    ],
    ids=["compiled", "multiplied"],
)
def test_torchs_attention_is_for_longer_records(environment: dict[str, str], longest: int) -> None:
    """Values and gradients are the formula's in 64 bits, on both sides of the limit, causal or not, grouped or not."""
    program = """
from types import SimpleNamespace
from megatron_patch import device
device.install()
import torch
from torch.nn import functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.attention import ScaledDotProductAttention

def formula(query, key, value, scale, causal):
    query, key, value = (states.double().permute(1, 2, 0, 3) for states in (query, key, value))
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)

torchs, called = F.scaled_dot_product_attention, []
def watched(*states, **rest):
    called.append(states)
    return torchs(*states, **rest)
F.scaled_dot_product_attention = watched
import sys
longest = int(sys.argv[1])
torch.manual_seed(0)
for length in (3, longest, longest + 1):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for mask, groups, scale in (("causal", 2, None), ("no_mask", 4, 0.5)):
            config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=groups)
            kind = AttnMaskType[mask]
            attention = ScaledDotProductAttention(
                config, 1, kind, "self", 0.0, scale, pg_collection=SimpleNamespace(tp=None, cp=None)
            )
            shapes = ((length, 2, heads, 8) for heads in (4, groups, groups))
            states = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
            called.clear()
            found = attention(*states, None)
            assert found.dtype == dtype and bool(called) == (length > longest), (length, len(called))
            expected = formula(*states, scale or 8**-0.5, mask == "causal")
            weights = torch.randn(found.shape)
            ours = torch.autograd.grad(found, states, weights.to(dtype))
            theirs = torch.autograd.grad(expected, states, weights.double())
            for one, other in zip((found, *ours), (expected, *theirs), strict=True):
                torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
    print(length)
"""
    lengths = ["3", str(longest), str(longest + 1)]
    assert in_warm_process(program, longest, **environment).split() == lengths


@pytest.mark.parametrize(
    ("environment", "calls"),
    [
        pytest.param({}, ["1", "1", "0"], marks=pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")),
        (WITHOUT_COMPILER, ["0", "0", "0"]),
    ],
    ids=["compiled", "torch"],
)
def test_packed_records_are_attended_each_by_itself(environment: dict[str, str], calls: list[str]) -> None:
    """Values and gradients are those of each record alone; by one call of the kernel where it takes the longest."""
    program = """
from types import SimpleNamespace
from megatron_patch import device
device.install()
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch import kernels
from megatron_patch.model.attention import ScaledDotProductAttention
config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2)
attention = ScaledDotProductAttention(
    config, 1, AttnMaskType.causal, "self", 0.0, pg_collection=SimpleNamespace(tp=None, cp=None)
)
kernel, called = kernels.attention, []
def watched(*given):
    found = kernel(*given)
    called.extend([1] if given[-1] is not None and found is not None else [])
    return found
kernels.attention = watched
for lengths in ([7, 30, 2], [1024, 9], [1025, 9]):
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    states = [torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(sum(lengths), 32)
    called.clear()
    found = attention(*states, None, packed_seq_params=packed)
    print(len(called))
    records = zip(*(state.split(lengths) for state in states))
    expected = torch.cat([attention(*(part[:, None] for part in record), None)[:, 0] for record in records])
    ours, theirs = ([made, *torch.autograd.grad(made, states, weights)] for made in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
"""
    assert in_warm_process(program, **environment).split() == calls
