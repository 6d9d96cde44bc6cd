"""README.md of an exported folder: what the model is, how it was trained, how it is loaded.  Only what is known."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint_files import STRANGE, read_arguments
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.llava_folder import CHAT_TEMPLATE, MODEL_CARD, LlavaFolder, TrainingSettings

_BLOCK = 2**24  # bytes hashed at a time
# Megatron's arguments that make the recipe, by what they are called here.
_RECIPE = {
    "iterations": "train_iters",
    "records or rows per step": "global_batch_size",
    "longest record, tokens": "seq_length",
    "learning rate": "lr",
    "lowest learning rate": "min_lr",
    "schedule": "lr_decay_style",
    "warm-up iterations": "lr_warmup_iters",
    "projector's learning rate": "projector_lr",
    "vision tower's learning rate": "vision_tower_lr",
    "weight decay": "weight_decay",
    "AdamW's first beta": "adam_beta1",
    "AdamW's second beta": "adam_beta2",
    "largest gradient norm": "clip_grad",
    "order of the data": "data_order",
    "packing": "packing",
    "seed": "seed",
}
_PARTS = {
    "language model": "freeze_language_model",
    "projector": "freeze_projector",
    "vision tower": "freeze_vision_tower",
}
_SNIPPETS = {
    "hub": """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{folder}")
model = AutoModelForImageTextToText.from_pretrained("{folder}")
""",
    "original": """It has the layout of the original LLaVA code: `load_pretrained_model("{folder}", None, "llava")`.
""",
}
_CHAT = """content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def weight_hashes(files: Iterable[Path], advance: Callable[[int], None]) -> dict[str, str]:
    """Name -> SHA-256 of each file; advance(bytes) is called on the way."""
    found = {}
    for path in files:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                advance(len(block))
        found[path.name] = digest.hexdigest()
    return found


def write_model_card(
    folder: Path,
    name: str,
    layout: str,
    iteration: Path,
    geometry: LlavaGeometry,
    settings: TrainingSettings | None,
    provenance: dict[str, Any],
    hashes: dict[str, str],
    notes: Iterable[str],
) -> None:
    """Write README.md.

    Args:
        name: the folder's, once it is whole.
        layout: a name of LAYOUTS.
        iteration: the exported checkpoint's folder, with the data's state beside it.
        provenance: the export's own.
        hashes: SHA-256 of the weight files by name.
        notes: what the export told the user.
    """
    sections = [
        _front(layout),
        f"# {name}",
        "\n".join(_model(geometry, provenance)),
        f"## Use\n\n{_use(folder, name, layout)}",
        "\n".join(f"- {note}" for note in notes),
        _training(iteration, settings),
        _data(iteration),
        _table("Weights", ("file", "SHA-256"), hashes.items()),
        _table("Versions", ("package", "at the export"), provenance["versions"].items()),
    ]
    (folder / MODEL_CARD).write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def _front(layout: str) -> str:
    library = "library_name: transformers\n" if layout == "hub" else ""
    return f"---\n{library}pipeline_tag: image-text-to-text\ntags:\n- llava\n---"


def _model(geometry: LlavaGeometry, provenance: dict[str, Any]) -> list[str]:
    """What it consists of, and where that came from."""
    language, tower = geometry.language, geometry.tower
    origin = provenance.get("checkpoint_provenance") or {}
    sources = {role: source.get("name") for role, source in origin.get("sources", {}).items()}
    of = {role: f" of `{sources[role]}`" if sources.get(role) else "" for role in ("llm", "clip")}
    lines = [
        f"A LLaVA: a `{language.model_type}` language model{of['llm']}, a `{tower.model_type}` vision tower{of['clip']}"
        f" that sees {tower.side_px} x {tower.side_px} pixels, and a projector `{geometry.projector_type}`. An image "
        f"is {tower.image_tokens} tokens."
    ]
    if "llava" in sources:
        lines.append(f"It began as the LLaVA `{sources['llava']}`.")
    return lines


def _use(folder: Path, name: str, layout: str) -> str:
    if layout != "hub":
        return _SNIPPETS["original"].replace("{folder}", name).strip()
    chat = "\n" + _CHAT if (folder / CHAT_TEMPLATE).is_file() else ""
    return _SNIPPETS["hub"].replace("{folder}", name) + chat + "```"


def _training(iteration: Path, settings: TrainingSettings | None) -> str:
    """Stage, settings, recipe and loss."""
    rows: dict[str, Any] = {}
    try:
        arguments = read_arguments(iteration)
    except UserError:
        arguments = {}
    frozen = {part: arguments.get(flag) for part, flag in _PARTS.items()}
    if None not in frozen.values():
        rows["trained"] = ", ".join(part for part, is_frozen in frozen.items() if not is_frozen)
        rows["stage"] = "1: captions for the projector" if frozen["language model"] else "2: instructions"
    if iteration.name != "release":
        rows["exported at iteration"] = int(iteration.name.removeprefix("iter_"))
    if settings is not None:
        template = settings.conversation_template
        rows["conversation template"] = "not known" if template is None else Path(template).name
        rows["images become square by"] = settings.image_aspect_ratio
        if settings.image_tiles != (1, 1):
            rows["tiles of an image"] = f"{settings.spelled('image_tiles')} and a thumbnail"
        rows["turned as their EXIF tag says"] = settings.spelled("exif_orientation")
        rows["between <im_start> and <im_end>"] = settings.spelled("image_start_end")
        rows["images before the conversation"] = settings.spelled("image_conv_front")
    if (record := LlavaFolder.of(iteration.parent).lora) is not None:
        config = record.config
        rows["adapters in"] = f"{', '.join(config.parts).replace('_', ' ')}: {config.spelled('targets')}"
        rows["adapters' rank, alpha, dropout"] = f"{config.rank}, {config.alpha:g}, {config.dropout:g}"
    rows |= {name: arguments[key] for name, key in _RECIPE.items() if arguments.get(key) is not None}
    rows |= _losses(iteration)
    return _table("Training", ("what", "value"), rows.items())


def _losses(iteration: Path) -> dict[str, str]:
    """The last losses, which the trainer keeps beside the data's state."""
    file = iteration.parent / "data" / iteration.name / "notes.json"
    try:
        notes = json.loads(file.read_text())
        found = {"loss of the last iteration": notes["losses"][-1], "validation loss": notes["validation loss"]}
        return {name: f"{value:.4f}" for name, value in found.items() if value is not None}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}


def _data(iteration: Path) -> str:
    """Datasets and record counters, summed over the ranks that saved them."""
    total: Counter[str] = Counter()
    records = None
    for file in sorted((iteration.parent / "data" / iteration.name).glob("mp_rank_00*/train_dataloader_dprank*.pt")):
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")["dataloader_state_dict"]
            total.update(state["counts"])
            records = state["data"].get("records")
        except (OSError, RuntimeError, EOFError, *STRANGE):
            return ""  # half an account is none
    if not total:
        return ""
    try:
        path = read_arguments(iteration).get("train_dataset_path")
    except UserError:
        path = None
    rows: dict[str, Any] = {"dataset": "/".join(Path(path).parts[-2:])} if path else {}
    rows |= {"records of the dataset": records} if records is not None else {}
    rows |= {f"records {name}": count for name, count in total.items() if count or name in ("kept", "skipped")}
    return _table("Data", ("what", "value"), rows.items())


def _table(title: str, head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    """A section with a table; empty without rows."""
    lines = [f"| {name} | `{value}` |" for name, value in rows]
    return "\n".join([f"## {title}\n", f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines]) if lines else ""
