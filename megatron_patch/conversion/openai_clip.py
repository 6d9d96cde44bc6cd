"""OpenAI's own CLIP files (`ViT-L-14-336px.pt`): TorchScript archives, read without running the code inside.

Such a file is a zip: `data.pkl` describes modules and tensors, `data/N` holds the bytes of tensor N, `code/` the
program.  The pickle is read by an unpickler that knows tensors and bare modules and refuses everything else.  Names and
the head width of 64 are those of github.com/openai/CLIP, clip/model.py.
"""

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.conversion.hub_weights import Stored, pread_into
from megatron_patch.conversion.transforms import Shape
from megatron_patch.errors import UserError

HEAD_WIDTH = 64
_STORAGES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
_BLOCK = r"visual\.transformer\.resblocks\.(\d+)\."
_LAYER = r"vision_model.encoder.layers.\1."
# Name in OpenAI's files -> name in a Hugging Face CLIP.
_RULES = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (_BLOCK + r"ln_([12])\.", _LAYER + r"layer_norm\2."),
    (_BLOCK + r"attn\.out_proj\.", _LAYER + "self_attn.out_proj."),
    (_BLOCK + r"mlp\.c_fc\.", _LAYER + "mlp.fc1."),
    (_BLOCK + r"mlp\.c_proj\.", _LAYER + "mlp.fc2."),
)
_JOINED = re.compile(_BLOCK + r"attn\.in_proj_(weight|bias)")  # query, key and value below each other
_NOT_THE_TOWER = re.compile(
    r"transformer\..*|ln_final\..*|token_embedding\.weight|positional_embedding|text_projection|logit_scale"
    r"|visual\.proj|input_resolution|context_length|vocab_size"
)


@dataclass(frozen=True)
class _Described:
    """A tensor as the pickle describes it; offset and strides in elements."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: Shape
    strides: Shape

    @property
    def is_contiguous(self) -> bool:
        return self.strides == tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


class _Module:
    """A module of the archive: nothing but its attributes."""


def _describe(storage: tuple, offset: int, shape: Shape, strides: Shape, *_: object) -> _Described:
    _, dtype, key, *_ = storage
    return _Described(dtype, str(key), offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Knows tensors, dictionaries and modules without behaviour."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _describe
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values: values
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.startswith("__torch__"):
            return _Module
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _walk(value: object, prefix: str = "") -> Iterator[tuple[str, _Described]]:
    """(dotted name, tensor) of a module or dictionary and everything in it."""
    if isinstance(value, _Described):
        yield prefix, value
    elif isinstance(value, _Module | dict):
        for name, inner in (value if isinstance(value, dict) else vars(value)).items():
            yield from _walk(inner, f"{prefix}.{name}" if prefix else str(name))


def _places(archive: zipfile.ZipFile, root: str) -> dict[str, tuple[int, int]]:
    """Storage key -> (offset in the file, bytes); storages are never compressed."""
    places = {}
    for entry in archive.infolist():
        if entry.filename.startswith(f"{root}/data/") and entry.compress_type == zipfile.ZIP_STORED:
            archive.fp.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(archive.fp.read(2), "little") for _ in range(2))
            key = entry.filename.removeprefix(f"{root}/data/")
            places[key] = (entry.header_offset + 30 + name + extra, entry.file_size)
    return places


def _stored(path: Path, tensor: _Described, place: tuple[int, int]) -> Stored:
    begin, nbytes = place
    size = tensor.dtype.itemsize
    last = tensor.offset + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * size > nbytes:
        raise ValueError(f"a tensor {list(tensor.shape)} reaches beyond its {nbytes} bytes")

    def read_rows(first: int, stop: int) -> Tensor:
        with open(path, "rb", buffering=0) as file:
            if tensor.is_contiguous:
                shape = (stop - first, *tensor.shape[1:]) if tensor.shape else ()
                start = tensor.offset + first * math.prod(tensor.shape[1:])
                return pread_into(file.fileno(), begin + start * size, shape, tensor.dtype)
            whole = pread_into(file.fileno(), begin, (nbytes // size,), tensor.dtype)
            return whole.as_strided(tensor.shape, tensor.strides, tensor.offset)[first:stop].contiguous()

    return Stored(tensor.dtype, tensor.shape, read_rows, path.name)


def _read_archive(path: Path) -> dict[str, Stored]:
    """OpenAI's name -> tensor.

    Raises:
        UserError: the file is no such archive, cut off, or its pickle holds more than weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"it holds {len(pickles)} data.pkl")
            described = dict(_walk(_Unpickler(io.BytesIO(archive.read(pickles[0]))).load()))
            places = _places(archive, pickles[0].removesuffix("/data.pkl"))
        return {name: _stored(path, tensor, places[tensor.key]) for name, tensor in described.items()}
    except Exception as error:  # unpickling bytes of unknown origin raises of many kinds
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no archive of CLIP weights ({reason}); fetch OpenAI's file again") from None


def _third(stored: Stored, number: int) -> Stored:
    """Query, key or value (0, 1, 2) of a joined projection."""
    rows = stored.shape[0] // 3
    begin = number * rows
    return Stored(
        stored.dtype,
        (rows, *stored.shape[1:]),
        lambda first, last: stored.read_rows(begin + first, begin + last),
        stored.origin,
    )


def open_openai_clip(path: Path) -> dict[str, Stored]:
    """Tensors of the image tower under the names of a Hugging Face CLIP; names that are not known stay as they are.

    Raises:
        UserError: as in _read_archive(), or the tower is no vision transformer.
    """
    tensors: dict[str, Stored] = {}
    source = _read_archive(path)
    if "visual.class_embedding" not in source:
        raise UserError(
            f"{path} holds no vision transformer (no visual.class_embedding); wanted one of OpenAI's ViT-*.pt"
        )
    for name, stored in source.items():
        if _NOT_THE_TOWER.fullmatch(name):
            continue
        joined = _JOINED.fullmatch(name)
        if joined:
            for number, letter in enumerate("qkv"):
                target = f"vision_model.encoder.layers.{joined[1]}.self_attn.{letter}_proj.{joined[2]}"
                tensors[target] = _third(stored, number)
            continue
        pattern, replacement = next((rule for rule in _RULES if re.match(rule[0], name)), ("$", ""))
        tensors[re.sub(pattern, replacement, name, count=1)] = stored
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """Numbers of a CLIPVisionConfig from the shapes of the weights, as OpenAI's build_model derives them.

    Raises:
        UserError: as in open_openai_clip(), or a tensor that tells a number is missing.
    """
    tensors = open_openai_clip(path)
    try:
        hidden, _, patch_px, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        positions, _ = tensors["vision_model.embeddings.position_embedding.weight"].shape
        ffn_hidden, _ = tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not OpenAI's CLIP: {error} is missing or of another shape") from None
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn_hidden,
        "num_hidden_layers": len([name for name in tensors if name.endswith(".mlp.fc1.weight")]),
        "num_attention_heads": hidden // HEAD_WIDTH,
        "image_size": math.isqrt(positions - 1) * patch_px,
        "patch_size": patch_px,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
