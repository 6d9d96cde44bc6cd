"""The compiled kernels against the formulas in 64 bits: values and gradients, both dtypes, in one and two threads."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_patch import kernels
from megatron_patch.cpp_compiler import cpp_compiler
from megatron_patch.kernels import build

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")

# Relative to the largest value: sums of some hundred terms in 24 bits; one rounding to 8 bits.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request) -> None:
    """With 40 x 576 elements both threads have work."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def states(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def check(formula: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor, found: list[Tensor]) -> None:
    """found: the kernels' value, then the gradients of the inputs under the weights."""
    inputs = [state.double().requires_grad_() for state in inputs]
    value = formula(*inputs)
    expected = [value, *torch.autograd.grad(value, inputs, weights.double())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == weights.dtype and one.shape == other.shape
        difference = (one.double() - other).abs().max() / other.abs().max()
        assert difference < TOLERANCE[weights.dtype], difference


@DTYPES
@pytest.mark.parametrize("shape", [(5, 8, 576), (3, 2, 17), (1, 1, 3)], ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, gradient = states(*shape, dtype=dtype), states(shape[-1], dtype=dtype), states(*shape, dtype=dtype)
    found, scales = kernels.rms_norm(x, weight, 1e-3)
    gradients = kernels.rms_norm_backward(x, weight, scales, gradient, True, True)
    formula = functools.partial(torch.nn.functional.rms_norm, normalized_shape=shape[-1:], eps=1e-3)
    check(lambda x, weight: formula(x, weight=weight), [x, weight], gradient, [found, *gradients])
    alone = kernels.rms_norm_backward(x, weight, scales, gradient, True, False)
    assert torch.equal(alone[0], gradients[0]) and alone[1] is None
    assert kernels.rms_norm_backward(x, weight, scales, gradient, False, True)[0] is None


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Be one whose maker Linux names so."""
    monkeypatch.setattr(build, "CPUINFO", tmp_path / "cpuinfo")

    def become(maker: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        kernels._mkl_is_slower.cache_clear()

    kernels._mkl_is_slower.cache_clear()
    yield become
    kernels._mkl_is_slower.cache_clear()


def test_product(processor: Callable[[str], None]) -> None:
    """128 rows of 512 x 1,100: 72 million products, more than the 67 from which on it pays."""
    x, weight, gradient = (states(*shape, dtype=torch.float32) for shape in ((64, 2, 512), (1100, 512), (64, 2, 1100)))
    assert kernels.product(x, weight) is None  # no file names a processor
    processor("GenuineIntel")
    assert kernels.product(x, weight) is None
    processor("AuthenticAMD")
    found = [kernels.product(x, weight), kernels.product(gradient, weight.t())]
    check(lambda x: x @ weight.t().double(), [x], gradient, found)
    assert kernels.product(x, weight[:1000]) is None
    assert kernels.product(x[:31], weight.repeat(3, 1)) is None  # 62 rows
    assert kernels.product(x.bfloat16(), weight.bfloat16()) is None
    assert kernels.product(x, weight.bfloat16()) is None


@DTYPES
def test_swiglu(dtype: torch.dtype) -> None:
    x, gradient = states(40, 1, 2 * 501, dtype=dtype) * 5, states(40, 1, 501, dtype=dtype)
    x[0, 0, :6] = torch.tensor([-100.0, 100, -88, 88, -1000, 0])  # silu there is 0 or the gate itself
    found = kernels.swiglu(x)
    assert found[0, 0, :1].abs().item() < 1e-30
    formula = lambda x: torch.nn.functional.silu(x[..., :501]) * x[..., 501:]  # noqa: E731
    check(formula, [x], gradient, [found, kernels.swiglu_backward(x, gradient)])


def turn(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Halves of a head against each other; the tables as they are broadcast to [..., d / 2]."""
    first, second = states.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def tables(length: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(length, half) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


@DTYPES
def test_rotation_of_heads_that_lie_apart(dtype: torch.dtype) -> None:
    mixed = states(24, 3, 7, 70, dtype=dtype)
    queries, gradient = mixed[:, :, 1:6, :64], states(24, 3, 5, 64, dtype=dtype)
    cosine, sine = tables(24, 32, dtype)
    found = kernels.rotate(queries, cosine, sine, 1)
    back = kernels.rotate(gradient, cosine, sine, -1)
    check(lambda heads: turn(heads, cosine[:, None, None], sine[:, None, None]), [queries], gradient, [found, back])
    assert kernels.rotate(queries, cosine.double(), sine, 1) is None
    of_each_record = cosine[:, None].repeat(1, 3, 1)
    assert kernels.rotate(queries, of_each_record, of_each_record, 1) is None


def query_key_value(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mixed [S, B, groups, heads of a group + 2, d]."""
    return mixed[..., :-2, :], mixed[..., -2, :], mixed[..., -1, :]


def test_tables_of_an_answer_serve_training_too() -> None:
    """A model answers in inference mode and then trains on, with the angles that it has kept."""
    angles = torch.rand(5, 1, 1, 8).repeat(1, 1, 1, 2)
    with torch.inference_mode():
        kernels.rotation_tables(angles, torch.float32)
    cosine, sine = kernels.rotation_tables(angles, torch.float32)
    assert not cosine.is_inference() and not sine.is_inference()
    torch.testing.assert_close((cosine, sine), (angles[..., :8].cos(), angles[..., :8].sin()))


@DTYPES
@pytest.mark.parametrize("turned", [True, False], ids=["turned", "as they are"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(
    ("length", "records", "groups", "each", "width"),
    [(56, 2, 2, 3, 64), (13, 2, 4, 1, 20), (1, 1, 1, 2, 8), (7, 1, 1, 3, 16), (150, 1, 1, 2, 48)],
)
def test_attention(
    length: int, records: int, groups: int, each: int, width: int, causal: bool, turned: bool, dtype: torch.dtype
) -> None:
    """Heads beside each other as a layer's projection leaves them, and a gradient whose last dimension is not last."""
    mixed = states(length, records, groups, each + 2, width, dtype=dtype)
    parts = query_key_value(mixed)
    gradient = states(length, records, groups, width, each, dtype=dtype).transpose(3, 4)
    rotation = tables(length, width // 2, dtype) if turned else None

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (state.movedim(0, -2) for state in (query, key[..., None, :], value[..., None, :]))
        if turned:
            query, key = (turn(state, *rotation) for state in (query, key))
        scores = query @ key.transpose(-1, -2) * 0.3
        if causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ value).movedim(-2, 0)

    found, logarithms = kernels.attention(*parts, 0.3, causal, rotation)
    assert logarithms.shape == (records, groups, each, length)
    of_mixed = torch.full_like(mixed, float("nan"))
    of_parts = query_key_value(of_mixed)
    kernels.attention_backward(*parts, 0.3, causal, rotation, logarithms, gradient, of_parts)
    if length == 1:  # one weight of 1, whatever the query
        assert torch.equal(found, parts[2][..., None, :].expand_as(found)) and of_parts[0].abs().max() < 1e-2
        return
    check(formula, list(parts), gradient, [found, *of_parts])


@DTYPES
@pytest.mark.parametrize("turned", [True, False], ids=["turned", "as they are"])
def test_records_of_a_packed_row_are_as_if_each_were_alone(turned: bool, dtype: torch.dtype) -> None:
    """To the last bit, a long record before a short one among them; positions begin anew in each."""
    lengths = [3, 40, 1, 17]
    row = kernels.packed_row(torch.tensor([0, 3, 43, 44, 61]))
    assert (row.longest, row.tokens) == (40, 61)
    mixed, gradient = states(61, 1, 2, 5, 20, dtype=dtype), states(61, 1, 2, 3, 20, dtype=dtype)
    rotation = tables(40, 10, dtype) if turned else None
    found, logarithms = kernels.attention(*query_key_value(mixed), 0.3, True, rotation, row)
    of_mixed = torch.full_like(mixed, float("nan"))
    asked = 0.3, True, rotation, logarithms, gradient, query_key_value(of_mixed), row
    kernels.attention_backward(*query_key_value(mixed), *asked)
    records = (state.split(lengths) for state in (mixed, gradient, found, of_mixed))
    for own, of_own, found_there, of_own_there in zip(*records, strict=True):
        alone = None if rotation is None else tuple(table[: len(own)].contiguous() for table in rotation)
        expected, sums = kernels.attention(*query_key_value(own), 0.3, True, alone)
        of_expected = torch.full_like(own, float("nan"))
        kernels.attention_backward(*query_key_value(own), 0.3, True, alone, sums, of_own, query_key_value(of_expected))
        assert torch.equal(found_there, expected) and torch.equal(of_own_there, of_expected)


def test_a_packed_row_of_other_bounds_is_no_row() -> None:
    parts = query_key_value(states(11, 1, 1, 3, 8, dtype=torch.float32))
    with pytest.raises(AssertionError, match="bounds of 12"):
        kernels.attention(*parts, 1.0, True, None, kernels.packed_row(torch.tensor([0, 12])))


def test_attention_of_scores_far_apart_stays_finite() -> None:
    query = torch.full((9, 1, 1, 1, 16), 50.0)
    key = torch.linspace(-60, 60, 9)[:, None, None, None].expand(9, 1, 1, 16).contiguous()
    found, logarithms = kernels.attention(query, key, key, 1.0, False)
    assert torch.allclose(found, torch.full_like(found, 60.0))
    gradients = [torch.empty_like(state) for state in (query, key, key)]
    kernels.attention_backward(query, key, key, 1.0, False, None, logarithms, torch.ones_like(found), gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)


@DTYPES
@pytest.mark.parametrize(("rows", "width", "real"), [(40, 600, 571), (3, 7, 7), (2, 5, 0)])
def test_exponentials_of_logits(rows: int, width: int, real: int, dtype: torch.dtype) -> None:
    """Also of a rank whose part of the vocabulary is padding alone."""
    logits = states(rows, width, dtype=dtype) * 30
    of_tokens = logits[:, :real].float()
    largest = kernels.row_largest(logits, real)
    assert torch.equal(largest, of_tokens.amax(-1) if real else torch.full((rows,), float("-inf")))
    largest = torch.full((rows,), 200.0) if real == 0 else largest + 1  # another rank's may be larger
    expected = (of_tokens.double() - largest[:, None]).exp()
    sums = kernels.exponentials(logits, real, largest)
    torch.testing.assert_close(sums.double(), expected.sum(-1), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(logits[:, :real].double(), expected, rtol=TOLERANCE[dtype], atol=1e-30)
    assert not logits[:, real:].any()
    assert kernels.row_largest(logits[:, 1:], 1) is None and kernels.exponentials(logits[:, 1:], 1, largest) is None


@pytest.mark.parametrize("count", [5, 40_000])
def test_addition_to_32_bits(count: int) -> None:
    total, addend = torch.randn(count), torch.randn(count).bfloat16()
    expected = total + addend.float()
    assert kernels.add(total, addend)
    assert torch.equal(total, expected)
    assert not kernels.add(total, addend.half()) and not kernels.add(total.bfloat16(), addend)
    every_other = total[::2]
    assert not kernels.add(every_other, addend[: len(every_other)]) and not kernels.add(
        total[: len(every_other)], addend[::2]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [5, kernels.SQUARES, 3 * kernels.SQUARES + 7])
def test_squares_of_parts(count: int, dtype: torch.dtype) -> None:
    x = torch.randn(count).to(dtype)
    expected = torch.stack([part.square().sum() for part in x.double().split(kernels.SQUARES)])
    torch.testing.assert_close(kernels.squares(x).double(), expected, rtol=TOLERANCE[torch.float32], atol=0)
    assert kernels.squares(x.half()) is None and kernels.squares(x[::2]) is None


@pytest.mark.parametrize("count", [5, 40_000])
@pytest.mark.parametrize("in_16_bits", [False, True])
def test_adamw_is_torchs(count: int, in_16_bits: bool) -> None:
    """Three steps, the gradient of each scaled as clipping would."""
    torch.manual_seed(1)
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.3}
    theirs = torch.nn.Parameter(torch.randn(count, dtype=torch.float64))
    optimizer = torch.optim.AdamW([theirs], **settings)
    weight, mean, square = theirs.detach().float(), torch.zeros(count), torch.zeros(count)
    rounded = torch.zeros(count, dtype=torch.bfloat16) if in_16_bits else None
    for step, factor in enumerate((1.0, 0.25, 0.5), start=1):
        gradient = torch.randn(count)
        kept, theirs.grad = gradient.clone(), gradient.double() * factor
        optimizer.step()
        assert kernels.adamw(weight, gradient, mean, square, rounded, step, *settings.values(), factor)
        torch.testing.assert_close(weight.double(), theirs.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(gradient, kept)
        assert rounded is None or torch.equal(rounded, weight.bfloat16())
    state = optimizer.state[theirs]
    torch.testing.assert_close(mean.double(), state["exp_avg"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(square.double(), state["exp_avg_sq"], rtol=1e-6, atol=0)
    asked = 4, *settings.values()
    assert not kernels.adamw(weight[::2], gradient[::2], mean[::2], square[::2], None, *asked)
    assert not kernels.adamw(weight, gradient.bfloat16(), mean, square, None, *asked)
    assert not kernels.adamw(weight, gradient, mean, square, torch.zeros(count, dtype=torch.half), *asked)


def test_rounding_to_16_bits_is_torchs() -> None:
    """Products of 88 = silu(88) with every mantissa, ties among them, infinities, what rounds up to one, and NaN."""
    others = torch.tensor([float("inf"), -float("inf"), 3.3e38, float("nan"), 1e-40, -0.0])
    up = torch.cat([torch.arange(-256, 256) / 128, others])[None].bfloat16()
    found = kernels.swiglu(torch.cat([torch.full_like(up, 88.0), up], -1))
    expected = (88 * up.float()).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    """A run stops at a loss that is not finite, so no kernel may make a number of it."""
    broken = torch.ones(20, 1, 2, 16, dtype=dtype)
    broken[3, 0, 1, 5] = float("nan")
    flat, whole, ones = broken.view(20, 32), torch.ones(20, 1, 2, 16, dtype=dtype), torch.ones(16, dtype=dtype)
    assert kernels.swiglu(flat).isnan().sum() == kernels.swiglu(-flat).isnan().sum() == 1
    assert kernels.swiglu_backward(flat, ones.expand(20, 16).contiguous()).isnan().any()
    assert kernels.rms_norm(broken, ones, 1e-5)[0].isnan().sum() == 16
    for states, lost in (([broken, whole, whole], 16), ([whole, broken, whole], 17 * 16), ([whole, whole, broken], 17)):
        states[0] = states[0][..., None, :]
        found, logarithms = kernels.attention(*states, 1.0, True)
        assert found.isnan().sum() >= lost
        gradients = [torch.zeros_like(state) for state in states]
        kernels.attention_backward(*states, 1.0, True, None, logarithms, torch.ones_like(found), gradients)
        assert gradients[1].isnan().any()


def test_what_the_kernels_do_not_do_is_left_to_torch() -> None:
    x, weight = torch.randn(4, 6), torch.ones(6)
    assert kernels.rms_norm(x.half(), weight.half(), 1e-5) is None
    assert kernels.rms_norm(x.bfloat16(), weight, 1e-5) is None
    assert kernels.rms_norm(x.t(), torch.ones(4), 1e-5) is None
    assert kernels.rms_norm(x.to("meta"), weight.to("meta"), 1e-5) is None
    assert kernels.swiglu(x.double()) is None
    query, key = torch.randn(3, 1, 2, 1, 4), torch.randn(3, 1, 2, 4)
    assert kernels.attention(query.double(), key.double(), key.double(), 1.0, True) is None
    other_dtype = torch.ones(2, 3, 2, dtype=torch.float64)
    assert kernels.attention(query, key, key, 1.0, True, tuple(other_dtype)) is None
