"""What stands between the products, against torch's own operators: values and gradients."""

import pytest

from megatron_patch.cpp_compiler import cpp_compiler
from tests.programs import WITH_AND_WITHOUT_COMPILER, WITHOUT_COMPILER, in_warm_process

NORM = """
from megatron_patch import device
device.install()
import torch
from megatron_patch.model.elementwise import RMSNorm
torch.manual_seed(0)
# bf16: torch's is computed in 32 bits; ours is too, and rounds its results and gradients once
for dtype, trained in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
    x = torch.randn(7, 3, 48).to(dtype).requires_grad_()
    weights = torch.randn(7, 3, 48).to(dtype)
    ours, theirs = RMSNorm(48, eps=1e-3).to(dtype), torch.nn.RMSNorm(48, eps=1e-3)
    for norm in (ours, theirs):
        norm.weight.data = torch.linspace(0.5, 2, 48).to(dtype)
        norm.requires_grad_(trained)
    if dtype == torch.bfloat16:
        theirs.float()
    found, expected = ours(x), theirs(x.to(theirs.weight.dtype))
    assert type(found.grad_fn).__name__ == "_RMSNormBackward" and found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
    asked = [[x, *([norm.weight] if trained else [])] for norm in (ours, theirs)]
    outputs = zip((found, expected), asked, strict=True)
    gradients = [torch.autograd.grad(y, of, weights.to(y.dtype)) for y, of in outputs]
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(one.to(other.dtype), other, rtol=tolerance, atol=tolerance)
print("equal")
"""
SWIGLU = """
from megatron_patch import device
device.install()
import torch
from megatron_patch.model.elementwise import SwiGLU
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(5, 2, 24, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda state: kept.append(state) or state, lambda state: state):
        found = SwiGLU()(x)
    assert [state.data_ptr() for state in kept] == [x.data_ptr()]  # nothing else is held for the backward pass
    gate, up = x.chunk(2, -1)
    gate, up = (half.float() for half in (gate, up))  # in 16 bits torch rounds silu too, the compiled one does not
    expected = torch.nn.functional.silu(gate) * up
    weights = torch.randn_like(expected).to(dtype)
    gradients = [torch.autograd.grad(value, x, weights.to(value.dtype))[0] for value in (found, expected)]
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    for one, other in ((found, expected), gradients):
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)
print("equal")
"""


@WITH_AND_WITHOUT_COMPILER
def test_norm_is_torchs(environment: dict[str, str]) -> None:
    assert in_warm_process(NORM, **environment).split() == ["equal"]


@WITH_AND_WITHOUT_COMPILER
def test_swiglu_is_torchs_and_keeps_its_input_alone(environment: dict[str, str]) -> None:
    assert in_warm_process(SWIGLU, **environment).split() == ["equal"]


LAYERS = """
from megatron_patch import device
device.install()
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.layer_specs import decoder_block
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, normalization="RMSNorm", add_bias_linear=False,
    transformer_impl="local", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
)
model = GPTModel(config, decoder_block(config), vocab_size=32, max_sequence_length=8)
layer = model.decoder.layers[0]
for part in (layer.input_layernorm, layer.mlp.activation_func, model.decoder.final_layernorm):
    print(type(part).__module__, type(part).__name__)
assert not config.use_te_activation_func  # the caller's config stays as it is
"""


def test_layers_are_built_of_them() -> None:
    ours = "megatron_patch.model.elementwise"
    assert in_warm_process(LAYERS).splitlines() == [f"{ours} RMSNorm", f"{ours} SwiGLU", f"{ours} RMSNorm"]


STEP = """
from megatron_patch import device
device.install()
from megatron_patch import patches
patches.apply_all("cpu")
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch import kernels
from megatron_patch.model.layer_specs import decoder_block
from megatron_patch.model.loss import head_losses
done = set()
def watched(name, kernel):
    def call(*arguments):
        found = kernel(*arguments)
        if found is not None and found is not False or name == "attention_backward":  # which writes what it found
            done.add(name)
        return found
    return call
names = "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotate", "attention", "attention_backward"
for name in (*names, "row_largest", "exponentials", "add"):
    setattr(kernels, name, watched(name, getattr(kernels, name)))
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, normalization="RMSNorm", add_bias_linear=False, bf16=True,
    params_dtype=torch.bfloat16, transformer_impl="local", gated_linear_unit=True, gradient_accumulation_fusion=True,
    activation_func=torch.nn.functional.silu, bias_dropout_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
)
model = GPTModel(
    config, decoder_block(config), vocab_size=32, max_sequence_length=8, position_embedding_type="rope"
).bfloat16()
model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
tokens = torch.arange(8)[None]
starts = torch.tensor([0, 3, 8], dtype=torch.int32)
packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=5, max_seqlen_kv=5)
masked = model(tokens, tokens, torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1))  # turned apart from attention
hidden = (model(tokens, tokens, None) + masked + model(tokens, tokens, None, packed_seq_params=packed)).float()
# Logits, taken for hidden states of a head.
head_losses(hidden[0], torch.randn(40, 32), tokens[0], 40, mpu.get_tensor_model_parallel_group()).sum().backward()
print(*sorted(done))
"""


@pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")
def test_a_step_takes_every_kernel() -> None:
    of_layer = {
        "attention",
        "attention_backward",
        "rms_norm",
        "rms_norm_backward",
        "rotate",
        "swiglu",
        "swiglu_backward",
    }
    assert set(in_warm_process(STEP).splitlines()[-1].split()) == {*of_layer, "row_largest", "exponentials", "add"}


def test_a_step_without_a_compiler_takes_none() -> None:
    assert in_warm_process(STEP, **WITHOUT_COMPILER).splitlines()[-1:] == [""]
