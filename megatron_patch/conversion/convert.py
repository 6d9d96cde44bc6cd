"""The two directions: hub folders -> Megatron checkpoint, and back."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint_files import NOT_WEIGHTS, TRACKER, newest_iteration
from megatron_patch.conversion import hub_files, original_layout
from megatron_patch.conversion.adapters import (
    ADAPTER_LAYOUTS,
    MergedReader,
    export_adapters,
    open_weights,
)
from megatron_patch.conversion.additions import Additions, read_tokens
from megatron_patch.conversion.hub_weights import (
    PRECISIONS,
    FileSpan,
    Stored,
    account,
    cast,
    open_weight_file,
    row_blocks,
    write_hub_weights,
    write_safetensors,
)
from megatron_patch.conversion.layouts import LAYOUTS
from megatron_patch.conversion.model_card import weight_hashes, write_model_card
from megatron_patch.conversion.output import check_disk, check_target, progress_bar, staged_folder
from megatron_patch.conversion.plan import make_plan, wanted_tensors
from megatron_patch.conversion.table import HubTensor, Row, extra_states, table_of_weights, untrained_tower
from megatron_patch.conversion.torch_dist import CheckpointReader, CheckpointWriter, Chunk
from megatron_patch.conversion.torch_ranks import RanksReader, RanksWriter
from megatron_patch.conversion.transforms import QueryKeyValue
from megatron_patch.errors import UserError
from megatron_patch.geometry import LanguageGeometry, check_known, read_geometry
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.model_sizes import check_model_size
from megatron_patch.weight_names import EMBEDDING, UNKNOWN, WRONG, check_nothing_differs, differences, without_padding

FORMATS = ("torch_dist", "torch")
Reader = CheckpointReader | RanksReader | MergedReader
SMALL_SPAN = 64 * 2**10  # bytes; below that reading and writing is as fast as having the kernel copy


@dataclass
class Report:
    """What a conversion did."""

    target: Path
    nbytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        speed = self.nbytes / 1e9 / max(self.seconds, 1e-9)
        return f"{self.nbytes / 1e9:.3f} GB of weights in {self.seconds:.1f} s ({speed:.2f} GB/s) -> {self.target}"


def precision_dtype(precision: str) -> torch.dtype:
    """The dtype of a PR; UserError when there is none."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; wanted one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


# ---------------------------------------------------------------- hub -> Megatron


def _chunks(row: Row, weights: dict[str, Stored], dtype: torch.dtype) -> Iterator[Chunk]:
    """The row's tensor as boxes small enough to be made one after the other."""
    shapes, rest = row.part_shapes, row.joined_shape[1:]
    for layer, names in row.slots():
        prefix, one = ((layer,), (1,)) if layer is not None else ((), ())
        if row.transform.first_row(0, shapes) is None:

            def join(names: list[str] = names) -> Tensor:
                return row.transform.join([cast(weights[name].read(), dtype, name) for name in names])

            yield Chunk((*prefix, *(0 for _ in row.joined_shape)), (*one, *row.joined_shape), join)
            continue
        for part, name in enumerate(names):
            begin = row.transform.first_row(part, shapes)
            for first, last in row_blocks(shapes[part], dtype):

                def read(name: str = name, first: int = first, last: int = last) -> Tensor:
                    return cast(weights[name].read_rows(first, last), dtype, name)

                yield Chunk((*prefix, begin + first, *(0 for _ in rest)), (*one, last - first, *rest), read)


def _write_checkpoint(
    writer: CheckpointWriter | RanksWriter,
    rows: list[Row],
    weights: dict[str, Stored],
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    with writer:
        for row in rows:
            writer.add_tensor(row.key, row.shape, list(_chunks(row, weights, dtype)), advance)
        for key, shards in extra_states(rows).items():
            for shard in range(shards):
                writer.add_object(key, None, shard, shards)
        writer.finish()


def _versions() -> dict[str, str]:
    names = ("torch", "safetensors", "transformers", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def provenance_text(direction: str, sources: dict[str, Path], arguments: dict[str, Any], facts: dict[str, Any]) -> str:
    """provenance.json: what was made, when, by which versions, out of what."""
    value = {
        "direction": direction,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": arguments,
        "versions": _versions(),
        "sources": {role: hub_files.fingerprint(path) for role, path in sources.items()},
        **facts,
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _limits(language: LanguageGeometry) -> list[str]:
    """What the user should know about the LLM beyond its weights."""
    window = language.sliding_window
    if window and window < language.max_positions:
        return [f"the LLM attends to the last {window} tokens only: sequences up to that length are exact"]
    return []


def convert_to_megatron(
    source_llm: str | Path,
    source_clip: str | Path | None,
    target: str | Path,
    *,
    model_size: str,
    precision: str,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    projector: str | None = None,
    mm_projector: str | Path | None = None,
    add_tokens: Sequence[str] = (),
    vision_feature_layer: int | None = None,
    kind: str | None = None,
    seed: int | None = None,
    checkpoint_format: str = "torch_dist",
    progress: bool = False,
) -> Report:
    """Write a Megatron checkpoint from an LLM folder and a CLIP folder, or from a whole LLaVA folder.

    Args:
        source_llm: folder of an LLM of LANGUAGE_MODELS, of a LLaVA (then source_clip is None), or of a LLaVA
            in the original layout (then source_clip is needed when the tower is not inside).
        source_clip: folder of a CLIP or SigLIP, with or without its text tower.
        target: a folder that does not exist yet or is empty.
        model_size: a name of model_sizes.MODEL_SIZES, checked against the LLM.
        precision: fp16, bf16 or fp32; bytes are copied untouched where the source has it already.
        tensor_parallel, pipeline_parallel: checked against the model.
        projector: kind of the new projector, mlp2x_gelu (None) or linear; refused with a LLaVA, which brings its own.
        mm_projector: an mm_projector.bin to start from, instead of a new projector.
        add_tokens: special tokens (see additions.read_tokens) for tokenizer, embedding and head.
        vision_feature_layer: hidden layer of source_clip that the projector sees; None: what the tower's row says.
        kind: of LLAVA_KINDS, of a LLaVA made from an LLM and a tower; None: llava, which is 1.5.
        seed: of the new projector's weights; None: 1234.  Refused where there is no new one.
        checkpoint_format: torch_dist, read at any TP and PP; or torch, files for the ranks of this TP and PP alone.
        progress: show a bar on stderr.
    Raises:
        UserError: nothing was written.
    """
    began = time.monotonic()
    llm, target = Path(source_llm), Path(target)
    clip = None if source_clip is None else Path(source_clip)
    dtype = precision_dtype(precision)
    projector_file = None if mm_projector is None else Path(mm_projector)
    additions = Additions(
        read_tokens(add_tokens), projector, projector_file, seed, feature_layer=vision_feature_layer, kind=kind
    )
    check_known("checkpoint format", checkpoint_format, FORMATS)
    check_target(target)
    plan = make_plan(llm, clip, precision, additions)
    geometry = plan.geometry
    check_model_size(model_size, geometry.language.parameters)
    geometry.check_parallel(tensor_parallel, pipeline_parallel)

    plan.notes.extend(_limits(geometry.language))

    carried = untrained_tower(geometry.tower)
    nbytes = sum(math.prod(tensor.shape) for tensor in wanted_tensors(plan.rows, geometry)) * dtype.itemsize
    check_disk(target, nbytes)
    notes = list(plan.notes)
    with staged_folder(target) as folder:
        llava = LlavaFolder.of(folder)
        hub = llava.path
        notes += hub_files.write_hub_folder(hub, plan.config, plan.tokens, llm, plan.tower_folder)
        if plan.original is not None:
            original_layout.save_text_files(plan.original, llava.original, with_tokenizer=not additions.tokens)
        with progress_bar(nbytes, "hub -> Megatron", progress) as advance:
            release = folder / "release"
            if checkpoint_format == "torch":
                writer = RanksWriter(release, dtype, plan.rows, tensor_parallel, pipeline_parallel)
            else:
                writer = CheckpointWriter(release, dtype)
            _write_checkpoint(writer, plan.rows, plan.weights, dtype, advance)

            def blocks(tensor: HubTensor) -> Iterator[Tensor]:
                yield cast(plan.weights[tensor.name].read(), dtype, tensor.name)

            write_safetensors(llava.untrained_tower, carried, dtype, blocks, advance)
        arguments = {
            "model_size": model_size,
            "precision": precision,
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "kind": geometry.model_type,
            "projector": geometry.projector_type,
            "mm_projector": projector_file and projector_file.name,
            "add_tokens": list(additions.tokens),
            "seed": seed,
            "checkpoint_format": checkpoint_format,
        }
        text = provenance_text("huggingface to megatron", plan.sources, arguments, plan.facts | {"notes": notes})
        llava.write_provenance(text)
        if plan.trained_with is not None:
            llava.write_training_settings(plan.trained_with)
        (folder / TRACKER).write_text("release\n")
    return Report(target, nbytes, time.monotonic() - began, notes)


# ---------------------------------------------------------------- Megatron -> hub


def _check_keys(reader: Reader, rows: list[Row], folder: Path) -> None:
    """Every key of the checkpoint accounted for, shapes as the table says (the vocabulary may be padded).

    Raises:
        UserError: with the lists of unknown and missing keys and wrong shapes.
    """
    wanted = {row.key: row for row in rows}
    stored = {key: entry for key, entry in reader.tensors.items() if not key.startswith(NOT_WEIGHTS)}
    per_layer = [key for key in stored if any(part.isdecimal() for part in key.split("."))]
    if per_layer:
        raise UserError(
            f"{folder} holds its layers one by one ({per_layer[0]}, ...); this converter reads stacked layers, which "
            "Megatron writes unless its layers are declared non-homogeneous: load and save it once without that"
        )
    shapes = {key: row.shape for key, row in wanted.items()}
    found = without_padding({key: entry.size for key, entry in stored.items()}, shapes, shapes[EMBEDDING][0])
    lists = differences(found, shapes, "config.json says")
    lists[UNKNOWN] += [key for key in reader.objects if "_extra_state" not in key and not key.startswith(NOT_WEIGHTS)]
    for key, entry in stored.items():
        if key in wanted and entry.properties.dtype not in PRECISIONS.values():
            lists[WRONG].append(f"{key} has dtype {entry.properties.dtype}")
    check_nothing_differs(f"the weights in {folder} do not fit {LlavaFolder.of(folder.parent).config}", lists)


def _check_same_llm(ours: dict[str, Any], checkpoint: Path, hf_checkpoint: Path) -> None:
    """Refuse an HF_CKPT_PATH that is another LLM than the checkpoint's."""
    if hub_files.model_type(hf_checkpoint).startswith("llava") and original_layout.is_original(hf_checkpoint):
        theirs = original_layout.read_original(hf_checkpoint).text_config().to_dict()
    else:
        theirs = hub_files.full_config(hf_checkpoint)
        theirs = theirs.get("text_config", theirs)
    names = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
    )
    text = ours["text_config"]
    wrong = [f"{name} is {theirs.get(name)}, not {text.get(name)}" for name in names if theirs.get(name) != text[name]]
    if theirs.get("vocab_size", 0) > text["vocab_size"]:
        wrong.append(f"vocab_size is {theirs['vocab_size']}, more than {text['vocab_size']}")
    if wrong:
        raise UserError(f"{hf_checkpoint} is not the model that {checkpoint} came from: {'; '.join(wrong)}")


def _spans(
    reader: Reader, row: Row, layer: int | None, part: int, rows: int, dtype: torch.dtype
) -> list[FileSpan] | None:
    """Where the bytes of a hub tensor's first `rows` rows lie in the checkpoint (an original folder had fewer than a
    vocabulary that grew).  None when they must be cast, reordered or are too small for it to pay."""
    if isinstance(reader, RanksReader) or reader.tensors[row.key].properties.dtype != dtype:
        return None
    shape = row.part_shapes[part]
    begin = row.transform.first_row(part, row.part_shapes)
    if begin is not None:
        runs = [(begin, rows)]
    elif isinstance(row.transform, QueryKeyValue):
        runs = row.transform.runs(part, row.part_shapes)
    else:
        return None
    if math.prod(shape) * dtype.itemsize // len(runs) < SMALL_SPAN:
        return None
    found: list[FileSpan] = []
    for run, count in runs:
        for first, last in row_blocks((count, *shape[1:]), dtype):
            spans = reader.spans(row.key, layer, run + first, run + last)
            if spans is None:
                return None
            found += spans
    return found


def _hub_blocks(
    reader: Reader, rows: list[Row], carried: dict[str, Stored], dtype: torch.dtype
) -> Callable[[HubTensor], Iterator[Tensor | FileSpan]]:
    """A function that yields the rows of any hub tensor in blocks, or where their bytes lie in the checkpoint."""
    places = {
        name: (row, layer, part) for row in rows for layer, names in row.slots() for part, name in enumerate(names)
    }
    joined: dict[tuple[str, int | None], list[Tensor]] = {}  # the last mixed tensor: its parts are asked for in turn

    def blocks(tensor: HubTensor) -> Iterator[Tensor | FileSpan]:
        if tensor.name in carried:
            yield cast(carried[tensor.name].read(), dtype, tensor.name)
            return
        row, layer, part = places[tensor.name]
        spans = _spans(reader, row, layer, part, tensor.shape[0], dtype)
        if spans is not None:
            for span in spans:
                span.read_ahead()
                yield span
            return
        prefix, one = ((layer,), (1,)) if layer is not None else ((), ())
        begin, rest = row.transform.first_row(part, row.part_shapes), row.joined_shape[1:]
        if begin is None:
            if (row.key, layer) not in joined:
                joined.clear()
                zeros = tuple(0 for _ in row.joined_shape)
                whole = reader.read(row.key, (*prefix, *zeros), (*one, *row.joined_shape)).reshape(row.joined_shape)
                joined[row.key, layer] = row.transform.split(whole, row.part_shapes)
            yield cast(joined[row.key, layer][part], dtype, tensor.name)
            return
        for first, last in row_blocks(tensor.shape, torch.float32):
            offset = (*prefix, begin + first, *(0 for _ in rest))
            yield cast(reader.read(row.key, offset, (*one, last - first, *rest)), dtype, tensor.name)

    return blocks


def convert_to_huggingface(
    checkpoint: str | Path,
    target: str | Path,
    *,
    model_size: str,
    precision: str,
    hf_checkpoint: str | Path | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    layout: str = "hub",
    tower_name: str | None = None,
    base: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> Report:
    """Write a LLaVA folder from the newest iteration of a Megatron checkpoint.

    Args:
        checkpoint: folder with latest_checkpointed_iteration.txt and llava/, written by the converter or the trainer.
        target: a folder that does not exist yet or is empty.
        model_size, precision, tensor_parallel, pipeline_parallel, progress: as in convert_to_megatron.
        hf_checkpoint: folder of the LLM or LLaVA that the checkpoint came from; another geometry is refused.
        layout: a name of LAYOUTS, which merge adapters, or of ADAPTER_LAYOUTS.
        tower_name: in the original layouts, the vision tower's name; None: found out.
        base: of adapters: folder of their base checkpoint, where it no longer lies where training found it.
        shard_bytes: largest size of one weight file.
    Raises:
        UserError: nothing was written.
    """
    began = time.monotonic()
    checkpoint, target = Path(checkpoint), Path(target)
    dtype = precision_dtype(precision)
    check_known("layout", layout, (*LAYOUTS, *ADAPTER_LAYOUTS))
    check_target(target)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not a folder; wanted a Megatron checkpoint with its llava/ folder")
    llava = LlavaFolder.of(checkpoint)
    hub = llava.path
    iteration = newest_iteration(checkpoint)
    config = hub_files.read_json(llava.config)
    geometry = read_geometry(config)
    if base is not None and llava.lora is None:
        raise UserError(f"{checkpoint} holds whole weights, which have no base; leave the base {base} out")
    hf_folder = None if hf_checkpoint is None else Path(hf_checkpoint)
    if layout in ADAPTER_LAYOUTS:
        check_model_size(model_size, geometry.language.parameters)
        if hf_folder is not None:
            _check_same_llm(config, checkpoint, hf_folder)
        nbytes, notes = export_adapters(checkpoint, target, layout, precision, hf_folder, tower_name)
        return Report(target, nbytes, time.monotonic() - began, notes)
    export = LAYOUTS[layout](hub, config, geometry, precision, tower_name=tower_name)
    rows = table_of_weights(geometry)
    check_model_size(model_size, geometry.language.parameters)
    geometry.check_parallel(tensor_parallel, pipeline_parallel)
    if hf_folder is not None:
        _check_same_llm(config, checkpoint, hf_folder)
    tower_file = llava.untrained_tower
    if not tower_file.is_file():
        raise UserError(f"{tower_file} is not there; without it the tower's last layers are unknown")
    carried = account("LLaVA", open_weight_file(tower_file), untrained_tower(geometry.tower))

    with open_weights(checkpoint, geometry, None if base is None else Path(base)) as reader:
        _check_keys(reader, rows, iteration)
        tensors, blocks = wanted_tensors(rows, geometry), _hub_blocks(reader, rows, carried, dtype)
        tensors, blocks = export.renamed(tensors, blocks)
        nbytes = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        check_disk(target, nbytes)
        with staged_folder(target) as folder:
            with progress_bar(nbytes, f"Megatron -> {layout}", progress) as advance:
                files = write_hub_weights(folder, tensors, dtype, blocks, advance, shard_bytes)
            notes = []
            if llava.lora is not None:
                notes.append(f"merged adapters of rank {llava.lora.config.rank} into {llava.lora.base}")
            notes += [*export.notes, *export.write_text_files(folder, hub)]
            arguments = {"model_size": model_size, "precision": precision, "layout": layout}
            facts = {"iteration": iteration.name, "checkpoint_provenance": llava.provenance or None}
            text = provenance_text("megatron to huggingface", {"checkpoint": iteration}, arguments, facts)
            LlavaFolder(folder).write_provenance(text)
            with progress_bar(nbytes, "SHA-256 of the weights", progress) as advance:
                hashes = weight_hashes([folder / name for name in files], advance)
            provenance, trained_with = LlavaFolder(folder).provenance, llava.training_settings
            write_model_card(folder, target.name, layout, iteration, geometry, trained_with, provenance, hashes, notes)
    notes.insert(0, f"exported {iteration.name}: {len(tensors)} tensors in {len(files)} file(s)")
    return Report(target, nbytes, time.monotonic() - began, notes)
