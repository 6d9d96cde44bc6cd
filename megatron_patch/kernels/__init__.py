"""Compiled kernels of a CPU: what stands between the matrix products of a layer.

torch's operators each read and write whole activations, which takes longer than the arithmetic, and a norm or SwiGLU
is made of several.  These do the same formulas in 32 bits, in one pass over memory, in the threads that torch uses.

elementwise.cpp     norm, SwiGLU, rotary positions, exponentials of logits, gradients, AdamW
attention.cpp       attention of short records, side by side or packed
common.h            what both share
build.py            compiled once on each kind of machine
gradient_buffer.py  Megatron's buffers of gradients: the first of a step is written, those after it are added

The functions below take tensors on the CPU and return None for what the kernels do not do (another dtype, a tensor that
does not lie in one piece, no compiler on this machine): the caller then uses torch's operators.  product() is the one
that needs no compiler: torch has the faster program for it, and does not call it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_patch.kernels.build import cpuinfo, library

DTYPES = {torch.float32: "_fp32", torch.bfloat16: "_bf16"}  # and the ends of the kernels' names


def _kernel(name: str, dtype: torch.dtype, *whole: Tensor) -> Callable[..., None] | None:
    """The kernel for `dtype`; None where there is none, or a tensor of `whole` is not of it or not in one piece."""
    for tensor in whole:
        if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return None
    suffix = DTYPES.get(dtype)
    kernels = library() if suffix else None
    return None if kernels is None else getattr(kernels, name + suffix)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """x [..., H], weight [H] -> the normed x, and each row's scale 1 / sqrt(mean(x^2) + eps), float32 [rows]."""
    kernel = _kernel("rms_norm", x.dtype, x, weight)
    if kernel is None:
        return None
    width = x.shape[-1]
    rows = x.numel() // width
    found, scales = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    kernel(rows, width, x.data_ptr(), weight.data_ptr(), eps, found.data_ptr(), scales.data_ptr())
    return found, scales


def rms_norm_backward(
    x: Tensor, weight: Tensor, scales: Tensor, gradient: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """Gradients of x [..., H] and weight [H], each where it is asked for; scales as rms_norm() returns them."""
    kernel = _kernel("rms_norm_backward", x.dtype, x, weight, gradient)
    if kernel is None:
        return None
    width = x.shape[-1]
    found = [torch.empty_like(state) if asked else None for state, asked in ((x, of_x), (weight, of_weight))]
    places = [None if state is None else state.data_ptr() for state in found]
    states = (state.data_ptr() for state in (x, weight, scales, gradient))
    kernel(x.numel() // width, width, *states, *places)
    return found[0], found[1]


def swiglu(gate_and_up: Tensor) -> Tensor | None:
    """[..., 2 F], gate then up -> silu(gate) * up [..., F]."""
    kernel = _kernel("swiglu", gate_and_up.dtype, gate_and_up)
    if kernel is None:
        return None
    width = gate_and_up.shape[-1] // 2
    found = gate_and_up.new_empty(*gate_and_up.shape[:-1], width)
    kernel(gate_and_up.numel() // (2 * width), width, gate_and_up.data_ptr(), found.data_ptr())
    return found


def swiglu_backward(gate_and_up: Tensor, gradient: Tensor) -> Tensor | None:
    """Gradient of gate_and_up [..., 2 F] from that of swiglu() [..., F]."""
    kernel = _kernel("swiglu_backward", gradient.dtype, gate_and_up, gradient)
    if kernel is None:
        return None
    width = gradient.shape[-1]
    found = torch.empty_like(gate_and_up)
    kernel(gradient.numel() // width, width, *(state.data_ptr() for state in (gate_and_up, gradient, found)))
    return found


def _heads(states: Tensor) -> tuple[int, ...]:
    """[S, B, heads, d], each head in one piece -> its place and strides."""
    return states.data_ptr(), *states.stride()[:3]


def _with_whole_heads(*states: Tensor) -> list[Tensor]:
    return [state if state.stride(-1) == 1 else state.contiguous() for state in states]


@functools.lru_cache(maxsize=4)  # all layers of a micro-batch ask alike
def rotation_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """angles [S, ..., d] of rotary positions, both halves of a head alike -> cosine and sine [S, ..., d / 2]."""
    half = angles[..., : angles.shape[-1] // 2]
    with torch.inference_mode(False):  # else what was looked up for an answer could not be kept for a backward pass
        return half.cos().to(dtype), half.sin().to(dtype)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor | None:
    """Both halves of each head turned against each other (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Args:
        states: [S, B, heads, d].
        cosine, sine: of the angles, S x d / 2 in any shape, in the dtype of the states; records of positions of their
            own (S x B x d / 2) are not for the kernel.
        direction: 1 turns forward, -1 back.
    """
    kernel = _kernel("rotate", states.dtype, cosine, sine) if states.is_cpu else None
    if kernel is None or cosine.numel() * 2 != states.shape[0] * states.shape[3]:
        return None
    (states,) = _with_whole_heads(states)
    found = torch.empty(states.shape, dtype=states.dtype)
    kernel(*states.shape, *_heads(states), cosine.data_ptr(), sine.data_ptr(), direction, found.data_ptr())
    return found


def _groups(states: Tensor) -> tuple[int, ...]:
    """[S, B, groups, heads of a group, d], or without the heads -> its place and strides."""
    strides = states.stride()[:-1]
    return states.data_ptr(), *strides, *[0] * (4 - len(strides))


class PackedRow(NamedTuple):
    """Records behind each other in one row of T tokens."""

    bounds: Tensor  # int32 [records + 1]: where each begins, then T
    longest: int
    tokens: int


@functools.lru_cache(maxsize=8)  # all layers of a micro-batch ask alike
def packed_row(cu_seqlens: Tensor) -> PackedRow:
    """cu_seqlens [records + 1], on the CPU."""
    bounds = cu_seqlens.to(torch.int32).contiguous()
    return PackedRow(bounds, int(bounds.diff().max()), int(bounds[-1]))


def _shape(query: Tensor, packed: PackedRow | None) -> tuple[int | None, ...]:
    """Tokens of the longest record, records, their bounds in a packed row, groups, heads of a group, d."""
    if packed is None:
        return *query.shape[:2], None, *query.shape[2:]
    assert query.shape[:2] == (packed.tokens, 1), f"{tuple(query.shape[:2])} tokens, bounds of {packed.tokens}"
    return packed.longest, len(packed.bounds) - 1, packed.bounds.data_ptr(), *query.shape[2:]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    rotation: tuple[Tensor, Tensor] | None = None,
    packed: PackedRow | None = None,
) -> tuple[Tensor, Tensor] | None:
    """softmax(query key^T scale) value, of each record and head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        query: [S, B, groups, heads of a group, d].
        key, value: [S, B, groups, d]; each group serves its heads.
        scale: of the scores.
        causal: a token sees itself and those before it, else all.
        rotation: cosine and sine [S, d / 2] of the angles by which queries and keys are turned first, as rotate()
            does, in the dtype of the states; None: they stay as they are.
        packed: the records of states [T, 1, ...]; S of the rotation is then the longest one's.

    Returns:
        [S, B, groups, heads of a group, d], and the logarithm of the sum of each row's exponentials, float32
        [B, groups, heads of a group, S], of a packed row [T * groups * heads of a group], record behind record.
    """
    kernel = _kernel("attention", query.dtype, *(rotation or ())) if query.is_cpu else None
    if kernel is None:
        return None
    query, key, value = _with_whole_heads(query, key, value)
    found = torch.empty(query.shape, dtype=query.dtype)
    logarithms = (
        torch.empty(*query.shape[1:4], query.shape[0]) if packed is None else torch.empty(found[..., 0].numel())
    )
    shape = _shape(query, packed)
    kernel(*shape, causal, *_inputs(query, key, value, rotation), scale, *_groups(found), logarithms.data_ptr())
    return found, logarithms


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None
) -> tuple[int | None, ...]:
    """As the kernels of attention take them."""
    tables = (None, None) if rotation is None else (table.data_ptr() for table in rotation)
    return *_groups(query), *_groups(key), *_groups(value), *tables


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    rotation: tuple[Tensor, Tensor] | None,
    logarithms: Tensor,
    gradient: Tensor,
    found: Sequence[Tensor],
    packed: PackedRow | None = None,
) -> None:
    """Writes the gradients of query, key and value into `found`, tensors of their shapes whose heads lie in one piece.

    gradient: of attention()'s first result [S, B, groups, heads of a group, d]; logarithms: its second.
    """
    kernel = _kernel("attention_backward", query.dtype)
    query, key, value, gradient = _with_whole_heads(query, key, value, gradient)
    written = (part for state in (gradient, *found) for part in _groups(state))
    shape = _shape(query, packed)
    kernel(*shape, causal, *_inputs(query, key, value, rotation), scale, logarithms.data_ptr(), *written)


def row_largest(logits: Tensor, real: int) -> Tensor | None:
    """The largest of the first `real` of each row [rows, V], float32 [rows]; -inf where there are none."""
    kernel = _kernel("row_largest", logits.dtype, logits)
    if kernel is None:
        return None
    found = logits.new_empty(logits.shape[0], dtype=torch.float32)
    kernel(*logits.shape, real, logits.data_ptr(), found.data_ptr())
    return found


def exponentials(logits: Tensor, real: int, largest: Tensor) -> Tensor | None:
    """In place e^(logit - largest) of the first `real` of each row [rows, V], 0 behind them.

    largest: float32 [rows], at least row_largest().

    Returns:
        Each row's sum, in 32 bits before it is rounded, float32 [rows].
    """
    kernel = _kernel("exponentials", logits.dtype, logits)
    if kernel is None:
        return None
    sums = torch.empty_like(largest)
    kernel(*logits.shape, real, logits.data_ptr(), largest.data_ptr(), sums.data_ptr())
    return sums


# Smaller products gain nothing, and oneDNN makes a program for each new shape, which takes up to 0.7 ms.
LEAST_ROWS, LEAST_PRODUCTS = 64, 1 << 26


def product(x: Tensor, weight: Tensor) -> Tensor | None:
    """x [..., I] times the transpose of weight [O, I], which may be a view -> [..., O]; in 32 bits on AMD's processors.

    torch gives these products to MKL, which is made for Intel's: oneDNN, which it has as well, takes 6 to 24% less time
    for those of a training step.  Records nothing for a backward pass.
    """
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not x.is_cpu:
        return None
    if x.numel() < LEAST_ROWS * x.shape[-1] or x.numel() * weight.shape[0] < LEAST_PRODUCTS or not _mkl_is_slower():
        return None
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def _mkl_is_slower() -> bool:
    # an operator that torch's own compiler calls, without a promise to others
    return "AuthenticAMD" in cpuinfo() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def add(total: Tensor, addend: Tensor) -> bool:
    """total += addend of another dtype, both of one shape; whether it was done."""
    kernel = _kernel("add", addend.dtype, addend) if total.dtype is torch.float32 and total.is_contiguous() else None
    if kernel is None:
        return False
    kernel(total.numel(), total.data_ptr(), addend.data_ptr())
    return True


SQUARES = 1 << 14  # elements of a part that squares() sums up


def squares(x: Tensor) -> Tensor | None:
    """The sum of the squares of each part of x of SQUARES elements, float32 [parts], the last one shorter."""
    kernel = _kernel("squares", x.dtype, x)
    if kernel is None:
        return None
    found = torch.empty(-(-x.numel() // SQUARES), dtype=torch.float32)
    kernel(x.numel(), SQUARES, x.data_ptr(), found.data_ptr())
    return found


def adamw(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rounded: Tensor | None,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    factor: float = 1.0,
) -> bool:
    """A step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) in place; whether it was done.

    Args:
        weight, gradient, mean, square: float32 of one shape, the two moments last.
        rounded: gets the weight in 16 bits; None: nothing does.
        step: counts from 1.
        rate, betas, eps, decay: as torch.optim.AdamW's lr, betas, eps and weight_decay.
        factor: of the gradient, which stays as it is.
    """
    states = weight, gradient, mean, square
    in_32_bits = _kernel("adamw", torch.float32, *states)
    kernel = in_32_bits if rounded is None else _kernel("adamw", torch.bfloat16, rounded)
    if in_32_bits is None or kernel is None:
        return False
    places = *(state.data_ptr() for state in states), None if rounded is None else rounded.data_ptr()
    rates = rate / (1 - betas[0] ** step), 1 - rate * decay
    moments = 1 - betas[0], betas[1], 1 - betas[1]
    kernel(weight.numel(), *places, factor, *rates, *moments, (1 - betas[1] ** step) ** -0.5, eps)
    return True
