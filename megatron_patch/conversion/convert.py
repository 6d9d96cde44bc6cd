"""The two directions: hub folders -> Megatron checkpoint, and back."""

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.conversion import hub_files
from megatron_patch.conversion.hub_weights import (
    Stored,
    account,
    in_memory,
    open_hub_weights,
    open_weight_file,
    row_blocks,
    write_hub_weights,
    write_safetensors,
)
from megatron_patch.conversion.output import check_disk, check_target, progress_bar, staged_folder
from megatron_patch.conversion.table import (
    HubTensor,
    Row,
    extra_states,
    projector_rows,
    table_of_weights,
    untrained_tower,
)
from megatron_patch.conversion.torch_dist import TRACKER, CheckpointReader, CheckpointWriter, Chunk, newest_iteration
from megatron_patch.errors import UserError
from megatron_patch.geometry import (
    LANGUAGE_MODELS,
    PROJECTOR_TYPES,
    LanguageGeometry,
    LlavaGeometry,
    check_known,
    read_geometry,
)
from megatron_patch.model_sizes import check_model_size

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
UNTRAINED_TOWER = "untrained_tower.safetensors"
PROVENANCE = "provenance.json"
# Entries of a trainer's checkpoint that are no weights of the model.
NOT_WEIGHTS = ("optimizer", "opt_param_scheduler", "chained_", "rng_state", "rerun_state", "common_state")


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


def _dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; wanted one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
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


# ---------------------------------------------------------------- hub -> Megatron


def _new_projector(geometry: LlavaGeometry, seed: int) -> dict[str, Stored]:
    """A fresh projector as torch.nn.Linear makes it: kaiming uniform with a=sqrt(5), that is, weight and bias uniform
    within 1/sqrt(fan_in); drawn in fp32 from a generator of its own, weight before bias, first layer first."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Stored] = {}
    bound = 0.0
    for row in projector_rows(geometry):
        (part,) = row.parts
        if len(part.shape) == 2:
            bound = 1 / math.sqrt(part.shape[1])  # its bias follows and has the same fan_in
        drawn = torch.empty(part.shape).uniform_(-bound, bound, generator=generator)
        tensors[part.name] = in_memory(drawn, "new projector")
    return tensors


def _grown(stored: Stored, rows: int) -> Stored:
    """The embedding (or head) with rows appended: each the fp32 mean of the rows it had; those stay as they are."""
    old, width = stored.shape
    total = torch.zeros(width, dtype=torch.float64)
    for first, last in row_blocks(stored.shape, stored.dtype):
        total += stored.read_rows(first, last).to(torch.float64).sum(dim=0)
    mean = (total / old).to(torch.float32).to(stored.dtype)

    def read_rows(first: int, last: int) -> Tensor:
        parts = []
        if first < old:
            parts.append(stored.read_rows(first, min(last, old)))
        if last > old:
            parts.append(mean.expand(last - max(first, old), width))
        return torch.cat(parts)

    return Stored(stored.dtype, (rows, width), read_rows, stored.origin)


_VOCABULARY_TENSORS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def _wanted(rows: list[Row], geometry: LlavaGeometry) -> list[HubTensor]:
    """Every hub tensor of a LLaVA, in the table's order."""
    return [
        HubTensor(name, part.shape)
        for row in rows
        for _, names in row.slots()
        for name, part in zip(names, row.parts, strict=True)
    ] + untrained_tower(geometry.tower)


def _drop_tied_head(source: dict[str, Stored], tied: bool, folder: Path) -> None:
    """A tied model's file may hold the head as well: dropped when it is the embedding byte for byte, else refused."""
    head = next((name for name in source if name.endswith("lm_head.weight")), None)
    embedding = next((name for name in source if name.endswith("embed_tokens.weight")), None)
    if not tied or head is None or embedding is None:
        return
    one, other = source[head], source[embedding]
    same = one.shape == other.shape and one.dtype == other.dtype
    blocks = row_blocks(one.shape, one.dtype) if same else ()
    if not same or not all(torch.equal(one.read_rows(*block), other.read_rows(*block)) for block in blocks):
        raise UserError(
            f"{folder}: the config ties the head to the embedding, but {head} and {embedding} differ; "
            "set tie_word_embeddings to false in its config.json"
        )
    del source[head]


def _chunks(row: Row, weights: dict[str, Stored], dtype: torch.dtype) -> Iterator[Chunk]:
    """The row's tensor as boxes small enough to be made one after the other."""
    shapes, rest = row.part_shapes, row.joined_shape[1:]
    for layer, names in row.slots():
        prefix, one = ((layer,), (1,)) if layer is not None else ((), ())
        if row.layout.first_row(0, shapes) is None:

            def join(names: list[str] = names) -> Tensor:
                return row.layout.join([_cast(weights[name].read(), dtype, name) for name in names])

            yield Chunk((*prefix, *(0 for _ in row.joined_shape)), (*one, *row.joined_shape), join)
            continue
        for part, name in enumerate(names):
            begin = row.layout.first_row(part, shapes)
            for first, last in row_blocks(shapes[part], dtype):

                def read(name: str = name, first: int = first, last: int = last) -> Tensor:
                    return _cast(weights[name].read_rows(first, last), dtype, name)

                yield Chunk((*prefix, begin + first, *(0 for _ in rest)), (*one, last - first, *rest), read)


def _write_checkpoint(
    folder: Path,
    rows: list[Row],
    weights: dict[str, Stored],
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    with CheckpointWriter(folder / "release", dtype) as writer:
        for row in rows:
            writer.add_tensor(row.key, row.shape, list(_chunks(row, weights, dtype)), advance)
        for key, shards in extra_states(rows).items():
            for shard in range(shards):
                writer.add_object(key, None, shard, shards)
        writer.finish()


def _versions() -> dict[str, str]:
    names = ("torch", "safetensors", "transformers", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _provenance(direction: str, sources: dict[str, Path], arguments: dict[str, Any], facts: dict[str, Any]) -> str:
    value = {
        "direction": direction,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": arguments,
        "versions": _versions(),
        "sources": {role: hub_files.fingerprint(path) for role, path in sources.items()},
        **facts,
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@dataclass
class _Plan:
    """Everything known before the first byte is written."""

    config: dict[str, Any]
    geometry: LlavaGeometry
    rows: list[Row]
    weights: dict[str, Stored]
    tokens: hub_files.Tokens
    sources: dict[str, Path]
    notes: list[str]
    facts: dict[str, Any]


def _plan_parts(llm: Path, clip: Path, precision: str, projector: str, seed: int) -> _Plan:
    """An LLM folder and a CLIP folder, with a new projector between them."""
    for kind, folder, known in (("LLM", llm, LANGUAGE_MODELS), ("vision tower", clip, ("clip", "clip_vision_model"))):
        check_known(f"{kind} model_type", hub_files.model_type(folder), known)
    tokens = hub_files.prepare_tokenizer(llm)
    stored_rows = hub_files.full_config(llm)["vocab_size"]
    vocabulary = max(stored_rows, tokens.largest_id + 1, tokens.image_id + 1)
    config = hub_files.llava_config(llm, clip, tokens.image_id, vocabulary, precision, projector)
    geometry = read_geometry(config)
    rows = table_of_weights(geometry)

    wanted = [tensor for tensor in _wanted(rows, geometry) if not tensor.name.startswith("multi_modal_projector.")]
    from_llm = [
        HubTensor(tensor.name, (stored_rows, *tensor.shape[1:])) if tensor.name in _VOCABULARY_TENSORS else tensor
        for tensor in wanted
        if tensor.name.startswith("language_model.")
    ]
    from_clip = [tensor for tensor in wanted if tensor.name.startswith("vision_tower.")]
    llm_source = open_hub_weights(llm)
    _drop_tied_head(llm_source, geometry.language.tied_embeddings, llm)
    weights = account("LLM", llm_source, from_llm) | account("CLIP", open_hub_weights(clip), from_clip)
    weights |= _new_projector(geometry, seed)

    notes = [*tokens.notes, f"new projector {projector}: torch.nn.Linear's own initialisation, seed {seed}"]
    if vocabulary > stored_rows:
        for name in _VOCABULARY_TENSORS:
            if name in weights:
                weights[name] = _grown(weights[name], vocabulary)
        notes.append(
            f"embedding {'' if geometry.language.tied_embeddings else 'and head '}grown "
            f"from {stored_rows} to {vocabulary} rows "
            "(new rows: the mean of the old ones)"
        )
    facts = {
        "projector": {"type": projector, "origin": "new", "initialisation": "torch.nn.Linear", "seed": seed},
        "vocabulary": {"rows": vocabulary, "rows_of_the_llm": stored_rows, "image_token_index": tokens.image_id},
    }
    return _Plan(config, geometry, rows, weights, tokens, {"llm": llm, "clip": clip}, notes, facts)


def _plan_llava(source: Path, precision: str) -> _Plan:
    """A whole LLaVA folder."""
    config = hub_files.finish_config(hub_files.full_config(source), precision, "mlp2x_gelu")
    geometry = read_geometry(config)
    rows = table_of_weights(geometry)
    tokens = hub_files.prepare_tokenizer(source)
    index = config["image_token_index"]
    if tokens.image_id != index:
        raise UserError(f"{source}: the tokenizer's <image> is {tokens.image_id}, config.json's image token is {index}")
    if tokens.largest_id >= geometry.language.vocabulary:
        raise UserError(
            f"{source}: the tokenizer's largest id is {tokens.largest_id}, but the embedding has "
            f"{geometry.language.vocabulary} rows; resize the embedding of the source first"
        )
    hub = open_hub_weights(source)
    _drop_tied_head(hub, geometry.language.tied_embeddings, source)
    weights = account("LLaVA", hub, _wanted(rows, geometry))
    facts = {
        "projector": {"type": geometry.projector_type, "origin": "source"},
        "vocabulary": {"rows": geometry.language.vocabulary, "image_token_index": index},
    }
    return _Plan(config, geometry, rows, weights, tokens, {"llava": source}, list(tokens.notes), facts)


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
    projector: str = "mlp2x_gelu",
    seed: int = 1234,
    progress: bool = False,
) -> Report:
    """Write a Megatron checkpoint from an LLM folder and a CLIP folder, or from a whole LLaVA folder.

    Args:
        source_llm: folder of a Llama, Mistral or Qwen2 LLM, or of a LLaVA (then source_clip is None).
        source_clip: folder of a CLIPModel or CLIPVisionModel.
        target: a folder that does not exist yet or is empty.
        model_size: a name of model_sizes.MODEL_SIZES, checked against the LLM.
        precision: fp16, bf16 or fp32; bytes are copied untouched where the source has it already.
        tensor_parallel, pipeline_parallel: checked against the model; the checkpoint serves every layout.
        projector: of the new projector, mlp2x_gelu or linear; a LLaVA brings its own.
        seed: of the new projector's weights.
        progress: show a bar on stderr.
    Raises:
        UserError: nothing was written.
    """
    began = time.monotonic()
    llm, target = Path(source_llm), Path(target)
    clip = None if source_clip is None else Path(source_clip)
    dtype = _dtype(precision)
    check_known("projector", projector, PROJECTOR_TYPES)
    check_target(target)
    whole = hub_files.model_type(llm) == "llava"
    if not whole and clip is None:
        raise UserError(f"{llm} is an LLM without a tower; pass a CLIP folder as well")
    if whole and clip is not None:
        raise UserError(f"{llm} is a whole LLaVA with its own tower; pass none instead of {clip}")
    plan = _plan_llava(llm, precision) if whole else _plan_parts(llm, clip, precision, projector, seed)
    geometry = plan.geometry
    check_model_size(model_size, geometry.language.parameters)
    geometry.check_parallel(tensor_parallel, pipeline_parallel)

    plan.notes.extend(_limits(geometry.language))

    carried = untrained_tower(geometry.tower)
    nbytes = sum(math.prod(tensor.shape) for tensor in _wanted(plan.rows, geometry)) * dtype.itemsize
    check_disk(target, nbytes)
    notes = list(plan.notes)
    with staged_folder(target) as folder:
        hub = folder / "llava"
        tower_folder = plan.sources.get("clip", llm)
        notes += hub_files.write_hub_folder(hub, plan.config, plan.tokens, llm, tower_folder)
        with progress_bar(nbytes, "hub -> Megatron", progress) as advance:
            _write_checkpoint(folder, plan.rows, plan.weights, dtype, advance)

            def blocks(tensor: HubTensor) -> Iterator[Tensor]:
                yield _cast(plan.weights[tensor.name].read(), dtype, tensor.name)

            write_safetensors(hub / UNTRAINED_TOWER, carried, dtype, blocks, advance)
        arguments = {
            "model_size": model_size,
            "precision": precision,
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "projector": projector,
            "seed": seed,
        }
        text = _provenance("huggingface to megatron", plan.sources, arguments, plan.facts | {"notes": notes})
        (hub / PROVENANCE).write_text(text, encoding="utf-8")
        (folder / TRACKER).write_text("release\n")
    return Report(target, nbytes, time.monotonic() - began, notes)


# ---------------------------------------------------------------- Megatron -> hub


def _check_keys(reader: CheckpointReader, rows: list[Row], folder: Path) -> None:
    """Every key of the checkpoint accounted for, shapes as the table says (the vocabulary may be padded).

    Raises:
        UserError: with the lists of unknown and missing keys and wrong shapes.
    """
    wanted = {row.key: row for row in rows}
    stored = {key: entry for key, entry in reader.tensors.items() if not key.startswith(NOT_WEIGHTS)}
    per_layer = [key for key in stored if any(word.isdecimal() for word in key.split("."))]
    if per_layer:
        raise UserError(
            f"{folder} holds its layers one by one ({per_layer[0]}, ...); this converter reads stacked layers, which "
            "Megatron writes unless its layers are declared non-homogeneous: load and save it once without that"
        )
    unknown = [key for key in stored if key not in wanted]
    unknown += [key for key in reader.objects if "_extra_state" not in key and not key.startswith(NOT_WEIGHTS)]
    missing = [key for key in wanted if key not in stored]
    shapes = []
    for key, row in wanted.items():
        if key not in stored:
            continue
        have, want = tuple(stored[key].size), row.shape
        padded = key.startswith("language_model.") and row.parts[0].name in _VOCABULARY_TENSORS
        if not (have == want or (padded and have[0] >= want[0] and have[1:] == want[1:])):
            shapes.append(f"{key} is {list(have)}, config.json says {list(want)}")
        if stored[key].properties.dtype not in PRECISIONS.values():
            shapes.append(f"{key} has dtype {stored[key].properties.dtype}")
    lists = {"unknown": unknown, "missing": missing, "of another shape": shapes}
    if any(lists.values()):
        lines = [f"the weights in {folder} do not fit {folder.parent / 'llava' / 'config.json'}:"]
        lines += [f"  {title} ({len(names)}): {', '.join(names[:8]) or 'none'}" for title, names in lists.items()]
        raise UserError("\n".join(lines))


def _check_same_llm(ours: dict[str, Any], checkpoint: Path, hf_checkpoint: Path) -> None:
    """Refuse an HF_CKPT_PATH that is another LLM than the checkpoint's."""
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


def _hub_blocks(
    reader: CheckpointReader, rows: list[Row], carried: dict[str, Stored], dtype: torch.dtype
) -> Callable[[HubTensor], Iterator[Tensor]]:
    """A function that yields the rows of any hub tensor in blocks."""
    places = {
        name: (row, layer, part) for row in rows for layer, names in row.slots() for part, name in enumerate(names)
    }
    joined: dict[tuple[str, int | None], list[Tensor]] = {}  # the last mixed tensor: its parts are asked for in turn

    def blocks(tensor: HubTensor) -> Iterator[Tensor]:
        if tensor.name in carried:
            yield _cast(carried[tensor.name].read(), dtype, tensor.name)
            return
        row, layer, part = places[tensor.name]
        prefix, one = ((layer,), (1,)) if layer is not None else ((), ())
        begin, rest = row.layout.first_row(part, row.part_shapes), row.joined_shape[1:]
        if begin is None:
            if (row.key, layer) not in joined:
                joined.clear()
                zeros = tuple(0 for _ in row.joined_shape)
                whole = reader.read(row.key, (*prefix, *zeros), (*one, *row.joined_shape)).reshape(row.joined_shape)
                joined[row.key, layer] = row.layout.split(whole, row.part_shapes)
            yield _cast(joined[row.key, layer][part], dtype, tensor.name)
            return
        for first, last in row_blocks(tensor.shape, torch.float32):
            offset = (*prefix, begin + first, *(0 for _ in rest))
            yield _cast(reader.read(row.key, offset, (*one, last - first, *rest)), dtype, tensor.name)

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
    shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> Report:
    """Write a hub-layout LLaVA folder from the newest iteration of a Megatron checkpoint.

    Args:
        checkpoint: folder with latest_checkpointed_iteration.txt and llava/, written by the converter or the trainer.
        target: a folder that does not exist yet or is empty.
        model_size, precision, tensor_parallel, pipeline_parallel, progress: as in convert_to_megatron.
        hf_checkpoint: folder of the LLM or LLaVA that the checkpoint came from; another geometry is refused.
        shard_bytes: largest size of one weight file.
    Raises:
        UserError: nothing was written.
    """
    began = time.monotonic()
    checkpoint, target = Path(checkpoint), Path(target)
    dtype = _dtype(precision)
    check_target(target)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not a folder; wanted a Megatron checkpoint with its llava/ folder")
    hub = checkpoint / "llava"
    iteration = newest_iteration(checkpoint)
    config = hub_files.read_json(hub / "config.json")
    geometry = read_geometry(config)
    if geometry.projector_type != "mlp2x_gelu":
        raise UserError(
            f"{checkpoint} has the projector {geometry.projector_type!r}; the hub's LLaVA layout knows mlp2x_gelu only"
        )
    rows = table_of_weights(geometry)
    check_model_size(model_size, geometry.language.parameters)
    geometry.check_parallel(tensor_parallel, pipeline_parallel)
    if hf_checkpoint is not None:
        _check_same_llm(config, checkpoint, Path(hf_checkpoint))
    tower_file = hub / UNTRAINED_TOWER
    if not tower_file.is_file():
        raise UserError(f"{tower_file} is not there; without it the tower's last layers are unknown")
    carried = account("LLaVA", open_weight_file(tower_file), untrained_tower(geometry.tower))

    with CheckpointReader(iteration) as reader:
        _check_keys(reader, rows, iteration)
        tensors = _wanted(rows, geometry)
        nbytes = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        check_disk(target, nbytes)
        with staged_folder(target) as folder:
            with progress_bar(nbytes, "Megatron -> hub", progress) as advance:
                blocks = _hub_blocks(reader, rows, carried, dtype)
                files = write_hub_weights(folder, tensors, dtype, blocks, advance, shard_bytes)
            for path in sorted(hub.iterdir()):
                if path.name not in (UNTRAINED_TOWER, PROVENANCE, "config.json") and path.is_file():
                    shutil.copyfile(path, folder / path.name)
            exported = hub_files.finish_config(config, precision, geometry.projector_type)
            (folder / "config.json").write_text(json.dumps(exported, indent=2, sort_keys=True) + "\n")
            earlier = hub_files.read_json(hub / PROVENANCE) if (hub / PROVENANCE).is_file() else None
            arguments = {"model_size": model_size, "precision": precision}
            facts = {"iteration": iteration.name, "checkpoint_provenance": earlier}
            text = _provenance("megatron to huggingface", {"checkpoint": iteration}, arguments, facts)
            (folder / PROVENANCE).write_text(text, encoding="utf-8")
    notes = [f"exported {iteration.name}: {len(tensors)} tensors in {len(files)} file(s)"]
    return Report(target, nbytes, time.monotonic() - began, notes)
