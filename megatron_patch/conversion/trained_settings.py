"""What a training did with images and prompts, told in the words of the layouts: transformers' and the original's."""

from pathlib import Path
from typing import Any

from megatron_patch.llava_folder import ANY_RESOLUTION, TRAINING, LlavaFolder, TrainingSettings

_START_END = "IMAGE_START_END=true: write <im_start><image><im_end> in a prompt where you would write <image>"
_FRONT = "IMAGE_CONV_FRONT=true: the images stand before the first question, in a prompt too"


def _template(settings: TrainingSettings, advice: str) -> list[str]:
    template = settings.conversation_template
    return [] if template is None else [f"trained with the template {Path(template).name}: {advice} ({TRAINING})"]


def _tiles(settings: TrainingSettings) -> list[str]:
    columns, rows = settings.image_tiles
    if columns * rows == 1:
        return []
    return [
        f"IMAGE_TILES={columns}x{rows}: no processor of this layout cuts tiles; give the model {columns * rows} tiles "
        f"row by row and the thumbnail, as data/image.py makes them, and {columns * rows + 1} <image> for each image"
    ]


# ---------------------------------------------------------------- transformers


def hub_processor(images: dict[str, Any], settings: TrainingSettings) -> dict[str, Any]:
    """The tower's preprocessor_config.json, changed so that transformers fits images to the square as training did.

    Equal pixels with transformers' PIL backend: pad is LlavaImageProcessor's do_pad, stretch a size without cropping.
    """
    if settings.image_aspect_ratio == "pad":
        cropped = images.get("do_center_crop", "crop_size" in images)
        return images | {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": cropped}
    if settings.image_aspect_ratio == "stretch" and "crop_size" in images:
        return images | {"size": images["crop_size"], "do_center_crop": False}
    return images


def tower_processor(images: dict[str, Any], settings: TrainingSettings | None) -> dict[str, Any]:
    """The way back from hub_processor(): what is the tower's own of an exported folder's preprocessor_config.json."""
    changed = {"do_pad"}
    if settings is not None and settings.image_aspect_ratio == "stretch":
        changed |= {"size", "do_center_crop"}
    return {name: value for name, value in images.items() if name not in changed}


def hub_advice(settings: TrainingSettings) -> list[str]:
    """What who uses the exported folder must do, since no file of it does."""
    notes = _template(settings, "write prompts in it")
    if settings.image_aspect_ratio not in ("crop", ANY_RESOLUTION):
        notes.append(f"IMAGE_ASPECT_RATIO={settings.image_aspect_ratio}: AutoProcessor of the folder does so by itself")
    notes += _tiles(settings)
    if settings.image_start_end:
        notes.append(_START_END)
    if settings.image_conv_front:
        notes.append(_FRONT)
    if not settings.exif_orientation:
        notes.append("EXIF_ORIENTATION=false: open images without turning them, which transformers' load_image does")
    return notes


# ---------------------------------------------------------------- the original code


def settings_of_original(folder: Path, values: dict[str, Any]) -> TrainingSettings | None:
    """What a folder of the original layout was trained with, by its config.json `values`; None where that is not said.

    Raises:
        UserError: the folder is an export of this toolkit, and its own note cannot be read.
    """
    kept = LlavaFolder(folder).training_settings
    if kept is not None:
        return kept
    ways = {"pad": "pad", "square": "crop", None: "crop"}
    if values.get("mm_patch_merge_type") == "spatial_unpad":  # LLaVA-NeXT, and LLaVA-OneVision with anyres_max_9
        ways = {values["image_aspect_ratio"]: ANY_RESOLUTION}
    if values.get("image_aspect_ratio") not in ways:  # anyres whose tiles follow each other
        return None
    return TrainingSettings(
        None,
        ways[values.get("image_aspect_ratio")],
        exif_orientation=False,  # which the original code does not look at
        image_start_end=bool(values.get("mm_use_im_start_end")),
    )


def original_values(values: dict[str, Any], settings: TrainingSettings) -> dict[str, Any]:
    """Fields of the original config.json that say it; those of `values` that say the same already are left out."""
    changes = {}
    same = settings.image_aspect_ratio in ("pad", ANY_RESOLUTION)
    aspect = settings.image_aspect_ratio if same else "square"
    known = values.get("image_aspect_ratio") or "square"
    if known != aspect and not (aspect == ANY_RESOLUTION and known.startswith(aspect)):  # anyres_max_9 is one of them
        changes["image_aspect_ratio"] = aspect
    if bool(values.get("mm_use_im_start_end")) != settings.image_start_end:
        changes["mm_use_im_start_end"] = settings.image_start_end
    return changes


def original_advice(settings: TrainingSettings) -> list[str]:
    """What the original code has no field for."""
    notes = _template(settings, "choose it as conv-mode")
    if settings.image_aspect_ratio == "stretch":
        notes.append("IMAGE_ASPECT_RATIO=stretch: the original code crops; squeeze images to a square before it")
    notes += _tiles(settings)
    if settings.image_conv_front:
        notes.append(_FRONT)
    if settings.exif_orientation:
        notes.append("EXIF_ORIENTATION=true: the original code does not turn images as their EXIF tag says; turn them")
    return notes
