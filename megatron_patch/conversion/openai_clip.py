"""OpenAI's own CLIP files (`ViT-L-14-336px.pt`): TorchScript archives, read without running the code inside.

Such a file is a zip: `data.pkl` describes modules and tensors, `data/N` holds the bytes of tensor N, `code/` the
program.  The pickle is read by an unpickler that knows tensors and bare modules and refuses everything else.  Names and
the head width of 64 are those of github.com/openai/CLIP, clip/model.py.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_patch.checkpoint_files import SavedTensor, TensorArchive, TensorFacts
from megatron_patch.conversion.hub_weights import Stored, pread_into, pread_rows
from megatron_patch.errors import UserError
from megatron_patch.weight_names import MISSING, WRONG, check_nothing_differs

HEAD_WIDTH = 64
# Weights that tell a number of the config, under the names of a Hugging Face CLIP.
PATCHES = "vision_model.embeddings.patch_embedding.weight"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
FIRST_MLP = "vision_model.encoder.layers.0.mlp.fc1.weight"
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


class _Module:
    """A module of the archive: nothing but its attributes."""


class _ScriptFacts(TensorFacts):
    """TensorFacts of TorchScript: modules without behaviour as well."""

    def find_class(self, module: str, name: str) -> object:
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values: values
        return _Module if module.startswith("__torch__") else super().find_class(module, name)


def _walk(value: object, prefix: str = "") -> Iterator[tuple[str, SavedTensor]]:
    """(dotted name, tensor) of a module or dictionary and everything in it."""
    if isinstance(value, SavedTensor):
        yield prefix, value
    elif isinstance(value, _Module | dict):
        for name, inner in (value if isinstance(value, dict) else vars(value)).items():
            yield from _walk(inner, f"{prefix}.{name}" if prefix else str(name))


def _stored(path: Path, archive: TensorArchive, tensor: SavedTensor) -> Stored:
    storage, place, dtype = archive.storage(tensor), archive.place(tensor), tensor.dtype
    if storage is None or dtype is None:
        raise ValueError(f"a tensor is stored as {tensor.storage}, compressed or of a dtype that is not read here")
    last = tensor.first + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride, strict=True))
    if (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError(f"a tensor {list(tensor.shape)} reaches beyond its {storage.nbytes} bytes")
    if place is not None:
        return Stored(dtype, tensor.shape, pread_rows(path, place.position, dtype, tensor.shape), path.name)

    def read_rows(first: int, stop: int) -> Tensor:
        with open(path, "rb", buffering=0) as file:
            whole = pread_into(file.fileno(), storage.position, (storage.nbytes // dtype.itemsize,), dtype)
        return whole.as_strided(tensor.shape, tensor.stride, tensor.first)[first:stop].contiguous()

    return Stored(dtype, tensor.shape, read_rows, path.name)


def _read_archive(path: Path) -> dict[str, Stored]:
    """OpenAI's name -> tensor.

    Raises:
        UserError: the file is no such archive, cut off, or its pickle holds more than weights.
    """
    try:
        with open(path, "rb") as file:
            archive = TensorArchive(file.fileno(), 0, path.stat().st_size, _ScriptFacts)
        return {name: _stored(path, archive, tensor) for name, tensor in _walk(archive.saved)}
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
    axes = {PATCHES: 4, POSITIONS: 2, FIRST_MLP: 2}
    check_nothing_differs(
        f"{path} is not OpenAI's CLIP",
        {
            MISSING: [name for name in axes if name not in tensors],
            WRONG: [
                f"{name} is {list(tensors[name].shape)}, wanted {count} axes"
                for name, count in axes.items()
                if name in tensors and len(tensors[name].shape) != count
            ],
        },
    )
    hidden, _, patch_px, _ = tensors[PATCHES].shape
    positions, _ = tensors[POSITIONS].shape
    ffn_hidden, _ = tensors[FIRST_MLP].shape
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
