"""Self-attention without Transformer Engine: in few passes where the kernel does all of it, else Megatron's."""

import pytest

from megatron_patch.cpp_compiler import cpp_compiler
from tests.programs import ONLY_RANK, WITHOUT_COMPILER, in_warm_process

LAYERS = (
    ONLY_RANK
    + """
from types import SimpleNamespace
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.kernels import packed_row
from megatron_patch.model import self_attention
from megatron_patch.model.layer_specs import transformer_layer
torch.manual_seed(0)

in_one = self_attention.attention_of_mixed
taken = []
def watched(*states):
    taken.append(1)
    return in_one(*states)
self_attention.attention_of_mixed = watched

def layer(mask="causal", **changes):
    common = dict(num_layers=1, hidden_size=48, num_attention_heads=6, num_query_groups=2, attention_dropout=0.0)
    config = TransformerConfig(**common | dict(add_bias_linear=True, transformer_impl="local") | changes)
    spec = transformer_layer(config, AttnMaskType[mask]).submodules.self_attention
    found = build_module(spec, config=config, layer_number=1)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return found

def angles(length, width=8):
    return torch.rand(length, 1, 1, width // 2).mul(6).repeat(1, 1, 1, 2)

def packed(longest=18):
    starts = torch.tensor([0, 4, 4 + longest], dtype=torch.int32)
    group = mpu.get_context_parallel_group()
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, cp_group=group)

def both(layer, x, mask=None, **asked):
    \"\"\"Whether the kernel did it; outputs and gradients here and by Megatron's own forward pass.\"\"\"
    results = []
    taken.clear()
    for forward in (layer, lambda *args, **asked: SelfAttention.forward(layer, *args, **asked)):
        torch.manual_seed(1)  # of dropout and of the weights below
        layer.zero_grad()
        x.grad = None
        y, bias = forward(x, mask, **asked)
        y.backward(torch.randn(y.shape).to(y.dtype))
        results.append([y, x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)])
    return len(taken), results

"""
)
SAME = """
def compare(dtype, tolerance, attention, *shape, **asked):
    x = torch.randn(shape).to(dtype).requires_grad_()
    count, (ours, megatrons) = both(attention.to(dtype), x, **asked)
    assert count == 1 and ours[0].dtype == dtype
    for one, other in zip(ours, megatrons, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())

for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
    for mask, changes, turned in (
        ("causal", {}, True), ("no_mask", dict(num_query_groups=6), False), ("causal", dict(softmax_scale=0.7), True)
    ):
        turning = angles(11) if turned else None
        compare(dtype, tolerance, layer(mask, **changes), 11, 3, 48, rotary_pos_emb=turning)
    compare(dtype, tolerance, layer(), 22, 1, 48, rotary_pos_emb=angles(18), packed_seq_params=packed())
print("same")
"""
CHOSEN = """
def asked(name, attention, turning=None, mask=None, **rest):
    length = rest.pop("length", 11)
    x = torch.randn(length, 2, 48, dtype=rest.pop("dtype", torch.float32)).requires_grad_()
    turning = angles(length) if turning is None else turning
    count, (ours, megatrons) = both(attention, x, mask, rotary_pos_emb=turning, **rest)
    same = all(torch.allclose(one, other, atol=1e-4) for one, other in zip(ours, megatrons, strict=True))
    print(name, count, same)

asked("plain", layer())
asked("longest", layer(), length=1024)
asked("longer", layer(), length=1025)
asked("masked", layer(), mask=torch.ones(1, 1, 11, 11, dtype=torch.bool).triu(2))
asked("something_else", layer(), sequence_len_offset=torch.tensor([0]))
asked("heads_normed", layer(qk_layernorm=True))
asked("interleaved", layer(rotary_interleaved=True))
asked("half_turned", layer(), angles(11, 4))
asked("of_each_record", layer(), torch.rand(11, 2, 1, 8))
asked("no_positions", layer(no_rope_freq=[1]))
asked("scores_again", layer(recompute_granularity="selective", recompute_modules=["core_attn"]))
asked("64_bits", layer().double(), dtype=torch.float64)
dropping = layer()
dropping.core_attention.dropout = 0.5
asked("dropout", dropping)
asked("no_dropout_now", dropping.eval())
x = torch.randn(22, 1, 48, requires_grad=True)
for name in ("apply_rope_fusion", "mrope_section", "attention_output_gate", "fine_grained_activation_offloading"):
    of_others = layer()
    setattr(of_others.config, name, True)
    print(name, int(of_others._in_few_passes(x, angles(22), None)))
of_yarn = layer()
of_yarn._yarn_concentration_factor = 1.2
print("longer_than_trained", int(of_yarn._in_few_passes(x, angles(22), None)))
print("packed", both(layer(), x, rotary_pos_emb=angles(18), packed_seq_params=packed())[0])
of_all = torch.randn(1029, 1, 48, requires_grad=True)
print("packed_longer", both(layer(), of_all, rotary_pos_emb=angles(1025), packed_seq_params=packed(1025))[0])
ranks = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
of_two = layer()
of_two.core_attention.context_group = ranks
print("context_ranks", int(of_two._in_few_passes(x, angles(22), None)))
answering = layer()
answering.core_attention.cache = object()
print("cached", int(answering._in_few_passes(x, angles(22), None)))
seeing_all = layer("no_mask")
print("packed_not_causal", int(seeing_all._in_few_passes(x, angles(18), packed_row(packed().cu_seqlens_q))))
shared = layer()
shared.world_size = 4
print("groups_of_several_ranks", int(shared._in_few_passes(x, angles(22), None)))
"""
IN_FEW_PASSES = {"plain", "longest", "no_dropout_now", "packed"}
needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")


@needs_compiler
def test_values_and_gradients_are_those_of_megatrons_own_steps() -> None:
    assert in_warm_process(LAYERS + SAME).split() == ["same"]


@needs_compiler
def test_what_the_kernel_does_not_do_is_megatrons() -> None:
    lines = [line.split() for line in in_warm_process(LAYERS + CHOSEN).splitlines()]
    assert {name for name, count, *_ in lines if count == "1"} == IN_FEW_PASSES
    assert len(lines) == 25 and all(same == "True" for _, _, same in lines[:14])


def test_without_a_compiler_it_is_megatrons() -> None:
    program = LAYERS + "print(both(layer(), torch.randn(11, 2, 48, requires_grad=True), rotary_pos_emb=angles(11))[0])"
    assert in_warm_process(program, **WITHOUT_COMPILER).split() == ["0"]
