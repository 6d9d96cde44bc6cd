"""Linear layers of one tensor-parallel rank: which of them multiply their own way, and that it changes no number."""

from tests.programs import in_warm_process

LAYERS = """
from types import SimpleNamespace
from megatron_patch import device
device.install()
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.llava import Frozen, LlavaModel
from megatron_patch.model.linear import multiply_alone
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)

def layers(skip_bias_add=False, **changes):
    config = TransformerConfig(num_layers=1, hidden_size=6, num_attention_heads=2, **changes)
    common = dict(config=config, init_method=torch.nn.init.normal_, bias=True, skip_bias_add=skip_bias_add)
    return torch.nn.ModuleList([
        tensor_parallel.ColumnParallelLinear(6, 4, **common),
        tensor_parallel.RowParallelLinear(6, 4, input_is_parallel=True, **common),
    ])

def alone(module):
    return ["forward" in vars(layer) for layer in module]

"""
SAME = """
for skip_bias_add, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
    for layer in layers(skip_bias_add).requires_grad_(False).to(dtype):
        layer.bias.data.normal_()
        x = torch.randn(5, 2, 6, dtype=dtype, requires_grad=True)
        weights = torch.randn(5, 2, 4, dtype=dtype)
        results = []
        for _ in range(2):
            y, bias = layer(x)
            results.append((y, *torch.autograd.grad(y, x, weights)))
            assert (bias is layer.bias) if skip_bias_add else (bias is None)
            multiply_alone(layer, trained=False)
        assert "forward" in vars(layer)
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
print("equal")
"""
CHOSEN = """
trained, mixed, offloading = layers(), layers(), layers(cpu_offloading=True, cpu_offloading_num_layers=0)
mixed[0].requires_grad_(False)
offloading.requires_grad_(False)
for module in (trained, mixed, offloading):
    multiply_alone(module, trained=False)
    print(*alone(module))
multiply_alone(trained, trained=True)
print(*alone(trained))
parts = dict(language_model=layers(), image_newline=None, vision_model=layers(), vision_projection=layers())
LlavaModel._freeze(SimpleNamespace(**parts, frozen=Frozen(language_model=True)))
print(*(all(alone(part)) for part in parts.values() if part))
"""
TRAINED = """
from megatron_patch import kernels
from megatron_patch.model.linear import Column, Row
from megatron_patch.model.loss import head_losses

multiplied = []
kernels.product = lambda x, weight: multiplied.append(tuple(weight.shape))  # None, so that torch multiplies

def trained(own, fused=True, bias=False):
    config = TransformerConfig(
        num_layers=1, hidden_size=6, num_attention_heads=2, gradient_accumulation_fusion=fused,
        params_dtype=dtype,
    )
    common = dict(config=config, init_method=torch.nn.init.normal_, bias=bias, skip_bias_add=False)
    found = [Column(6, 4, **common), Row(6, 4, input_is_parallel=True, **common)]
    for layer in found:
        layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.zeros(4, 6), False
        layer.weight.hook_needs_no_gradient = own
    return found

for dtype in (torch.float32, torch.bfloat16):
    for own, megatrons in zip(trained(True), trained(False), strict=True):
        megatrons.weight.data.copy_(own.weight.data)
        x = torch.randn(5, 2, 6, dtype=dtype, requires_grad=True)
        weights, results = torch.randn(5, 2, 4, dtype=dtype), []
        for layer in (own, megatrons):
            for _ in range(2):  # the buffer holds what two micro-batches add
                multiplied.clear()
                x.grad = None
                y, _ = layer(x)
                y.backward(weights)
            results.append((y, x.grad, layer.weight.main_grad))
            print(*multiplied or ["Megatron's"])
        assert own.weight.grad is None
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
multiplied.clear()
column = trained(True)[0]
column.allreduce_dgrad = True
with_bias = trained(True, bias=True)[0]  # a row-parallel layer adds its own
for layer in (*trained(True, fused=False), column, with_bias):
    layer(x)
assert not multiplied
hidden, head = torch.randn(7, 6, requires_grad=True), torch.randn(9, 6)
head_losses(hidden, head, torch.arange(7), 9, mpu.get_tensor_model_parallel_group()).sum().backward()
layer = layers()[0].requires_grad_(False)
multiply_alone(layer, trained=False)
layer(hidden)[0].sum().backward()
print(*multiplied)
"""


def test_trained_layers_add_to_the_buffer_and_all_ask_for_the_faster_product() -> None:
    found = in_warm_process(LAYERS + TRAINED).splitlines()
    assert found == [*("(4, 6) (6, 4)", "Megatron's") * 4, "(9, 6) (6, 9) (4, 6) (6, 4)"]


def test_frozen_layers_give_megatrons_values_and_gradients() -> None:
    assert in_warm_process(LAYERS + SAME).split() == ["equal"]


def test_trained_layers_stay_megatrons_where_gradients_are_wanted() -> None:
    found = in_warm_process(LAYERS + CHOSEN).splitlines()
    assert found == ["False False", "True False", "False False", "True True", "True False False"]
