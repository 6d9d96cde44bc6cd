"""What checkpoint folders hold, read without Megatron and without running anything that a pickle asks for.

Two formats lie below CKPT/release or CKPT/iter_0000010, and both the trainer and the converter look into them:
  torch_dist  `.metadata` names every tensor with its global shape
  torch       one `mp_rank_XX[_YYY]/model_optim_rng.pt` per tensor-parallel (and pipeline-parallel) rank
"""

import functools
import hashlib
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from megatron_patch.errors import UserError
from megatron_patch.file_window import FileWindow
from megatron_patch.lora import LoraRecord

if TYPE_CHECKING:
    from torch.distributed.checkpoint import metadata as dcp

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
# Entries of a trainer's checkpoint that are no weights of the model begin with these.
NOT_WEIGHTS = ("optimizer", "opt_param_scheduler", "chained_", "rng_state", "rerun_state", "common_state")
_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")


class _Inert:
    """Stands for classes that carry nothing we read: plans of the ranks that wrote it, arguments, optimizer state."""

    def __init__(self, *values: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __call__(self, *values: object, **named: object) -> "_Inert":
        return _Inert()

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass

    def __setitem__(self, name: object, value: object) -> None:
        pass


# ---------------------------------------------------------------- which folder, which format


def rank_folders(iteration: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, pipeline rank) -> file of a per-rank checkpoint; empty when the folder is none.

    Raises:
        UserError: ranks are missing, or names with and without a pipeline rank are mixed.
    """
    found: dict[tuple[int, int], Path] = {}
    kinds = set()
    for path in iteration.glob("mp_rank_*"):
        match = _RANK_FOLDER.fullmatch(path.name)
        if match is None or not (path / RANK_FILE).is_file():
            raise UserError(f"{path}: wanted mp_rank_XX or mp_rank_XX_YYY with {RANK_FILE} in it")
        kinds.add(match[2] is not None)
        found[int(match[1]), int(match[2] or 0)] = path / RANK_FILE
    if len(kinds) > 1:
        raise UserError(f"{iteration} mixes mp_rank_XX and mp_rank_XX_YYY: two checkpoints in one folder")
    if found:
        tensor, pipeline = (max(numbers) + 1 for numbers in zip(*found, strict=True))
        missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in found]
        if missing:
            names = ", ".join(rank_folder_name(t, p, True) for t, p in missing[:4])
            raise UserError(f"{iteration} is not whole: of TP {tensor} x PP {pipeline} ranks {names} are missing")
    return found


def rank_folder_name(tensor_rank: int, pipeline_rank: int, pipeline: bool) -> str:
    """Megatron's name of a rank's folder (get_checkpoint_name): the pipeline rank only where there is a pipeline."""
    return f"mp_rank_{tensor_rank:02d}" + (f"_{pipeline_rank:03d}" if pipeline else "")


def checkpoint_format(iteration: Path) -> str | None:
    """torch_dist, torch, or None when the folder is no whole checkpoint."""
    if (iteration / ".metadata").is_file():
        return "torch_dist"
    return "torch" if any(iteration.glob(f"mp_rank_*/{RANK_FILE}")) else None


def newest_iteration(checkpoint: Path) -> Path:
    """Folder of the newest iteration of a CKPT folder, as its tracker file says.

    Raises:
        UserError: no tracker, or no such folder, or of no known format.
    """
    tracker = checkpoint / TRACKER
    if not tracker.is_file():
        raise UserError(f"{checkpoint} is no Megatron checkpoint: it has no {TRACKER}")
    text = tracker.read_text().strip()
    if text != "release" and not text.isdecimal():
        raise UserError(f"{tracker} says {text!r}; wanted 'release' or an iteration number")
    folder = checkpoint / ("release" if text == "release" else f"iter_{int(text):07}")
    if checkpoint_format(folder) is None:
        raise UserError(
            f"{tracker} says {text!r}, but {folder} is no whole checkpoint (neither .metadata nor mp_rank_*)"
        )
    return folder


PIECE = 64 << 20  # bytes that one thread hashes at a time


def fingerprint(iteration: Path) -> str:
    """SHA-256 over names and content of an iteration's files, in pieces that all cores share.

    Two folders have the same one when they hold the same files; times and places do not count.
    """
    files = sorted(path for path in iteration.rglob("*") if path.is_file())
    pieces = [(path, begin) for path in files for begin in range(0, max(path.stat().st_size, 1), PIECE)]

    def hash_of(piece: tuple[Path, int]) -> str:
        path, begin = piece
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), PIECE, begin)
        return f"{path.relative_to(iteration)} {begin} {hashlib.sha256(data).hexdigest()}\n"

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return hashlib.sha256("".join(pool.map(hash_of, pieces)).encode()).hexdigest()


def base_of(checkpoint: Path, record: LoraRecord, folder: Path | None = None) -> Path:
    """Folder of the iteration that the adapters in a checkpoint were trained on.

    Args:
        folder: of the base checkpoint, where it no longer lies where training found it.
    Raises:
        UserError: it is not there, or is not the one.
    """
    base = (folder or Path(record.base)) / record.iteration
    if checkpoint_format(base) is None:
        raise UserError(
            f"{checkpoint} holds adapters, and their base is not there: no whole checkpoint in {base}; put it back, or "
            "name its folder (BASE_CKPT_PATH of an export)"
        )
    if (found := fingerprint(base)) != record.sha256:
        raise UserError(
            f"{base} is not the base that the adapters in {checkpoint} were trained on: its SHA-256 is "
            f"{found[:12]}..., wanted {record.sha256[:12]}...; name the folder of that one"
        )
    return base


# ---------------------------------------------------------------- torch_dist


@functools.cache
def accept_newer_metadata() -> None:
    """Have this torch read what a newer one wrote of tensors; later calls do nothing.

    TensorProperties are saved as a tuple that has grown at its end: torch 2.15 added the strides, which no whole tensor
    needs, and 2.14 refuses the longer tuple.
    """
    from torch.distributed.checkpoint.metadata import TensorProperties

    known, read = len(TensorProperties().__getstate__()), TensorProperties.__setstate__
    TensorProperties.__setstate__ = lambda self, state: read(self, state[:known])


@functools.cache
def _metadata_classes() -> dict[tuple[str, str], object]:
    """(module, name) -> what stands for it, of all that a .metadata file may name."""
    # Imported here: it takes a second, in which the launchers' check would only look for a folder.
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    accept_newer_metadata()
    data_classes = (
        dcp.Metadata,
        dcp.TensorStorageMetadata,
        dcp.BytesStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.MetadataIndex,
        dcp.TensorProperties,
        dcp.StorageMeta,
        dcp._MEM_FORMAT_ENCODING,
    )
    return {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _Inert,
        ("torch.distributed.checkpoint.planner", "SavePlan"): _Inert,
        ("torch.distributed.checkpoint.planner", "WriteItem"): _Inert,
        ("torch.distributed.checkpoint.planner", "WriteItemType"): _Inert,
        ("torch.distributed.checkpoint.planner", "TensorWriteData"): _Inert,
        ("torch.distributed.checkpoint.planner", "BytesIOWriteData"): _Inert,
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Inert,
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Inert,
        ("collections", "OrderedDict"): dict,
        ("pathlib", "PosixPath"): str,
        ("pathlib", "Path"): str,
        ("pathlib._local", "PosixPath"): str,
    } | {("torch.distributed.checkpoint.metadata", kind.__name__): kind for kind in data_classes}


class _MetadataUnpickler(pickle.Unpickler):
    """Allows the metadata's own data classes and nothing else: a checkpoint must not be able to run code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _metadata_classes():
            return _metadata_classes()[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UserError(f"the checkpoint's .metadata asks for {module}.{name}, which no checkpoint needs; not read")


def read_metadata(iteration: Path) -> "dcp.Metadata":
    """The metadata of a torch_dist folder.

    Raises:
        UserError: it cannot be read, or asks for a class that no checkpoint needs.
    """
    try:
        with open(iteration / ".metadata", "rb") as file:
            return _MetadataUnpickler(file).load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{iteration}/.metadata cannot be read: {error}") from None


def read_tensors(iteration: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Whole tensors of a torch_dist folder whose names begin so, each as the checkpoint holds it; no extra states.

    Raises:
        UserError: the format is another one, or a tensor is not there whole.
    """
    from torch.distributed.checkpoint import metadata as dcp

    if checkpoint_format(iteration) != "torch_dist":
        raise UserError(f"{iteration}: is of Megatron's format torch; convert the checkpoint to torch_dist")
    metadata = read_metadata(iteration)
    found = {}
    for key, entry in metadata.state_dict_metadata.items():
        is_tensor = isinstance(entry, dcp.TensorStorageMetadata) and not key.endswith("_extra_state")
        if not is_tensor or not key.startswith(prefix):
            continue
        whole = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            place = metadata.storage_data[dcp.MetadataIndex(key, chunk.offsets)]
            try:
                with open(iteration / place.relative_path, "rb") as file:
                    data = io.BytesIO(os.pread(file.fileno(), place.length, place.offset))
                part = torch.load(data, map_location="cpu", weights_only=True).reshape(tuple(chunk.sizes))
            except (OSError, RuntimeError, EOFError, *STRANGE) as error:
                raise UserError(f"{iteration}: {key} cannot be read ({error}); copy the checkpoint again") from None
            box = tuple(slice(low, low + size) for low, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = part
            covered += part.numel()
        if covered != whole.numel():
            raise UserError(f"{iteration}: {key} is incomplete: {covered} of {whole.numel()} values are stored")
        found[key] = whole
    return found


# ---------------------------------------------------------------- files of torch.save

# What reading a file that is none of torch.save's, or holds more than tensors, may raise.
STRANGE = (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class ArchiveEntry:
    """One record of an archive: where its bytes stand in the file, and how many; stored: not compressed."""

    position: int
    nbytes: int
    stored: bool


def archive_entries(descriptor: int, begin: int, length: int) -> dict[str, ArchiveEntry]:
    """Records of the zip archive in [begin, begin + length) of a file, by name without the archive's own folder.

    Raises:
        zipfile.BadZipFile: there is no archive.
    """
    with zipfile.ZipFile(FileWindow(descriptor, begin, length)) as archive:
        entries = archive.infolist()
    records = {}
    for entry in entries:
        header = os.pread(descriptor, 30, begin + entry.header_offset)  # a zip's local file header
        name_bytes, extra_bytes = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        position = begin + entry.header_offset + 30 + name_bytes + extra_bytes
        stored = entry.compress_type == zipfile.ZIP_STORED
        records[entry.filename.partition("/")[2]] = ArchiveEntry(position, entry.file_size, stored)
    return records


def content(descriptor: int, record: ArchiveEntry) -> bytes:
    """Bytes of a record.  Not ZipFile.read: it refuses records without a checksum."""
    return os.pread(descriptor, record.nbytes, record.position)


def fill(tensor: torch.Tensor, descriptor: int, position: int) -> None:
    """Overwrite a contiguous tensor in a CPU's memory with the bytes of a file from `position` on.

    Raises:
        OSError: the file ends before the tensor does.
    """
    if tensor.numel() == 0:  # Python makes no bytes of nothing
        return
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            raise OSError(f"file ended {len(view)} bytes early")
        view, position = view[count:], position + count


class _StateDict(dict):
    """A state dict, which may carry attributes (`_metadata`)."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as a pickle of torch.save describes it; first: its first element within the storage."""

    storage: str
    record: str
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        return _STORAGE_DTYPES.get(self.storage)

    @property
    def count(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def in_order(self) -> bool:
        """Do its bytes stand one after the other?"""
        expected = self.count
        for size, stride in zip(self.shape, self.stride, strict=True):
            expected //= max(size, 1)
            if size > 1 and stride != expected:
                return False
        return True


class TensorFacts(pickle.Unpickler):
    """Reads a pickle of torch.save with SavedTensor in place of tensors; runs nothing.

    lenient: classes that are no tensors become inert; else they are an error.
    """

    def __init__(self, data: bytes, lenient: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self._lenient = lenient

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, size, stride, *rest: SavedTensor(*storage, first, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return _StateDict
        if module == "torch" and name.endswith("Storage"):
            return name
        if self._lenient:
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")

    def persistent_load(self, identifier: tuple) -> object:
        return identifier[1], identifier[2]  # storage type, record


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor in a file: its bytes stand in order from `position` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int


class TensorArchive:
    """What torch.save wrote in [begin, begin + length) of an open file: its pickle, and where the tensors' bytes stand.

    saved: the object that was saved, with SavedTensor in place of tensors.
    Raises zipfile.BadZipFile when there is no archive, and whatever a strange pickle may raise.
    """

    def __init__(
        self, descriptor: int, begin: int, length: int, facts: Callable[[bytes], TensorFacts] = TensorFacts
    ) -> None:
        """facts: reads the pickle."""
        self._records = archive_entries(descriptor, begin, length)
        order = self._records.get("byteorder")
        self._readable = order is None or content(descriptor, order) == b"little"
        self.saved: Any = facts(content(descriptor, self._records["data.pkl"])).load()

    def storage(self, tensor: SavedTensor) -> ArchiveEntry | None:
        """The bytes that hold the tensor, its own or those of a larger one; None: not as they are in memory."""
        record = self._records.get(f"data/{tensor.record}")
        return record if record is not None and record.stored and self._readable else None

    def place(self, tensor: SavedTensor) -> PlacedTensor | None:
        """Where the tensor's bytes stand; None: not in order, or of a dtype that is not known here."""
        record = self.storage(tensor)
        if record is None or tensor.dtype is None or not tensor.in_order:
            return None
        first, last = (tensor.dtype.itemsize * number for number in (tensor.first, tensor.first + tensor.count))
        return PlacedTensor(tensor.dtype, tensor.shape, record.position + first) if last <= record.nbytes else None


def read_rank_file(path: Path) -> dict[str, PlacedTensor]:
    """Name -> place of the model's tensors in one model_optim_rng.pt.  Only its pickle is read.

    Raises:
        UserError: the file is cut off or no such file, or was written by an interleaved pipeline.
    """
    try:
        with open(path, "rb") as file:
            archive = TensorArchive(file.fileno(), 0, path.stat().st_size, partial(TensorFacts, lenient=True))
        if "model0" in archive.saved:
            raise UserError(f"{path} comes from an interleaved pipeline (model0, model1, ...), which is not read here")
        model = archive.saved["model"]
    except UserError:
        raise
    except Exception as error:  # whatever a pickle that is cut off or strange may raise
        raise UserError(f"{path} is no whole file of Megatron's format torch: {error!r}; write it again") from None
    found = {}
    for name, tensor in model.items():
        if not isinstance(tensor, SavedTensor):
            continue  # an extra state
        place = archive.place(tensor)
        if place is None:
            raise UserError(f"{path}: {name} is stored as {tensor.storage} in an order or dtype that is not read here")
        found[name] = place
    return found


class _ArgumentFacts(TensorFacts):
    """Reads arguments too: a namespace of plain values."""

    def find_class(self, module: str, name: str) -> object:
        return SimpleNamespace if (module, name) == ("argparse", "Namespace") else super().find_class(module, name)


def read_arguments(iteration: Path) -> dict[str, Any]:
    """Megatron's arguments with which a checkpoint was written, those that are numbers, texts, flags or None.

    Empty where it holds none, as the converter's.

    Raises:
        UserError: the file that should hold them is cut off or strange.
    """
    facts = partial(_ArgumentFacts, lenient=True)
    file = iteration
    try:
        if checkpoint_format(iteration) == "torch":
            file = next(iter(rank_folders(iteration).values()))
            span = (0, file.stat().st_size)
        else:
            places = {index.fqn: place for index, place in read_metadata(iteration).storage_data.items()}
            place = next(place for name, place in places.items() if name.startswith("common_state"))
            file, span = iteration / place.relative_path, (place.offset, place.length)
        with open(file, "rb") as opened:
            saved = TensorArchive(opened.fileno(), *span, facts).saved
        state = saved[0] if isinstance(saved, list) else saved
        arguments = state.get("args")
    except StopIteration:
        return {}
    except UserError:
        raise
    except Exception as error:  # whatever a pickle that is cut off or strange may raise
        raise UserError(f"{file}: the run's arguments cannot be read ({error!r}); copy the checkpoint again") from None
    plain = (bool, int, float, str, type(None))
    found = vars(arguments) if isinstance(arguments, SimpleNamespace) else {}
    return {name: value for name, value in found.items() if isinstance(value, plain)}
