"""Weight files of the hub: their dialects of names, reading single rows of single tensors, writing shards.

Files are read by pread, not through mapped pages: mapped pages count as resident memory and grow to the size of the
model.
"""

import errno
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.checkpoint_files import STRANGE, PlacedTensor, TensorArchive, fill
from megatron_patch.conversion.output import ahead, start_writing_back
from megatron_patch.conversion.table import HubTensor
from megatron_patch.conversion.transforms import Shape
from megatron_patch.errors import UserError
from megatron_patch.weight_names import LEFT_OVER, MISSING, UNKNOWN, WRONG, another_shape, check_nothing_differs

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # by the launchers' PR
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Dtypes of things that may lie beside weights: buffers, masks, quantised tensors.  Listed, so that the message can
# name them; no weight may have one.
_OTHER_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
BLOCK_BYTES = 16 * 2**20  # tensors that may be streamed are read in blocks of about this size


def pread_into(descriptor: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor [*shape] filled with the bytes of the file from offset on.

    Raises:
        OSError: the file ends before the tensor does.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype)
    fill(tensor, descriptor, offset)
    return tensor


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file that are the wanted values as they stand: copied by the kernel, never seen here."""

    descriptor: int
    position: int
    nbytes: int

    def read_ahead(self) -> None:
        """Have the system begin to read them."""
        os.posix_fadvise(self.descriptor, self.position, self.nbytes, os.POSIX_FADV_WILLNEED)

    def copy_to(self, descriptor: int, position: int) -> None:
        """Copy into another file.

        Raises:
            OSError: the disk is full, or the file ends early.
        """
        done = 0
        while done < self.nbytes:
            try:
                count = os.copy_file_range(
                    self.descriptor, descriptor, self.nbytes - done, self.position + done, position + done
                )
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                rest = pread_into(self.descriptor, self.position + done, (self.nbytes - done,), torch.uint8)
                count = os.pwrite(descriptor, memoryview(rest.numpy()), position + done)
            if count == 0:
                raise OSError(f"file ended {self.nbytes - done} bytes early")
            done += count


def row_blocks(shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(first, last + 1) row of blocks of about BLOCK_BYTES; the whole range for small tensors."""
    rows = shape[0] if shape else 1
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


@dataclass(frozen=True)
class Stored:
    """A tensor at rest: its dtype, shape, and a function that reads rows [first, last) of it."""

    dtype: torch.dtype
    shape: Shape
    read_rows: Callable[[int, int], Tensor]
    origin: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.read_rows(0, self.shape[0] if self.shape else 1)


def in_memory(tensor: Tensor, origin: str) -> Stored:
    """A tensor that was made, not read."""
    return Stored(tensor.dtype, tuple(tensor.shape), lambda first, last: tensor[first:last], origin)


# ---------------------------------------------------------------- reading


def _safetensors_entries(path: Path) -> dict[str, Stored]:
    """Header of a safetensors file, checked against the file's size."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if size != 8 + length + end:
            raise ValueError(f"its header promises {8 + length + end} bytes, it has {size}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}; fetch it again") from None

    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        known = DTYPES | _OTHER_DTYPES
        if entry["dtype"] not in known:
            raise UserError(f"{path}: {name} has dtype {entry['dtype']}; known: {', '.join(known)}")
        dtype, shape = known[entry["dtype"]], tuple(entry["shape"])
        begin, stop = entry["data_offsets"]
        if stop - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: {name} has {stop - begin} bytes, not those of {dtype} {list(shape)}")

        read_rows = pread_rows(path, 8 + length + begin, dtype, shape)
        entries[name] = Stored(dtype, shape, read_rows, path.name)
    return entries


def _pickle_entries(path: Path) -> dict[str, Stored]:
    """A pytorch_model.bin, unpickled with weights only (no code runs).

    Tensors whose bytes stand in order are read by pread like those of safetensors, others from mapped storages; files
    from before torch 1.6 are no archives and are loaded whole.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise UserError(f"{path} cannot be read with weights_only=True: {error}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__}; wanted a plain state dict")
    places, entries = _places(path), {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name} is a {type(tensor).__name__}, no tensor; wanted a plain state dict")
        dtype, shape = tensor.dtype, tuple(tensor.shape)
        place = places.get(name)
        if place is not None and (place.dtype, place.shape) == (dtype, shape):
            read_rows = pread_rows(path, place.position, dtype, shape)
        else:

            def read_rows(first: int, last: int, tensor: Tensor = tensor) -> Tensor:
                return (tensor[first:last] if tensor.dim() else tensor).clone()

        entries[name] = Stored(dtype, shape, read_rows, path.name)
    return entries


def _places(path: Path) -> dict[str, PlacedTensor | None]:
    """The tensors of a torch.save, None for those whose bytes do not stand in order; empty for other files."""
    try:
        with open(path, "rb") as file:
            archive = TensorArchive(file.fileno(), 0, path.stat().st_size)
        return {name: archive.place(tensor) for name, tensor in archive.saved.items()}
    except STRANGE:
        return {}


def pread_rows(path: Path, start: int, dtype: torch.dtype, shape: Shape) -> Callable[[int, int], Tensor]:
    """A function that reads rows [first, last) of the tensor whose bytes begin at `start`."""

    def read_rows(first: int, last: int) -> Tensor:
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        wanted = (last - first, *shape[1:]) if shape else ()
        with open(path, "rb", buffering=0) as file:
            return pread_into(file.fileno(), start + first * row_bytes, wanted, dtype)

    return read_rows


def open_weight_file(path: Path) -> dict[str, Stored]:
    """Raw name -> tensor of one weight file.

    Raises:
        UserError: the file is cut off, no weight file, or holds an unknown dtype.
    """
    return _safetensors_entries(path) if path.suffix == ".safetensors" else _pickle_entries(path)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a hub folder: safetensors if there are any, else pytorch_model*.bin.

    Raises:
        UserError: there are none, or an index names a file that is not there.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            absent = [name for name in names if not (folder / name).is_file()]
            if absent:
                raise UserError(f"{index} names files that are not there: {', '.join(absent)}; fetch them")
            return [folder / name for name in names]
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of shards)")


def open_hub_weights(folder: Path) -> dict[str, Stored]:
    """Raw name -> tensor of a hub folder.  Only headers are read here.

    Raises:
        UserError: a file is missing, cut off, of an unknown dtype, or a name occurs twice.
    """
    tensors: dict[str, Stored] = {}
    for path in weight_files(folder):
        entries = open_weight_file(path)
        twice = sorted(set(entries) & set(tensors))
        if twice:
            raise UserError(f"{path}: {twice[0]} is also in {tensors[twice[0]].origin}")
        tensors |= entries
    return tensors


# ---------------------------------------------------------------- names

# A rule: (pattern at the begin of a raw name, what stands there in hub LLaVA files).  The first match counts.
_LLM_RULES = [
    (r"model\.(?!language_model|vision_tower|multi_modal)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
]
_LLAVA_RULES = [
    (r"language_model\.(?=model\.|lm_head\.)", "language_model."),  # hub files
    (r"vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),  # transformers 5 writes no vision_model
    (r"multi_modal_projector\.", "multi_modal_projector."),
    (r"(?:model\.)?image_newline$", "image_newline"),
    (r"model\.language_model\.", "language_model.model."),  # as in memory in transformers 5
    (r"model\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"lm_head\.", "language_model.lm_head."),
]
_TOWER_RULES = [(r"(?:vision_model\.)?", "vision_tower.vision_model.")]
# liuhaotian's original layout: the LLM's names are those of an LLM, the rest stands below `model.` beside them.
_ORIGINAL_RULES = [
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.mm_projector\.(?=(?:weight|bias)$)", "multi_modal_projector.linear_1."),  # a linear projector
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.image_newline$", "image_newline"),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
]
# mm_projector.bin, as the original code saves it (with `base_model.model.` while LoRA wraps the model), or bare.
_WRAPPED = r"(?:base_model\.model\.)?(?:model\.)?"
_PROJECTOR_RULES = [
    (_WRAPPED + r"(?:mm_projector\.)?0\.", "multi_modal_projector.linear_1."),
    (_WRAPPED + r"(?:mm_projector\.)?2\.", "multi_modal_projector.linear_2."),
    (_WRAPPED + r"(?:mm_projector\.)?(?=(?:weight|bias)$)", "multi_modal_projector.linear_1."),
    (_WRAPPED + r"multi_modal_projector\.", "multi_modal_projector."),
]
RULES = {
    "LLM": _LLM_RULES,
    "LLaVA": _LLAVA_RULES,
    "tower": _TOWER_RULES,
    "original LLaVA": _ORIGINAL_RULES,
    "projector": _PROJECTOR_RULES,
}

# Names that may be there and are not weights of a LLaVA: buffers that the config determines, and, beside a
# tower, a text tower and the projections into the shared space.
IGNORED = {
    "LLM": r".*\.rotary_emb\.inv_freq",
    "LLaVA": r".*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids",
    "tower": r"(?:.*\.)?embeddings\.position_ids|text_model\..*|logit_(?:scale|bias)"
    r"|(?:text|visual)_projection\.weight",
    "original LLaVA": r".*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids",
    "projector": r"(?!)",
}


def hub_name(kind: str, raw: str) -> str | None:
    """Name in hub LLaVA files of a tensor found in a source of this kind (a name of RULES); None when unknown."""
    for pattern, replacement in RULES[kind]:
        found = re.match(pattern, raw)
        if found:
            return replacement + raw[found.end() :]
    return None


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{layer}.", name)


def account(kind: str, source: Mapping[str, Stored], wanted: Iterable[HubTensor]) -> dict[str, Stored]:
    """Hub name -> tensor for every wanted tensor, every name of the source accounted for.

    Raises:
        UserError: names are unknown, missing or left over, or a shape differs; all of them listed.
    """
    shapes = {tensor.name: tensor.shape for tensor in wanted}
    known = {_pattern(name) for name in shapes}
    unknown, left_over, wrong = [], [], []
    found: dict[str, Stored] = {}
    for raw, stored in source.items():
        if re.fullmatch(IGNORED[kind], raw):
            continue
        name = hub_name(kind, raw)
        if name is None or _pattern(name) not in known:
            unknown.append(raw)  # no name that the config could ever want
        elif name not in shapes or name in found:
            left_over.append(raw)  # another layer, a duplicate
        else:
            found[name] = stored
            if stored.shape != shapes[name]:
                wrong.append(another_shape(raw, stored.shape, shapes[name], "the config says"))
            if stored.dtype not in DTYPE_NAMES:
                wrong.append(f"{raw} is {stored.dtype}, wanted float32, float16 or bfloat16")
    missing = [name for name in shapes if name not in found]
    origins = sorted({stored.origin for stored in source.values()})
    files = ", ".join(origins[:3]) + (", ..." if len(origins) > 3 else "")
    check_nothing_differs(
        f"the weights in {files} do not fit their config",
        {MISSING: missing, UNKNOWN: unknown, LEFT_OVER: left_over, WRONG: wrong},
    )
    return found


# ---------------------------------------------------------------- writing


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype; the tensor itself when it has that dtype already.

    Raises:
        UserError: fp16 cannot hold a value.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(torch.isfinite(result), torch.isfinite(tensor)):
        raise UserError(f"{name} holds values up to {tensor.abs().max():g}, which fp16 cannot hold; pass bf16 or fp32")
    return result


def _file_header(tensors: Sequence[HubTensor], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        stop = offset + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    tensors: Sequence[HubTensor],
    dtype: torch.dtype,
    blocks: Callable[[HubTensor], Iterator[Tensor | FileSpan]],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one safetensors file, block by block.

    Args:
        blocks: yields the rows of a tensor from first to last, in any number of blocks; or where their bytes lie.
        advance: called with the number of bytes just written.
    """
    with open(path, "wb") as file:
        file.write(_file_header(tensors, dtype))
        written = dict.fromkeys((tensor.name for tensor in tensors), 0)
        for name, block in ahead((tensor.name, block) for tensor in tensors for block in blocks(tensor)):
            begin = file.tell()
            if isinstance(block, FileSpan):
                file.flush()
                block.copy_to(file.fileno(), begin)
                file.seek(begin + block.nbytes)
            else:
                block = block.to(dtype)
                file.write(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))
            start_writing_back(file.fileno(), begin, block.nbytes)
            written[name] += block.nbytes
            advance(block.nbytes)
        for tensor in tensors:
            wanted = math.prod(tensor.shape) * dtype.itemsize
            assert written[tensor.name] == wanted, f"{tensor.name}: {written[tensor.name]} of {wanted} bytes written"
        file.flush()
        os.fsync(file.fileno())


def write_hub_weights(
    folder: Path,
    tensors: Sequence[HubTensor],
    dtype: torch.dtype,
    blocks: Callable[[HubTensor], Iterator[Tensor | FileSpan]],
    advance: Callable[[int], None],
    shard_bytes: int = 5 * 10**9,
) -> list[str]:
    """Write model.safetensors, or shards of at most shard_bytes (one tensor at least) with their index.

    Returns:
        The names of the weight files.
    """
    shards: list[list[HubTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, dtype, blocks, advance)
    if count > 1:
        total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names
