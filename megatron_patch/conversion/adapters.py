"""Checkpoints of adapters: their weights merged into the base's for every reader, and written as adapters.

Layouts of adapters: `peft`, which PeftModel.from_pretrained loads on transformers' LLaVA, with a trained projector as
modules_to_save; and `original_lora`, the folder that the original LLaVA code's builder loads with --model-base, with a
trained projector in non_lora_trainables.bin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_patch.checkpoint_files import NOT_WEIGHTS, base_of, newest_iteration
from megatron_patch.conversion import hub_files, original_layout
from megatron_patch.conversion.hub_weights import PRECISIONS, FileSpan, cast
from megatron_patch.conversion.output import check_disk, staged_folder
from megatron_patch.conversion.table import Row, projector_rows, table_of_weights
from megatron_patch.conversion.torch_dist import CheckpointReader
from megatron_patch.conversion.torch_ranks import RanksReader, open_checkpoint
from megatron_patch.conversion.transforms import Shape
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.lora import (
    ADAPTERS,
    PARTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraConfig,
    hub_path,
    linears_of,
    weight_name,
)
from megatron_patch.weight_names import check_nothing_differs, differences

ADAPTER_LAYOUTS = ("peft", "original_lora")
NON_LORA = "non_lora_trainables.bin"


class AdapterWeights:
    """What a checkpoint of adapters holds beside its base."""

    def __init__(self, iteration: Path, lora: LoraConfig, geometry: LlavaGeometry) -> None:
        """Raises UserError: matrices are missing, unknown or of another shape."""
        self.reader, self.lora, self.geometry = CheckpointReader(iteration), lora, geometry
        stored = {name: entry.size for name, entry in self.reader.tensors.items() if not name.startswith(NOT_WEIGHTS)}
        adapters = {name: size for name, size in stored.items() if name.startswith(f"{ADAPTERS}.")}
        check_nothing_differs(
            f"{iteration} does not hold the adapters that its lora.json tells of; copy the checkpoint again",
            differences(adapters, lora.shapes(geometry), "lora.json says"),
        )
        self.trained = stored.keys() - adapters.keys()  # whole weights that were trained beside the adapters

    def whole(self, key: str) -> Tensor:
        """A matrix of the adapters or a whole weight, by its name in the checkpoint."""
        shape = tuple(self.reader.tensors[key].size)
        return self.reader.read(key, (0,) * len(shape), shape)

    def added(self, row: Row, part: str, layer: int) -> Tensor:
        """What the adapters add to a matrix of Megatron's: scaling * B A of each that it holds, fp32."""
        megatron = _megatron_layer(row.key, part)
        adapted = self.lora.linears(self.geometry, part)
        pieces = []
        for one in linears_of(self.geometry, part):
            if one.megatron != megatron:
                continue
            if one in adapted:
                a, b = (self.whole(weight_name(part, layer, one, which)).float() for which in "AB")
                pieces.append((b @ a).mul_(self.lora.scaling))
            else:
                pieces.append(torch.zeros(one.outputs, one.inputs))
        return row.transform.join(pieces)


def _megatron_layer(key: str, part: str) -> str:
    """`language_model.decoder.layers.self_attention.linear_qkv.weight` -> `self_attention.linear_qkv`."""
    module = key.rpartition(".")[0]
    return module.removeprefix(f"{PARTS[part]}.").removeprefix("decoder.layers.").removeprefix("encoder.")


class MergedReader:
    """Reads a checkpoint of adapters as if it held whole weights: the base's, those trained, adapters added in fp32."""

    def __init__(
        self, base: CheckpointReader | RanksReader, adapters: AdapterWeights, rows: list[Row], geometry: LlavaGeometry
    ) -> None:
        self._base, self._own = base, adapters
        own = {key: adapters.reader.tensors[key] for key in adapters.trained}
        self.tensors, self.objects = dict(base.tensors) | own, base.objects
        megatron = {
            part: {one.megatron for one in adapters.lora.linears(geometry, part)} for part in adapters.lora.parts
        }
        self._adapted: dict[str, tuple[Row, str]] = {
            row.key: (row, part)
            for row in rows
            for part, names in megatron.items()
            if row.key.startswith(f"{PARTS[part]}.")
            and row.key.endswith(".weight")
            and _megatron_layer(row.key, part) in names
        }
        self._last: tuple[tuple[str, int], Tensor] | None = None  # its rows are asked for in turn

    def __enter__(self) -> "MergedReader":
        return self

    def __exit__(self, *failure: object) -> None:
        self._base.__exit__(*failure)
        self._own.reader.close()

    def _of(self, key: str) -> CheckpointReader | RanksReader:
        return self._own.reader if key in self._own.trained else self._base

    def read(self, key: str, offset: Shape, size: Shape) -> Tensor:
        """The box [offset, offset + size) of a tensor, of one layer where it is stacked; fp32 where adapters add."""
        box = self._of(key).read(key, offset, size)
        if key not in self._adapted:
            return box
        row, part = self._adapted[key]
        layer = offset[0] if row.layers else 0
        if self._last is None or self._last[0] != (key, layer):
            self._last = (key, layer), self._own.added(row, part, layer)
        inner = [slice(low, low + count) for low, count in zip(offset, size, strict=True)][bool(row.layers) :]
        return box.float() + self._last[1][tuple(inner)].reshape(box.shape)

    def spans(self, key: str, layer: int | None, first: int, last: int) -> list[FileSpan] | None:
        """As CheckpointReader's; None where adapters add."""
        source = self._of(key)
        if key in self._adapted or not isinstance(source, CheckpointReader):
            return None
        return source.spans(key, layer, first, last)


def open_weights(
    checkpoint: Path, geometry: LlavaGeometry, base: Path | None = None
) -> CheckpointReader | RanksReader | MergedReader:
    """A reader of the whole weights of a checkpoint's newest iteration.

    Args:
        base: of adapters: folder of their base checkpoint, where it no longer lies where training found it.
    Raises:
        UserError: the checkpoint or its base is not whole, or is not the base.
    """
    iteration, rows = newest_iteration(checkpoint), table_of_weights(geometry)
    record = LlavaFolder.of(checkpoint).lora
    if record is None:
        return open_checkpoint(iteration, rows)
    adapters = AdapterWeights(iteration, record.config, geometry)
    return MergedReader(open_checkpoint(base_of(checkpoint, record, base), rows), adapters, rows, geometry)


# ---------------------------------------------------------------- written as adapters


@dataclass(frozen=True)
class _AsAdapters:
    """How a layout names what it holds."""

    prefixes: dict[str, str]  # part -> what stands before `layers.` or the projector in the names of its matrices
    whole: Callable[[str], str]  # name of a projector's weight in hub files -> its name
    whole_in: str | None  # file of those; None: beside the matrices
    config: dict[str, Any]  # fields of peft's configuration that are the layout's own


def export_adapters(
    checkpoint: Path,
    target: Path,
    layout: str,
    precision: str,
    hf_checkpoint: Path | None,
    tower_name: str | None = None,
) -> tuple[int, list[str]]:
    """Write the adapters of a checkpoint's newest iteration in a layout of ADAPTER_LAYOUTS.

    Args:
        target: a folder that does not exist yet or is empty.
        precision: a name of PRECISIONS.
        hf_checkpoint: the model it came from, which the folder names as its base.
        tower_name: in the original layout, the vision tower's name; None: found out.
    Returns:
        Bytes of the weights, notes for the user.
    Raises:
        UserError: the checkpoint has no adapters, the layout no place for what was trained, or fp16 cannot hold a
            value; nothing was written.
    """
    folder = LlavaFolder.of(checkpoint)
    record, geometry, iteration = folder.lora, folder.geometry(), newest_iteration(checkpoint)
    if record is None:
        raise UserError(f"{checkpoint} holds whole weights and no adapters; choose the layout hub or original")
    lora, adapters = record.config, AdapterWeights(iteration, record.config, geometry)
    projector = {row.key: row.parts[0].name for row in projector_rows(geometry)}
    if left := sorted(adapters.trained - projector.keys()):
        raise UserError(
            f"{checkpoint}: beside adapters and projector {left[0]} was trained ({len(left)} such weights), for which "
            f"the layout {layout} has no place; choose hub, which merges the adapters"
        )
    notes = [f"exported {iteration.name}: adapters of rank {lora.rank}, {len(adapters.trained)} whole weights beside"]
    way = {"peft": _peft, "original_lora": _original}[layout](checkpoint, lora, geometry, bool(adapters.trained))
    matrices = {
        f"{way.prefixes[part]}{hub_path(geometry, part, layer, one)}.lora_{which}.weight": weight_name(
            part, layer, one, which
        )
        for part, layer, one in lora.places(geometry)
        for which in "AB"
    }
    weights = {way.whole(projector[key]): key for key in sorted(adapters.trained)}
    tensors, whole = (
        {name: cast(adapters.whole(key), PRECISIONS[precision], name) for name, key in keys.items()}
        for keys in (matrices, weights)
    )
    nbytes = sum(value.nbytes for value in (*tensors.values(), *whole.values()))
    check_disk(target, nbytes)
    with staged_folder(target) as made:
        if way.whole_in is None:
            tensors |= whole
        else:
            notes += _original_texts(made, folder, geometry, precision, tower_name)
            with open(made / way.whole_in, "wb") as file:  # given a path, torch would write that name into the file
                torch.save(whole, file)
        save_file(tensors, made / PEFT_WEIGHTS, metadata={"format": "pt"})
        base = None if hf_checkpoint is None else str(hf_checkpoint)
        config = _peft_config(lora) | {"base_model_name_or_path": base} | way.config
        hub_files.write_json(made / PEFT_CONFIG, config)
    if hf_checkpoint is None or hub_files.model_type(hf_checkpoint) != "llava":
        notes.append(f"it is loaded on its base: {record.base}, exported with EXPORT_LAYOUT=hub")
    return nbytes, notes


def _peft_config(lora: LoraConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _names(lora: LoraConfig, geometry: LlavaGeometry, part: str) -> list[str]:
    """Of the linear layers with adapters in the Hugging Face model."""
    return [hub_path(geometry, part, 0, one).rpartition(".")[2] for one in lora.linears(geometry, part)]


_WRAPPED = "base_model.model."  # what peft puts before the names of the model it wraps


def _peft(checkpoint: Path, lora: LoraConfig, geometry: LlavaGeometry, with_projector: bool) -> _AsAdapters:
    """On transformers 5's LlavaForConditionalGeneration."""
    modules = {"language_model": "language_model.", "vision_tower": "vision_tower.encoder.", "projector": ""}
    # a regular expression: layers of the tower have some of the decoder's names
    targets = "|".join(
        rf"{'multi_modal_projector' if part == 'projector' else part}\.(?:.*\.)?(?:{'|'.join(names)})"
        for part in lora.parts
        if (names := _names(lora, geometry, part))
    )
    return _AsAdapters(
        {part: f"{_WRAPPED}model.{module}" for part, module in modules.items()},
        lambda name: f"{_WRAPPED}model.{name}",
        None,
        {
            "target_modules": rf"model\.(?:{targets})",
            "modules_to_save": ["multi_modal_projector"] * with_projector or None,
        },
    )


def _original(checkpoint: Path, lora: LoraConfig, geometry: LlavaGeometry, with_projector: bool) -> _AsAdapters:
    """On the LLM of the original code, which wraps nothing else."""
    if lora.parts != ("language_model",):
        raise UserError(
            f"{checkpoint}: the layout original_lora knows adapters of the language model, and these are of "
            f"{' '.join(lora.parts)}; choose hub or peft"
        )
    return _AsAdapters(
        {"language_model": f"{_WRAPPED}model."},
        lambda name: _WRAPPED + original_layout.original_name(name, geometry.projector_type),
        NON_LORA,
        {"target_modules": sorted(_names(lora, geometry, "language_model")), "task_type": "CAUSAL_LM"},
    )


def _original_texts(
    made: Path, folder: LlavaFolder, geometry: LlavaGeometry, precision: str, tower_name: str | None
) -> list[str]:
    """Config, tokenizer and the rest of the original layout's texts.  Returns notes for the user."""
    config = hub_files.read_json(folder.config)
    plan = original_layout.plan_export(folder.path, config, geometry, precision, tower_name, with_tower=False)
    return [*plan.notes, *plan.write_text_files(made, folder.path)]
