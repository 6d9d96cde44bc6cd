"""The CPU stand-ins change what Megatron meets, and nothing that others compute."""

from pathlib import Path

import pytest
import torch

from megatron_patch.device import cpu
from tests import tiny_models
from tests.programs import in_new_process, in_warm_process


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("avx512f avx512_bf16", ["avx512_bf16"]),
        ("amx_bf16 amx_tile", ["amx_bf16"]),
        ("avx2 avx512f", []),
        (None, []),
    ],
)
def test_bf16_instructions_are_seen(flags: str | None, found: list[str], tmp_path: Path, monkeypatch) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpu, "CPUINFO", str(tmp_path / "cpuinfo"))
    assert cpu.bf16_instructions() == found
    assert set(cpu.notes()) == (set() if found else {"PR=bf16"})


@pytest.mark.slow
def test_transformers_computes_the_same_after_install(tmp_path: Path) -> None:
    """Wrapped factories once made `with torch.device("meta")` do nothing: garbage rotary frequencies, no error."""
    from transformers import AutoModelForCausalLM

    tiny_models.make_tiny_llm(tmp_path / "llm", "llama")
    tokens = torch.arange(3, 43).view(1, 40)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")(tokens).logits
    program = """
import sys, torch
from megatron_patch import device
device.install()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(3, 43).view(1, 40)).logits.detach(), sys.argv[2])
"""
    in_new_process(program, tmp_path / "llm", tmp_path / "logits.pt")
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(found, expected)


def test_cuda_requests_land_on_the_cpu_and_availability_stays_true() -> None:
    program = """
import torch
from megatron_patch import device
device.install()
device.install()  # twice is once
assert not torch.cuda.is_available()
assert torch.zeros(3, device="cuda").device.type == "cpu"
assert torch.tensor([1.0], device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
assert torch.ones(2).cuda().to("cuda").device.type == "cpu"
assert torch.ones(2).type() == "torch.cuda.FloatTensor"
assert torch.ones(2).type(torch.float64).dtype == torch.float64
torch.cuda.manual_seed(5)
one = torch.rand(3)
torch.cuda.manual_seed(5)
assert torch.equal(one, torch.rand(3))
with torch.device("meta"):
    assert torch.empty(2).is_meta
print(device.backend().NAME, torch.cuda.device_count())
"""
    assert in_new_process(program, LOCAL_WORLD_SIZE="4").split() == ["cpu", "4"]


@pytest.mark.slow
def test_megatron_computes_with_torch_where_cuda_packages_are_installed(tmp_path: Path) -> None:
    """Transformer Engine's and Apex's norms and optimizers are CUDA kernels, which must not get CPU tensors."""
    of_te = "FusedAdam = FusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = None\n"
    for file, text in {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "",
        "transformer_engine/pytorch/optimizers.py": f"{of_te}multi_tensor_scale_tensor = None\n",
        "apex/__init__.py": "",
        "apex/optimizers.py": "FusedAdam = FusedSGD = None\n",
        "apex/multi_tensor_apply.py": "multi_tensor_applier = None\n",
        "amp_C.py": "multi_tensor_l2norm = multi_tensor_scale = None\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    program = """
from megatron_patch import device
device.install()
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
assert optimizer.Adam.__module__.startswith("torch."), optimizer.Adam
assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm, clip_grads.l2_norm_impl
assert not distrib_optimizer.HAVE_APEX_OR_TE
"""
    in_new_process(program, PYTHONPATH=str(tmp_path))


COMPILER = """
import sys, torch
from megatron_patch import device
device.install()
@torch.compile
def double(x): return 2 * x
@torch.compile(mode="default")
def square(x): return x * x
weight = torch.nn.Parameter(torch.ones(2))
for kind in (torch.optim.AdamW, torch.optim.SGD):
    optimizer = kind([weight], lr=0.5)
    optimizer.zero_grad()
    double(square(weight)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
print([round(value, 4) for value in weight.tolist()], "torch._dynamo" in sys.modules)
import torch._dynamo
"""


@pytest.mark.slow
def test_nothing_imports_the_compiler_and_who_does_finds_no_duplicates() -> None:
    # AdamW: 1 - 0.5 * 0.01 - 0.5, SGD: w - 0.5 * 4 w
    assert in_new_process(COMPILER, TORCHDYNAMO_DISABLE="1") == "[-0.495, -0.495] False\n"


def test_the_tests_see_no_gpu() -> None:
    program = "import os, tests.conftest; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert in_new_process(program, CUDA_VISIBLE_DEVICES="0") == "''\n"


@pytest.mark.slow
def test_a_missing_symbol_is_named() -> None:
    program = """
import torch, torch._dynamo
from megatron_patch import device
from megatron_patch.errors import UserError
del torch.cuda.nvtx.range_pop
try:
    device.install()
except UserError as error:
    print(error)
"""
    printed = in_new_process(program)
    assert "range_pop" in printed and "requirements.txt" in printed


def test_weight_gradients_are_added_to_the_buffer() -> None:
    """Megatron's layers find the product that Apex would bring, in 32 bits and, of 16, into a buffer of 32."""
    program = """
from megatron_patch import device
device.install()
import torch
from megatron.core.tensor_parallel import layers
assert layers._grad_accum_fusion_available
assert "--no-gradient-accumulation-fusion" not in device.megatron_arguments(False)
states, gradient = torch.arange(6.0).view(3, 2), torch.arange(12.0).view(3, 4)
for dtype in (torch.float32, torch.bfloat16):
    buffer = torch.ones(4, 2)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(states.to(dtype), gradient.to(dtype), buffer)
    assert torch.equal(buffer, 1 + gradient.t() @ states)
print("equal")
"""
    assert in_warm_process(program).split() == ["equal"]
