"""The layouts in which a checkpoint is exported, one row each.

A row is a function (llava/ folder, its config.json, geometry, precision, tower's name or None) -> Export; it raises
UserError when the checkpoint cannot have that layout.  To be read as well, a layout has a kind of source in plan.py.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_patch.conversion import hub_files, original_layout
from megatron_patch.conversion.original_layout import Blocks
from megatron_patch.conversion.table import HubTensor
from megatron_patch.conversion.trained_settings import hub_advice, hub_processor
from megatron_patch.conversion.usage_files import write_chat_files, write_tokenizer
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.llava_folder import (
    CONFIG,
    IMAGE_PROCESSOR,
    LORA,
    PROVENANCE,
    UNTRAINED_TOWER,
    LlavaFolder,
    TrainingSettings,
)


class Export(Protocol):
    """How a checkpoint is written in a layout."""

    @property
    def notes(self) -> Sequence[str]:
        """For the user."""

    def renamed(self, tensors: Iterable[HubTensor], blocks: Blocks) -> tuple[list[HubTensor], Blocks]:
        """The tensors of the folder, and blocks() that is asked for those."""

    def write_text_files(self, folder: Path, hub: Path) -> list[str]:
        """Everything but the weights; `hub` is the checkpoint's llava/ folder.  Returns notes for the user."""


@dataclass(frozen=True)
class _Hub:
    """What transformers' LlavaForConditionalGeneration loads."""

    config: dict[str, Any]
    trained_with: TrainingSettings | None

    @property
    def notes(self) -> Sequence[str]:
        return hub_advice(self.trained_with) if self.trained_with is not None else ()

    def renamed(self, tensors: Iterable[HubTensor], blocks: Blocks) -> tuple[list[HubTensor], Blocks]:
        return list(tensors), blocks

    def write_text_files(self, folder: Path, hub: Path) -> list[str]:
        for path in sorted(hub.iterdir()):
            if path.name not in (UNTRAINED_TOWER, PROVENANCE, CONFIG, LORA) and path.is_file():
                shutil.copyfile(path, folder / path.name)
        hub_files.write_json(folder / CONFIG, self.config)
        if self.trained_with is not None:
            processor = hub_processor(hub_files.read_json(hub / IMAGE_PROCESSOR), self.trained_with)
            hub_files.write_json(folder / IMAGE_PROCESSOR, processor)
        tokenizer = write_tokenizer(folder, hub)
        return write_chat_files(folder, hub, tokenizer, self.trained_with, bos=True)


def _plan_hub(
    hub: Path, config: dict[str, Any], geometry: LlavaGeometry, precision: str, tower_name: str | None
) -> _Hub:
    if tower_name is not None:
        raise UserError(
            f"the tower's name {tower_name!r} is for the original layouts; the hub's holds the tower itself"
        )
    if geometry.projector_type != "mlp2x_gelu":
        raise UserError(
            f"the checkpoint has the projector {geometry.projector_type!r}; the hub's LLaVA layout knows mlp2x_gelu "
            "only: choose the layout original"
        )
    finished = hub_files.finish_config(config, precision, geometry.projector_type)
    finished["text_config"] = hub_files.with_older_rope(finished["text_config"])
    return _Hub(finished, LlavaFolder(hub).training_settings)


# By the value of EXPORT_LAYOUT, whose rule in hf2mcore_convertor_llava.sh lists the same names; the default first.
LAYOUTS: dict[str, Callable[[Path, dict[str, Any], LlavaGeometry, str, str | None], Export]] = {
    "hub": _plan_hub,
    "original": partial(original_layout.plan_export, with_tower=True),  # liuhaotian's own
    "original_without_tower": partial(original_layout.plan_export, with_tower=False),
}
