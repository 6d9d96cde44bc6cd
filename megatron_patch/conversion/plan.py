"""What a conversion will read, known and checked before the first byte is written.

A source is an LLM folder with a tower folder, a whole LLaVA in the hub's layout, or one in the original layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.conversion import hub_files, original_layout
from megatron_patch.conversion.additions import DEFAULT_SEED, Additions
from megatron_patch.conversion.hub_weights import Stored, account, in_memory, open_hub_weights, row_blocks
from megatron_patch.conversion.mm_projector import read_projector
from megatron_patch.conversion.openai_clip import open_openai_clip
from megatron_patch.conversion.table import HubTensor, Row, projector_rows, table_of_weights, untrained_tower
from megatron_patch.conversion.trained_settings import settings_of_original
from megatron_patch.errors import UserError
from megatron_patch.geometry import PROJECTOR_TYPES, LlavaGeometry, check_known, read_geometry
from megatron_patch.language_models import LANGUAGE_MODELS
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from megatron_patch.llava_kinds import LLAVA_KINDS, NEWLINE
from megatron_patch.vision_towers import VISION_TOWERS

VOCABULARY_TENSORS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


@dataclass
class Plan:
    """Everything known before the first byte is written."""

    config: dict[str, Any]
    geometry: LlavaGeometry
    rows: list[Row]
    weights: dict[str, Stored]
    tokens: hub_files.Tokens
    sources: dict[str, Path]
    notes: list[str]
    facts: dict[str, Any]
    original: Path | None = None  # the source, when it has the original layout
    trained_with: TrainingSettings | None = None  # the source, as far as it says

    @property
    def tower_folder(self) -> Path:
        """Where the image processor is looked for."""
        return self.sources.get("clip") or self.llm_folder

    @property
    def llm_folder(self) -> Path:
        """Where tokenizer and generation config come from."""
        return next(iter(self.sources.values()))


def wanted_tensors(rows: list[Row], geometry: LlavaGeometry) -> list[HubTensor]:
    """Every hub tensor of a LLaVA, in the table's order."""
    return [
        HubTensor(name, part.shape)
        for row in rows
        for _, names in row.slots()
        for name, part in zip(names, row.parts, strict=True)
    ] + untrained_tower(geometry.tower)


def make_plan(llm: Path, clip: Path | None, precision: str, additions: Additions) -> Plan:
    """Read and check the sources.

    Raises:
        UserError: what does not fit, named.
    """
    if additions.projector is not None:
        check_known("projector", additions.projector, PROJECTOR_TYPES)
    if additions.kind is not None:
        check_known("model kind", additions.kind, LLAVA_KINDS)
    if hub_files.model_type(llm).startswith("llava") and original_layout.is_original(llm):
        _refuse_additions(llm, additions)
        return _plan_original(llm, clip, precision, additions)
    if hub_files.model_type(llm) in LLAVA_KINDS:
        if clip is not None:
            raise UserError(f"{llm} is a whole LLaVA with its own tower; pass none instead of {clip}")
        _refuse_additions(llm, additions)
        return _plan_llava(llm, precision, additions)
    check_known("LLM model_type", hub_files.model_type(llm), LANGUAGE_MODELS)
    if clip is None:
        raise UserError(f"{llm} is an LLM without a tower; pass a CLIP folder as well")
    return _plan_parts(llm, clip, precision, additions)


def _refuse_additions(folder: Path, additions: Additions) -> None:
    if additions.projector_file is not None:
        raise UserError(f"{folder} is a whole LLaVA with its own projector; leave {additions.projector_file} out")
    if additions.feature_layer is not None:
        raise UserError(
            f"{folder} is a whole LLaVA, whose config names the layer its projector was trained for; leave the vision "
            f"feature layer {additions.feature_layer} out"
        )
    if additions.kind is not None:
        raise UserError(f"{folder} is a whole LLaVA, whose config names its kind; leave the kind {additions.kind} out")
    for what, value in (("kind", additions.projector), ("seed", additions.seed)):
        if value is not None:
            raise UserError(
                f"{folder} is a whole LLaVA with its own projector; leave the projector's {what} {value} out"
            )


# ---------------------------------------------------------------- the three kinds of sources


def open_tower(source: Path) -> dict[str, Stored]:
    """Raw name -> tensor of a tower's folder, or of OpenAI's file."""
    return open_openai_clip(source) if source.is_file() else open_hub_weights(source)


def _plan_parts(llm: Path, clip: Path, precision: str, additions: Additions) -> Plan:
    """An LLM folder and a tower folder, with a new projector or one from a file between them."""
    tower = hub_files.tower_config(clip)  # refuses what is no tower
    projector, from_file = additions.projector or "mlp2x_gelu", None
    seed = DEFAULT_SEED if additions.seed is None else additions.seed
    if additions.projector_file is not None:
        if additions.seed is not None:
            raise UserError(f"{additions.projector_file} is no new projector to be drawn; leave the seed {seed} out")
        projector, from_file = _projector_of(additions)
    kind = additions.kind or next(iter(LLAVA_KINDS))
    tokens = hub_files.prepare_tokenizer(llm, additions.tokens, video_token=LLAVA_KINDS[kind].video_token)
    stored_rows = hub_files.full_config(llm)["vocab_size"]
    vocabulary = _vocabulary(stored_rows, tokens, additions)
    feature_layer = additions.feature_layer
    if feature_layer is None:
        feature_layer = VISION_TOWERS[tower.model_type].feature_layer
    config = hub_files.llava_config(llm, clip, tokens, vocabulary, precision, projector, feature_layer, kind)
    geometry = read_geometry(config)
    rows = table_of_weights(geometry)

    wanted = wanted_tensors(rows, geometry)
    from_llm = _with_rows([tensor for tensor in wanted if tensor.name.startswith("language_model.")], stored_rows)
    from_clip = [tensor for tensor in wanted if tensor.name.startswith("vision_tower.")]
    llm_source = open_hub_weights(llm)
    _drop_tied_head(llm_source, geometry.language.tied_embeddings, llm)
    weights = account("LLM", llm_source, from_llm) | account("tower", open_tower(clip), from_clip)

    sources, notes = {"llm": llm, "clip": clip}, list(tokens.notes)
    if from_file is None:
        weights |= _new_projector(geometry, seed)
        origin = {"origin": "new", "initialisation": "torch.nn.Linear", "seed": seed}
        notes.append(f"new projector {projector}: torch.nn.Linear's own initialisation, seed {seed}")
    else:
        wanted_projector = [tensor for tensor in wanted if tensor.name.startswith("multi_modal_projector.")]
        weights |= account("projector", from_file, wanted_projector)
        origin = {"origin": "file"} | hub_files.file_fingerprint(additions.projector_file)
        notes.append(f"projector {projector} from {additions.projector_file.name}")
    if geometry.kind.any_resolution:
        weights[NEWLINE] = _new_newline(geometry, seed)
        notes.append(f"new {NEWLINE}: normal, deviation 1/sqrt({geometry.language.hidden}), seed {seed}")
    notes += _grow_vocabulary(weights, stored_rows, vocabulary)
    facts = {
        "projector": {"type": projector} | origin,
        "vocabulary": {"rows": vocabulary, "rows_of_the_llm": stored_rows, "image_token_index": tokens.image_id},
    }
    return Plan(config, geometry, rows, weights, tokens, sources, notes, facts)


def _plan_llava(source: Path, precision: str, additions: Additions) -> Plan:
    """A whole LLaVA folder in the hub's layout."""
    config = hub_files.finish_config(hub_files.full_config(source), precision, "mlp2x_gelu")
    stored_rows = config["text_config"]["vocab_size"]
    tokens = hub_files.prepare_tokenizer(source, additions.tokens)
    index = config["image_token_index"]
    if tokens.image_id != index:
        raise UserError(f"{source}: the tokenizer's <image> is {tokens.image_id}, config.json's image token is {index}")
    if tokens.largest_id >= stored_rows and not additions.tokens:
        raise UserError(
            f"{source}: the tokenizer's largest id is {tokens.largest_id}, but the embedding has {stored_rows} rows; "
            "resize the embedding of the source first"
        )
    vocabulary = _vocabulary(stored_rows, tokens, additions)
    config["text_config"]["vocab_size"] = vocabulary
    geometry = read_geometry(config)
    rows = table_of_weights(geometry)
    hub = open_hub_weights(source)
    _drop_tied_head(hub, geometry.language.tied_embeddings, source)
    weights = account("LLaVA", hub, _with_rows(wanted_tensors(rows, geometry), stored_rows))
    notes = tokens.notes + _grow_vocabulary(weights, stored_rows, vocabulary)
    facts = {
        "projector": _origin_of_projector(source, geometry.projector_type),
        "vocabulary": {"rows": vocabulary, "image_token_index": index},
    }
    trained_with = LlavaFolder(source).training_settings
    return Plan(config, geometry, rows, weights, tokens, {"llava": source}, notes, facts, trained_with=trained_with)


def _plan_original(source: Path, clip: Path | None, precision: str, additions: Additions) -> Plan:
    """A folder of the original layout; the tower is inside, or in a folder of its own."""
    original = original_layout.read_original(source)
    hub = open_hub_weights(source)
    found = original_layout.find_tower(original, clip, hub)
    text = original.text_config()
    video_token = LLAVA_KINDS[original.kind].video_token
    tokens = hub_files.prepare_tokenizer(source, additions.tokens, config=text, video_token=video_token)
    stored_rows = text.vocab_size
    vocabulary = _vocabulary(stored_rows, tokens, additions)
    config = hub_files.compose_config(
        *(text, found.config, tokens, vocabulary, precision, original.projector, found.feature_layer),
        kind=original.kind,
        pinpoints=original.pinpoints,
        aspect_ratio=original.aspect_ratio,
    )
    geometry = read_geometry(config)
    rows = table_of_weights(geometry)
    _drop_tied_head(hub, geometry.language.tied_embeddings, source)
    wanted = _with_rows(wanted_tensors(rows, geometry), stored_rows)
    outside = [tensor for tensor in wanted if tensor.name.startswith("vision_tower.") and not found.inside]
    weights = account("original LLaVA", hub, [tensor for tensor in wanted if tensor not in outside])
    if outside:
        weights |= account("tower", open_tower(found.folder), outside)
    trained_with = settings_of_original(source, original.values)
    notes = [*tokens.notes, *found.notes, *original_layout.advice(original, trained_with)]
    notes += _grow_vocabulary(weights, stored_rows, vocabulary)
    facts = {
        "projector": {"type": geometry.projector_type, "origin": "source"},
        "tower": {"name": original.tower_name, "origin": "inside the source" if found.inside else "clip"},
        "vocabulary": {"rows": vocabulary, "rows_of_the_llm": stored_rows, "image_token_index": tokens.image_id},
    }
    sources = {"llava": source} | ({"clip": found.folder} if found.folder else {})
    return Plan(
        config, geometry, rows, weights, tokens, sources, notes, facts, original=source, trained_with=trained_with
    )


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


# ---------------------------------------------------------------- projector


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


def _new_newline(geometry: LlavaGeometry, seed: int) -> Stored:
    """A fresh image_newline as the original code and transformers draw it: normal / sqrt(hidden); fp32, from a
    generator of its own."""
    drawn = torch.randn(geometry.language.hidden, generator=torch.Generator().manual_seed(seed))
    return in_memory(drawn / math.sqrt(geometry.language.hidden), "new image_newline")


def _origin_of_projector(source: Path, kind: str) -> dict[str, Any]:
    """What is known about a whole LLaVA's projector: stage 0, or an export from before any training, left it new."""
    note = LlavaFolder(source).provenance
    if note.get("iteration") == "release":
        note = note.get("checkpoint_provenance") or {}
    projector = note.get("projector")
    if isinstance(projector, dict) and projector.get("origin") == "new":
        return projector
    return {"type": kind, "origin": "source"}


def _projector_of(additions: Additions) -> tuple[str, dict[str, Stored]]:
    kind, tensors = read_projector(additions.projector_file)
    if additions.projector not in (None, kind):
        raise UserError(
            f"{additions.projector_file} holds a projector {kind}, not {additions.projector}; leave the kind out"
        )
    return kind, tensors


# ---------------------------------------------------------------- vocabulary


def _vocabulary(stored_rows: int, tokens: hub_files.Tokens, additions: Additions) -> int:
    """Rows that the embedding must have."""
    rows = max(stored_rows, tokens.largest_id + 1, tokens.image_id + 1)
    return -(-rows // additions.vocabulary_multiple) * additions.vocabulary_multiple


def _with_rows(wanted: Sequence[HubTensor], rows: int) -> list[HubTensor]:
    """The same tensors, embedding and head with the rows that the source has."""
    return [
        HubTensor(tensor.name, (rows, *tensor.shape[1:])) if tensor.name in VOCABULARY_TENSORS else tensor
        for tensor in wanted
    ]


def _grow_vocabulary(weights: dict[str, Stored], stored_rows: int, vocabulary: int) -> list[str]:
    """Give embedding and head their missing rows; returns notes."""
    if vocabulary == stored_rows:
        return []
    grown = [name for name in VOCABULARY_TENSORS if name in weights]
    for name in grown:
        weights[name] = _grown(weights[name], vocabulary)
    return [
        f"embedding {'and head ' if len(grown) > 1 else ''}grown from {stored_rows} to {vocabulary} rows "
        "(new rows: the mean of the old ones)"
    ]


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
