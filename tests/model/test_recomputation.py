"""What a backward pass computes again: it holds less, and changes no bit."""

from tests.programs import WITH_AND_WITHOUT_COMPILER, in_warm_process

MODEL = """
from contextlib import nullcontext
from megatron_patch import device
device.install()
import torch
from torch.autograd.profiler import profile
from megatron.core import mpu, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model import linear
from megatron_patch.model.layer_specs import decoder_block
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
LAYERS, H, F, S, B = 3, 64, 160, 32, 8
config = TransformerConfig(
    num_layers=LAYERS, hidden_size=H, ffn_hidden_size=F, num_attention_heads=2, normalization="RMSNorm",
    add_bias_linear=False, transformer_impl="local", gated_linear_unit=True, bias_dropout_fusion=False,
    activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
)
model = GPTModel(config, decoder_block(config), vocab_size=32, max_sequence_length=S, position_embedding_type="rope")
for weight in model.parameters():
    weight.hook_needs_no_gradient = True  # as patches.hooks_without_gradients sets it
places = torch.arange(S)[None]
tokens = torch.randint(32, (B, S))
kept, results = [], []

def forward():
    return model(tokens, places, None)

forward()  # tables of positions stay
for context in (linear.not_keeping, lambda state: nullcontext()):
    linear.not_keeping = context
    with profile(profile_memory=True) as profiled:
        logits = forward()
    kept.append(sum(event.self_cpu_memory_usage for event in profiled.function_events))
    model.zero_grad()
    logits.square().sum().backward()
    results.append([logits, *(weight.grad for weight in model.parameters())])
assert len(results[0]) == 3 + 6 * LAYERS + 1
print(all(torch.equal(one, other) for one, other in zip(*results, strict=True)))
print(kept[1] - kept[0], LAYERS * S * B * (2 * H + F) * 4)  # two norms and SwiGLU, fp32
"""


@WITH_AND_WITHOUT_COMPILER
def test_neither_norms_nor_swiglu_are_held_and_no_bit_changes(environment: dict[str, str]) -> None:
    equal, bytes_less = in_warm_process(MODEL, **environment).splitlines()
    less, expected = map(int, bytes_less.split())
    assert equal == "True"
    assert less == expected


PARTS = """
import torch
from megatron_patch.model.recomputation import not_keeping, recomputable

calls = []

def doubled(x):
    calls.append(x)
    return 2 * x

def gradients(loss):
    for state in (x, matrix):
        state.grad = None
    loss.sum().backward()
    return x.grad, matrix.grad

x, matrix = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
# what is multiplied -> whether it is the whole state, as it lies, which is computed again
for product, again in (
    (lambda state: state @ matrix.t(), True),
    (lambda state: state.view(6, 4) @ matrix, True),
    (lambda state: state.t() @ matrix, False),
    (lambda state: state[:2] @ matrix.t(), False),
    (lambda state: (state + 1) @ matrix.t(), False),
):
    calls.clear()
    state = recomputable(doubled, x)
    with not_keeping(state):
        loss = product(state)
    found = gradients(loss)
    assert len(calls) == 1 + again, calls
    assert all(torch.equal(one, other) for one, other in zip(found, gradients(product(2 * x)), strict=True))
with torch.no_grad():
    assert not hasattr(recomputable(doubled, x), "recompute")  # x would live as long as the result
state = 2 * x
with not_keeping(state):  # one without a mark
    loss = state @ matrix.t()
gradients(loss)
print("right")
"""


def test_the_state_alone_is_replaced() -> None:
    assert in_warm_process(PARTS).split() == ["right"]


OFFLOADED = """
from megatron_patch import device
device.install()
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.linear import Column, Row
from megatron_patch.model.recomputation import recomputable
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
for offloading, without_gradient in ((False, True), (True, True), (False, False)):
    config = TransformerConfig(
        num_layers=1, hidden_size=6, num_attention_heads=2, cpu_offloading=offloading, cpu_offloading_num_layers=0
    )
    common = dict(config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False)
    for layer in (Column(6, 4, **common), Row(6, 4, input_is_parallel=True, **common)):
        layer.weight.hook_needs_no_gradient = without_gradient
        state, given = recomputable(torch.square, torch.randn(5, 2, 6, requires_grad=True)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: given.append(saved) or saved, lambda saved: saved):
            layer(state)
        print(any(saved.data_ptr() == state.data_ptr() for saved in given))
"""


def test_what_is_to_be_offloaded_or_whose_gradient_is_wanted_is_kept() -> None:
    assert in_warm_process(OFFLOADED).split() == ["False", "False", "True", "True", "True", "True"]


ADAPTED = """
from megatron_patch import device
device.install()
import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.lora import Linear, LoraConfig
from megatron_patch.model.adapters import LinearAdapter
from megatron_patch.model.recomputation import recomputable
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
config = TransformerConfig(num_layers=1, hidden_size=6, num_attention_heads=2)
held = [Linear("self_attention.linear_qkv", "self_attn.q_proj", 6, 6)]
adapter = LinearAdapter(held, held, LoraConfig(2, 4.0), 1, config, mpu.get_tensor_model_parallel_group())
for weight in adapter.parameters():
    torch.nn.init.normal_(weight)
calls = []
def state_of(x):
    calls.append(x)
    return 2 * x
x = torch.randn(5, 2, 6, requires_grad=True)
adapter(recomputable(state_of, x)).sum().backward()
found = [weight.grad for weight in adapter.parameters()]
print(len(calls))
adapter.zero_grad()
adapter(2 * x).sum().backward()
print(all(torch.equal(one, weight.grad) for one, weight in zip(found, adapter.parameters(), strict=True)))
"""


def test_adapters_hold_no_input_either() -> None:
    assert in_warm_process(ADAPTED).split() == ["2", "True"]
