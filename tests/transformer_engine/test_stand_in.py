"""The stand-in computes what torch computes, forward and backward; and it takes what the compiled module takes."""

import inspect
import re

import pytest
import torch
from torch.nn import functional as F

from tests.transformer_engine import fetch, stand_in

FP32 = stand_in.DType.kFloat32
EPS = 1e-5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Of a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(A: torch.Tensor, transA: bool, B: torch.Tensor, transB: bool, **given: object) -> list:
    """generic_gemm in fp32 with the arguments that Transformer Engine's gemm.py gives beside these."""
    workspace = torch.empty(1)
    rest = {"D": None, "bias": None, "grad": False, "accumulate": False} | given
    return stand_in.generic_gemm(
        *(A, transA, B, transB, rest["D"], None, FP32, rest["bias"], FP32, False, None, rest["grad"]),
        *(workspace, 1, rest["accumulate"], False),
        beta=1.0 if rest["accumulate"] else 0.0,
    )


def test_products_are_those_of_a_linear_layer() -> None:
    """[O, I] = [6, 5], three rows of two records; `accumulate` adds to what D holds, in D."""
    weight, bias, inputs, gradient = drawn(6, 5), drawn(6, seed=1), drawn(3, 2, 5, seed=2), drawn(3, 2, 6, seed=3)
    for tensor in (weight, bias, inputs):
        tensor.requires_grad_()
    outputs = F.linear(inputs, weight, bias)
    outputs.backward(gradient)
    with torch.no_grad():
        torch.testing.assert_close(product(weight, True, inputs, False, bias=bias)[0], outputs)
        torch.testing.assert_close(product(weight, False, gradient, False, grad=True)[0], inputs.grad)
        main = torch.ones(6, 5)
        found, of_bias, *_ = product(inputs, False, gradient, True, grad=True, D=main, bias=bias, accumulate=True)
    assert found is main
    torch.testing.assert_close(main, weight.grad + 1)
    torch.testing.assert_close(of_bias, bias.grad)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_are_those_of_torch(kind: str, zero_centered: bool) -> None:
    inputs, weight, bias, gradient = drawn(4, 3, 8), drawn(8, seed=1), drawn(8, seed=2), drawn(4, 3, 8, seed=3)
    for tensor in (inputs, weight, bias):
        tensor.requires_grad_()
    gain = weight + 1 if zero_centered else weight
    if kind == "LayerNorm":
        outputs = F.layer_norm(inputs, (8,), gain, bias, EPS)
    else:
        outputs = F.rms_norm(inputs, (8,), gain, EPS)
    outputs.backward(gradient)
    with torch.no_grad():
        if kind == "LayerNorm":
            found, mu, rsigma = stand_in.layernorm_fwd(inputs, weight, bias, EPS, None, None, FP32, 0, zero_centered)
            gradients = stand_in.layernorm_bwd(gradient, inputs, mu, rsigma, weight, 0, zero_centered)
            expected = (inputs.grad, weight.grad, bias.grad)
        else:
            found, _, rsigma = stand_in.rmsnorm_fwd(inputs, weight, EPS, None, None, FP32, 0, zero_centered)
            gradients = stand_in.rmsnorm_bwd(gradient, inputs, rsigma, weight, 0, zero_centered)
            expected = (inputs.grad, weight.grad)
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(tuple(gradients), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_is_that_of_torch(masked: bool) -> None:
    """In bf16, whose results are rounded once: 2^-8 relative."""
    scores, gradient = (drawn(2, 4, 16, 16, seed=seed).bfloat16() for seed in (0, 1))
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1) if masked else torch.zeros(16, 16, dtype=torch.bool)
    exact = scores.double().requires_grad_()
    expected = (exact * 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    expected.backward(gradient.double())
    if masked:
        found = stand_in.scaled_aligned_causal_masked_softmax_forward(scores, 0.5)
        flat = stand_in.scaled_upper_triang_masked_softmax_forward(scores.flatten(0, 1), 0.5)
        given = stand_in.scaled_masked_softmax_forward(scores, hidden[None, None], 0.5)
        assert torch.equal(found, flat.view_as(found)) and torch.equal(found, given)
    else:
        found = stand_in.scaled_softmax_forward(scores, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)
    back = stand_in.scaled_softmax_backward(gradient, found, 0.5)
    torch.testing.assert_close(back.double(), exact.grad, rtol=2**-7, atol=2**-8)


def test_rotary_embedding_is_a_turn_and_its_gradient_the_turn_back() -> None:
    """Complex numbers say it independently: the halves of a head are real and imaginary parts."""
    states, angles = drawn(7, 2, 3, 12), drawn(9, 4, seed=1)  # the last four of twelve widths are not turned
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None]
    sbhd, thd = stand_in.NVTE_QKV_Format.NVTE_SBHD, stand_in.NVTE_QKV_Format.NVTE_THD
    found = stand_in.fused_rope_forward(states, freqs, None, sbhd, False, None, 1, 0)
    turned = torch.complex(states[..., :4], states[..., 4:8]) * torch.polar(torch.ones(7, 4), angles[:7])[:, None, None]
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag, states[..., 8:]], dim=-1))
    torch.testing.assert_close(stand_in.fused_rope_backward(found, freqs, None, sbhd, False, None, 1, 0), states)
    records = torch.tensor([0, 3, 7], dtype=torch.int32)  # positions of a packed record start anew
    packed = stand_in.fused_rope_forward(states[:, 0], freqs, None, thd, False, records, 1, 0)
    second = stand_in.fused_rope_forward(states[3:], freqs, None, sbhd, False, None, 1, 0)
    torch.testing.assert_close(packed, torch.cat([found[:3, 0], second[:, 0]]))


def test_packed_records_are_spread_and_packed_again() -> None:
    packed, records = drawn(7, 2, 4), torch.tensor([0, 3, 7], dtype=torch.int32)
    rows = stand_in.convert_thd_to_bshd(packed, records, 2, 5)
    assert torch.equal(rows[0, :3], packed[:3]) and torch.equal(rows[1, :4], packed[3:])
    assert not rows[0, 3:].any() and not rows[1, 4:].any()
    assert torch.equal(stand_in.convert_bshd_to_thd(rows, records, 7), packed)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_adam_is_that_of_torch(kind: type[torch.optim.Optimizer]) -> None:
    """Three steps; a bf16 parameter is its fp32 master, rounded."""
    theirs = torch.nn.Parameter(drawn(5, 3))
    optimizer = kind([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    master, first, second = theirs.detach().clone(), torch.zeros(5, 3), torch.zeros(5, 3)
    rounded = master.bfloat16()
    for step in (1, 2, 3):
        theirs.grad = drawn(5, 3, seed=step)
        optimizer.step()
        lists = [[theirs.grad], [rounded], [first], [second], [master]]
        mode = int(kind is torch.optim.AdamW)
        stand_in.multi_tensor_adam(1, torch.zeros(1), lists, 0.1, 0.8, 0.9, 1e-3, step, mode, 1, 0.2)
    torch.testing.assert_close(master, theirs.detach())
    assert torch.equal(rounded, master.bfloat16())


def test_norms_and_scales_of_lists() -> None:
    tensors, target, flag = [drawn(5), drawn(2, 3, seed=1)], [torch.empty(5), torch.empty(2, 3)], torch.zeros(1)
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    norm, each = stand_in.multi_tensor_l2norm(1, flag, [tensors], True)
    torch.testing.assert_close(norm, whole.norm()[None])
    torch.testing.assert_close(each, torch.stack([tensor.norm() for tensor in tensors]))
    stand_in.multi_tensor_scale_tensor(1, flag, [tensors, target], torch.tensor([0.5]))
    assert torch.equal(target[1], tensors[1] * 0.5) and not flag
    stand_in.multi_tensor_scale(1, flag, [[torch.tensor([1.0, float("inf")])], [torch.empty(2)]], 1.0)
    assert flag


# ---------------------------------------------------------------- what the compiled module takes


@pytest.fixture(scope="module")
def bindings() -> tuple[str, str]:
    """pybind.cpp and the headers of the compiled module, without comments."""
    try:
        source = fetch.source_files()
    except FileNotFoundError as error:
        pytest.skip(f"{fetch.SOURCE} cannot be fetched from the package registry: {error}")
    (pybind,) = source.rglob("csrc/extensions/pybind.cpp")
    texts = [path.read_text() for path in (pybind, *sorted(source.rglob("*.h")))]
    texts = [re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL) for text in texts]
    return texts[0], "\n".join(texts[1:])


def declared(function: str, headers: str) -> list[str]:
    """The parameters of a C++ function."""
    found = re.search(rf"\b{function}\s*\(([^;{{]*?)\)\s*;", headers, re.DOTALL)
    assert found, f"no header declares {function}"
    given = found[1]
    while "<" in given:
        given = re.sub(r"<[^<>]*>", "", given)
    return [part for part in given.split(",") if part.strip() not in ("", "void")]


FUNCTIONS = [name for name, value in vars(stand_in).items() if inspect.isfunction(value) and name[0] != "_"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_those_of_the_compiled_module(name: str, bindings: tuple[str, str]) -> None:
    """As many in the same order; by the same names where Python may give them by name."""
    pybind, headers = bindings
    bound = re.search(rf'm\.def\("{name}",\s*&?([\w:]+)(.*?)\);\n', pybind, re.DOTALL)
    assert bound, f"the compiled module has no {name}"
    by_name = re.findall(r'py::arg\("(\w+)"\)', bound[2])
    parameters = inspect.signature(getattr(stand_in, name)).parameters
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        return
    if by_name:
        assert list(parameters) == by_name
    else:
        assert len(parameters) == len(declared(bound[1].rpartition("::")[2], headers))


ENUMS = [name for name, value in vars(stand_in).items() if isinstance(value, type) and hasattr(value, "__members__")]


@pytest.mark.parametrize("name", ENUMS)
def test_values_of_enums_are_those_of_the_headers(name: str, bindings: tuple[str, str]) -> None:
    _, headers = bindings
    body = re.search(rf"enum (?:class )?{name} \{{(.*?)\}}|enum \{{([^}}]*)\}} {name};", headers, re.DOTALL)
    assert body, f"no header has an enum {name}"
    written = {
        member.removeprefix("NVTE_ROUTING_MAP_FORMAT_"): int(value)
        for member, value in re.findall(r"(\w+)\s*=\s*(-?\d+)", body[1] or body[2])
    }
    found = {member.name: int(member) for member in getattr(stand_in, name)}
    common = found.keys() & written.keys()
    assert len(common) >= len(found) - 1 and all(found[member] == written[member] for member in common)
