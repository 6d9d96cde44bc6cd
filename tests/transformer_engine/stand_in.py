"""transformer_engine_torch on a CPU: what Transformer Engine's Python calls of its compiled module, in torch.

Only what layers in bf16, fp16 and fp32 call is here, with the arguments of Transformer Engine 2.18's pybind.cpp and
extensions.h, against which test_stand_in.py holds it.  fp8, userbuffers and cuDNN's attention are not: a name that is
missing raises NotImplementedError where it is called.  Letters: S positions, B batch, T tokens of all packed records,
n heads, d their width, O and I the widths of a linear layer's output and input.

`products` counts what was asked for, for tests that must see which products of matrices a backward pass makes.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor

# ---------------------------------------------------------------- enums, with the values of the C headers


class DType(enum.Enum):
    """Of tensors.  Like pybind's enum it is no int, converts to one and pickles as (class, int)."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10

    def __int__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return int(self) == int(other)

    def __hash__(self) -> int:
        return hash(self.value)


TORCH_TYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}  # of DType's values


def _enum(name: str, first: int, *members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, [(member, first + place) for place, member in enumerate(members)], module=__name__)


FP8FwdTensors = _enum(
    "FP8FwdTensors", 0, *(f"GEMM{n}_{what}" for n in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT"))
)
FP8BwdTensors = _enum("FP8BwdTensors", 0, *(f"GRAD_{what}{n}" for n in (1, 2, 3) for what in ("OUTPUT", "INPUT")))
NVTE_Bias_Type = _enum("NVTE_Bias_Type", 0, "NVTE_NO_BIAS", "NVTE_PRE_SCALE_BIAS", "NVTE_POST_SCALE_BIAS", "NVTE_ALIBI")
NVTE_Mask_Type = _enum(
    *("NVTE_Mask_Type", 0, "NVTE_NO_MASK", "NVTE_PADDING_MASK", "NVTE_CAUSAL_MASK", "NVTE_PADDING_CAUSAL_MASK"),
    *("NVTE_CAUSAL_BOTTOM_RIGHT_MASK", "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK"),
)
NVTE_Softmax_Type = _enum(
    "NVTE_Softmax_Type", 0, "NVTE_VANILLA_SOFTMAX", "NVTE_OFF_BY_ONE_SOFTMAX", "NVTE_LEARNABLE_SOFTMAX"
)
NVTE_QKV_Format = _enum(
    *("NVTE_QKV_Format", 0, "NVTE_SBHD", "NVTE_BSHD", "NVTE_THD", "NVTE_BSHD_2SBHD", "NVTE_SBHD_2BSHD"),
    *("NVTE_THD_2BSHD", "NVTE_THD_2SBHD", "NVTE_BHSD", "NVTE_QKV_Format_NOT_SET"),
)
NVTE_QKV_Layout = _enum(
    *("NVTE_QKV_Layout", 0),
    *("NVTE_SB3HD", "NVTE_SBH3D", "NVTE_SBHD_SB2HD", "NVTE_SBHD_SBH2D", "NVTE_SBHD_SBHD_SBHD"),
    *("NVTE_BS3HD", "NVTE_BSH3D", "NVTE_BSHD_BS2HD", "NVTE_BSHD_BSH2D", "NVTE_BSHD_BSHD_BSHD"),
    *("NVTE_T3HD", "NVTE_TH3D", "NVTE_THD_T2HD", "NVTE_THD_TH2D", "NVTE_THD_THD_THD"),
    *("NVTE_SBHD_BSHD_BSHD", "NVTE_BSHD_SBHD_SBHD", "NVTE_THD_BSHD_BSHD", "NVTE_THD_SBHD_SBHD"),
    *("NVTE_Paged_KV_BSHD_BSHD_BSHD", "NVTE_Paged_KV_BSHD_SBHD_SBHD", "NVTE_Paged_KV_SBHD_BSHD_BSHD"),
    *("NVTE_Paged_KV_SBHD_SBHD_SBHD", "NVTE_Paged_KV_THD_BSHD_BSHD", "NVTE_Paged_KV_THD_SBHD_SBHD"),
    "NVTE_BHSD_BHSD_BHSD",
)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}, module=__name__
)
CommOverlapType = _enum("CommOverlapType", 0, "RS", "AG")
NVTERoutingMapFormat = _enum("NVTERoutingMapFormat", 0, "BYTEMAP", "BITMAP_U8")


class _Absent:
    """What the compiled module has and this one does not."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotImplementedError(f"{type(self).__name__} of transformer_engine_torch has no stand-in")


def __getattr__(name: str) -> type[_Absent]:
    """Names that are imported, or stand in annotations, and are never called here."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Absent,), {})


# ---------------------------------------------------------------- products

products: Counter[str] = Counter()  # "KIND O x I" of a product, or a function's name -> calls


def _name(A: Tensor, transA: bool, B: Tensor, transB: bool, in_place: bool) -> str:
    """forward, input gradient, weight gradient, fused weight gradient (into given memory); and the weight's O x I."""
    if transB:
        return f"{'fused ' if in_place else ''}weight gradient {B.shape[-1]} x {A.shape[-1]}"
    return f"{'forward' if transA else 'input gradient'} {A.shape[0]} x {A.shape[1]}"


def generic_gemm(
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: object,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: object = None,
    comm_type: object = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Tensor | None]:
    """D = alpha op(B) op(A) + beta D, row-major, which to cuBLAS is op(A) op(B) column-major.

    TN, forward: weight A [O, I], input B [..., I] -> [..., O], plus bias [O].  NN, input gradient: weight A [O, I],
    gradient B [..., O] -> [..., I].  NT, weight gradient: input A [..., I], gradient B [..., O] -> [O, I]; with `bias`
    and `grad` the second result is the bias's gradient [O].  Accumulated in fp32, rounded once, as cuBLAS does.

    Returns:
        D, gradient of the bias, input of the GELU, extra output; the last two are None here.
    """
    del bias_type, workspace, workspace_size, use_split_accumulator, gelu_in
    if quantizer is not None or gelu or comm_overlap is not None or bulk_overlap:
        raise NotImplementedError("fp8, a fused GELU and overlapped communication need a GPU")
    del comm_type
    products[_name(A, transA, B, transB, D is not None)] += 1
    dtype = A.dtype if output_dtype is None else TORCH_TYPES[int(output_dtype)]
    if D is not None and D.dtype != dtype:
        raise ValueError(f"D is {D.dtype}, output_dtype says {dtype}")
    left = B.reshape(-1, B.shape[-1]).float()
    right = A.reshape(-1, A.shape[-1]).float()
    product = alpha * ((left.T if transB else left) @ (right.T if transA else right))
    if not transB:
        product = product.view(*B.shape[:-1], -1)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = left.sum(0).to(dtype)
    elif bias is not None:
        product = product + bias.float()
    if accumulate:
        product = product + (1.0 if beta is None else beta) * D.float()
    if D is None:
        D = product.to(dtype)
    else:
        D.copy_(product.view(D.shape))
    return [D, bias_gradient, None, extra_output]


def get_cudnn_version() -> int:
    """Of the library, as major * 10000 + minor * 100 + patch."""
    return 91900


def get_cublasLt_version() -> int:
    """Of the library, as major * 10000 + minor * 100 + patch."""
    return 130000


def get_num_cublas_streams() -> int:
    """For grouped products."""
    return 1


# ---------------------------------------------------------------- norms


def _normalised(x: Tensor, rsigma: Tensor, mu: Tensor | None = None) -> Tensor:
    """x [..., H] -> [rows, H] in fp32."""
    rows = x.reshape(-1, x.shape[-1]).float()
    return (rows if mu is None else rows - mu[:, None]) * rsigma[:, None]


def _gain(weight: Tensor, zero_centered_gamma: bool) -> Tensor:
    return weight.float() + 1 if zero_centered_gamma else weight.float()


def _into(out: Tensor | None, rows: Tensor, shape: torch.Size, otype: Any) -> Tensor:
    if out is None:
        return rows.view(shape).to(TORCH_TYPES[int(otype)])
    return out.copy_(rows.view(out.shape))


def _without_quantizer(quantizer: object) -> None:
    if quantizer is not None:
        raise NotImplementedError("fp8 needs a GPU")


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    ln_out: Tensor | None,
    quantizer: object,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """input [..., H], weight and bias [H] -> output [..., H] of `otype`, mean and 1 / deviation [rows] in fp32."""
    products["layernorm_fwd"] += 1
    del sm_margin
    _without_quantizer(quantizer)
    rows = input.reshape(-1, input.shape[-1]).float()
    mu = rows.mean(1)
    rsigma = torch.rsqrt((rows - mu[:, None]).square().mean(1) + eps)
    normalised = _normalised(input, rsigma, mu) * _gain(weight, zero_centered_gamma)
    if bias is not None:
        normalised = normalised + bias.float()
    return [_into(ln_out, normalised, input.shape, otype), mu, rsigma]


def _input_gradient(dz: Tensor, x: Tensor, normalised: Tensor, rsigma: Tensor, centred: bool) -> Tensor:
    """Gradient of rows that were normalised: `dz` [rows, H] is that of the normalised rows; as x."""
    dx = dz - normalised * (dz * normalised).mean(1, keepdim=True)
    if centred:
        dx = dx - dz.mean(1, keepdim=True)
    return (dx * rsigma[:, None]).view(x.shape).to(x.dtype)


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """dz and x [..., H] -> dx [..., H], dgamma and dbeta [H]."""
    del sm_margin
    normalised, rows = _normalised(x, rsigma, mu), dz.reshape(-1, dz.shape[-1]).float()
    dx = _input_gradient(rows * _gain(gamma, zero_centered_gamma), x, normalised, rsigma, centred=True)
    return [dx, (rows * normalised).sum(0).to(gamma.dtype), rows.sum(0).to(gamma.dtype)]


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: object,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor | None]:
    """input [..., H], weight [H] -> output [..., H] of `otype`, None, 1 / root mean square [rows] in fp32."""
    products["rmsnorm_fwd"] += 1
    del sm_margin
    _without_quantizer(quantizer)
    rsigma = torch.rsqrt(input.reshape(-1, input.shape[-1]).float().square().mean(1) + eps)
    normalised = _normalised(input, rsigma) * _gain(weight, zero_centered_gamma)
    return [_into(ln_out, normalised, input.shape, otype), None, rsigma]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """dz and x [..., H] -> dx [..., H], dgamma [H]."""
    del sm_margin
    normalised, rows = _normalised(x, rsigma), dz.reshape(-1, dz.shape[-1]).float()
    dx = _input_gradient(rows * _gain(gamma, zero_centered_gamma), x, normalised, rsigma, centred=False)
    return [dx, (rows * normalised).sum(0).to(gamma.dtype)]


# ---------------------------------------------------------------- attention


def get_fused_attn_backend(*_: object) -> NVTE_Fused_Attn_Backend:
    """cuDNN has no attention for a CPU, so Transformer Engine takes its unfused one."""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend


def _softmax(input: Tensor, scale_factor: float, masked: Tensor | None) -> Tensor:
    """Scores [..., Sq, Sk] in 16 bits -> probabilities of that type; rows without a position to look at are 0.

    16 bits only, as in the kernels: Transformer Engine must not come here in fp32.
    """
    if input.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"Only fp16 and bf16 are supported, got {input.dtype}")
    scores = input.float() * float(scale_factor)
    if masked is None:
        return scores.softmax(-1).to(input.dtype)
    # the kernels take -10000 for a masked score, and 0 for a row of nothing else
    probabilities = scores.masked_fill(masked, -10000.0).softmax(-1)
    return probabilities.masked_fill(masked.all(-1, keepdim=True), 0.0).to(input.dtype)


def _softmax_gradient(output_grad: Tensor, softmax_results: Tensor, scale_factor: float) -> Tensor:
    gradient, results = output_grad.float(), softmax_results.float()
    scores = results * (gradient - (gradient * results).sum(-1, keepdim=True))
    return (scores * float(scale_factor)).to(output_grad.dtype)


def _above_diagonal(rows: int, columns: int) -> Tensor:
    """[rows, columns], True where a causal mask hides; aligned at the bottom right."""
    return torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)


def scaled_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """[B, n, Sq, Sk] -> the same."""
    return _softmax(input, scale_factor, None)


def scaled_softmax_backward(output_grad_: Tensor, softmax_results_: Tensor, scale_factor: float) -> Tensor:
    """[B, n, Sq, Sk] -> the same."""
    return _softmax_gradient(output_grad_, softmax_results_, scale_factor)


def scaled_masked_softmax_forward(input: Tensor, mask: Tensor, scale_factor: float) -> Tensor:
    """[B, n, Sq, Sk], mask [B or 1, 1, Sq, Sk], True hides -> [B, n, Sq, Sk]."""
    return _softmax(input, scale_factor, mask.bool())


def scaled_masked_softmax_backward(output_grad_: Tensor, softmax_results_: Tensor, scale_factor: float) -> Tensor:
    """[B, n, Sq, Sk] -> the same."""
    return _softmax_gradient(output_grad_, softmax_results_, scale_factor)


def scaled_upper_triang_masked_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """[B * n, S, S], causal -> the same."""
    return _softmax(input, scale_factor, _above_diagonal(*input.shape[-2:]))


def scaled_upper_triang_masked_softmax_backward(
    output_grads_: Tensor, softmax_results_: Tensor, scale_factor: float
) -> Tensor:
    """[B * n, S, S] -> the same."""
    return _softmax_gradient(output_grads_, softmax_results_, scale_factor)


def scaled_aligned_causal_masked_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """[B, n, Sq, Sk], the last query sees all -> the same."""
    return _softmax(input, scale_factor, _above_diagonal(*input.shape[-2:]))


def scaled_aligned_causal_masked_softmax_backward(
    output_grad_: Tensor, softmax_results_: Tensor, scale_factor: float
) -> Tensor:
    """[B, n, Sq, Sk] -> the same."""
    return _softmax_gradient(output_grad_, softmax_results_, scale_factor)


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """Packed records [T, n, d], record r from cu_seqlens[r] on -> [b, max_seq_len, n, d], zeros behind each."""
    products["convert_thd_to_bshd"] += 1
    rows = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for row, (start, end) in zip(rows, itertools.pairwise(cu_seqlens.tolist()), strict=True):
        row[: end - start] = tensor[start:end]
    return rows


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """[b, S, n, d] -> packed records [t, n, d]."""
    packed = tensor.new_zeros(t, *tensor.shape[2:])
    for row, (start, end) in zip(tensor, itertools.pairwise(cu_seqlens.tolist()), strict=True):
        packed[start:end] = row[: end - start]
    return packed


# ---------------------------------------------------------------- rotary embedding


def _turned(states: Tensor, angles: Tensor, interleaved: bool, direction: int) -> Tensor:
    """states [..., S, n, d] turned by angles [S, w], w <= d, in fp32; the widths beyond w stay as they are."""
    if interleaved:
        raise NotImplementedError("interleaved rotary embeddings are not used here")
    width = angles.shape[-1]
    turning, rest = states[..., :width].float(), states[..., width:]
    first, second = turning.chunk(2, dim=-1)
    cosine, sine = angles.cos()[:, None], direction * angles.sin()[:, None]
    turned = turning * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned.to(states.dtype), rest], dim=-1)


def _rope(
    states: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    direction: int,
) -> Tensor:
    if start_positions is not None or cp_size != 1:
        raise NotImplementedError("offsets and context parallelism are not used here")
    angles = freqs[:, 0, 0]
    if qkv_format == NVTE_QKV_Format.NVTE_THD:
        records = torch.cat([angles[:length] for length in cu_seqlens.diff().tolist()])
        turned = _turned(states, records, interleaved, direction)
    elif qkv_format == NVTE_QKV_Format.NVTE_SBHD:
        turned = _turned(states.transpose(0, 1), angles[: states.shape[0]], interleaved, direction).transpose(0, 1)
    else:
        turned = _turned(states, angles[: states.shape[1]], interleaved, direction)
    # at::empty() as there: the attention looks at strides, also at that of a batch of one
    return torch.empty(states.shape, dtype=states.dtype).copy_(turned)


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """input [S, B, n, d], [B, S, n, d] or [T, n, d] with cu_seqlens, freqs [S, 1, 1, w] in radians -> as input."""
    products["fused_rope_forward"] += 1
    del cp_rank
    return _rope(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, 1)


def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """The turn back."""
    del cp_rank
    return _rope(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, -1)


# ---------------------------------------------------------------- optimizers


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam's step number `step` on lists of gradients, parameters, first and second moments, in place.

    Mode 1 takes the weight decay from the parameter (AdamW), mode 0 adds it to the gradient.  A fifth list, of master
    parameters in fp32, is what the others' parameters are rounded from.
    """
    del chunk_size, noop_flag
    if not isinstance(step, int):  # of pybind11
        raise TypeError(f"incompatible function arguments: step is {step!r}")
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, first, second, *master in zip(*tensor_lists, strict=True):
        exact = master[0] if master else parameter.float()
        gradient = gradient.float() if mode else gradient.float() + weight_decay * exact
        first.copy_(beta1 * first.float() + (1 - beta1) * gradient)
        second.copy_(beta2 * second.float() + (1 - beta2) * gradient.square())
        update = first.float() / corrections[0] / ((second.float() / corrections[1]).sqrt() + epsilon)
        exact = exact - lr * (update + weight_decay * exact if mode else update)
        for tensor in (parameter, *master):
            tensor.copy_(exact)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor_python: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Norm of all tensors of the one list [1], and of each of them if asked for."""
    del chunk_size, noop_flag
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor_python else norms.new_empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """The second list's tensors become the first's times `scale`; `noop_flag` 1 if one of those is not finite."""
    del chunk_size
    for source, target in zip(*tensor_lists, strict=True):
        if not source.isfinite().all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: Tensor, tensor_lists: list[list[Tensor]], scale: Tensor
) -> None:
    """multi_tensor_scale() with the factor in a tensor [1]."""
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale.item())
