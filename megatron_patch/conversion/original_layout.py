"""The layout of liuhaotian's own LLaVA folders, read and written.

Such a folder is the LLM's folder with more in it: config.json is the LLM's with `mm_*` fields beside, the projector is
`model.mm_projector.{0,2}.*` (linear: `model.mm_projector.*`), the tower is inside as
`model.vision_tower.vision_tower.vision_model.*` or only named by `mm_vision_tower`.  Its tokenizer has no `<image>`:
the original code puts the image in place of an index of its own.  Source of the names: github.com/haotian-liu/LLaVA,
llava/model/llava_arch.py, multimodal_encoder/clip_encoder.py and multimodal_projector/builder.py.
"""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_patch.conversion import hub_files
from megatron_patch.conversion.table import HubTensor
from megatron_patch.conversion.trained_settings import original_advice, original_values
from megatron_patch.conversion.usage_files import write_chat_files, write_sentencepiece_config, write_tokenizer
from megatron_patch.errors import UserError
from megatron_patch.geometry import PROJECTOR_TYPES, LlavaGeometry, check_known
from megatron_patch.language_models import LANGUAGE_MODELS, original_classes
from megatron_patch.llava_folder import (
    ANY_RESOLUTION,
    CONFIG,
    IMAGE_PROCESSOR,
    IMAGE_SETTINGS,
    LlavaFolder,
    TrainingSettings,
)
from megatron_patch.llava_kinds import LLAVA_KINDS, NEWLINE, most_tiles
from megatron_patch.tokenizer_files import load_tokenizer
from megatron_patch.vision_towers import VISION_TOWERS, published_towers

Blocks = Callable[[HubTensor], Iterator[Tensor]]  # the rows of a tensor, in any number of blocks
VIDEO_NEWLINE = "one_token"  # mm_newline_position: one image_newline behind a video, as transformers puts it
_TOWER = "model.vision_tower."
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_original(folder: Path) -> bool:
    """Is it a folder of the original layout?  Hub LLaVAs say text_config where these say mm_vision_tower."""
    config = hub_files.read_json(folder / "config.json")
    return str(config.get("model_type")).startswith("llava") and "mm_vision_tower" in config


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Original:
    """What config.json of an original folder says."""

    folder: Path
    values: dict[str, Any]
    llm_type: str
    tower_name: str
    feature_layer: int
    projector: str
    kind: str = "llava"  # of LLAVA_KINDS
    pinpoints: list[list[int]] | None = None  # image_grid_pinpoints of a kind that has them; None: those of the kind
    aspect_ratio: str | None = None  # vision_aspect_ratio of a kind that has one

    def text_config(self) -> Any:
        """transformers' config object of the LLM inside."""
        known = json.loads(hub_files.config_object(self.llm_type, {}).to_json_string(use_diff=False))
        # rope's older spelling; what is no field of the LLM belongs to the multimodal part
        fields = (set(known) | {"rope_theta", "rope_scaling"}) - {"model_type", "architectures", "dtype"}
        return hub_files.config_object(
            self.llm_type, {name: value for name, value in self.values.items() if name in fields}
        )


def _llm_type(values: dict[str, Any]) -> str:
    """model_type of the LLM inside, from the class or else from the model_type of the folder."""
    name = (values.get("architectures") or [values.get("model_type")])[0]
    by_name = original_classes()
    check_known("the class of an original LLaVA", name, by_name)
    return by_name[name]


def read_original(folder: Path) -> Original:
    """Read and check config.json.

    Raises:
        UserError: it asks for something other than the ways of seeing of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision;
            named.
    """
    values = hub_files.read_json(folder / "config.json")
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights and (folder / "mm_projector.bin").is_file():
        raise UserError(
            f"{folder} is what stage 1 of the original code leaves: a projector without an LLM; pass the LLM it was "
            "trained on, and mm_projector.bin of this folder as PROJECTOR_PATH"
        )
    where = f"{folder}/config.json"
    try:
        check_known("mm_vision_select_feature", values.get("mm_vision_select_feature", "patch"), ("patch",))
        kind = _kind(values)
        pinpoints = _pinpoints(values, kind) if LLAVA_KINDS[kind].any_resolution else None
        projector = values.get("mm_projector_type", "linear")  # v1.0 had no other and did not name it
        check_known("mm_projector_type", projector, PROJECTOR_TYPES)
        if values.get("s2") or values.get("mm_resampler_type"):
            raise UserError("several image scales (s2) and resamplers are not built here; choose a model without")
        layer = values.get("mm_vision_select_layer")
        if not isinstance(layer, int):
            raise UserError(f"mm_vision_select_layer is {layer!r}; wanted a whole number like -2")
        llm_type = _llm_type(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    aspect = values.get("image_aspect_ratio") if LLAVA_KINDS[kind].aspect_ratio else None
    return Original(folder, values, llm_type, str(values["mm_vision_tower"]), layer, projector, kind, pinpoints, aspect)


def _kind(values: dict[str, Any]) -> str:
    """Kind of LLAVA_KINDS of an original config.json."""
    merge, aspect = values.get("mm_patch_merge_type") or "flat", values.get("image_aspect_ratio")
    check_known("mm_patch_merge_type", merge, ("flat", "spatial_unpad"))
    if merge == "flat":
        return "llava"
    if most_tiles(aspect) is None:
        known = (ANY_RESOLUTION, LLAVA_KINDS["llava_onevision"].aspect_ratio)
        check_known("image_aspect_ratio of a model with mm_patch_merge_type spatial_unpad", aspect, known)
        return "llava_next"
    # how the frames of a video are made smaller; absent where no video was trained on
    check_known("mm_spatial_pool_mode", values.get("mm_spatial_pool_mode") or "bilinear", ("bilinear",))
    return "llava_onevision"


def _pinpoints(values: dict[str, Any], kind: str) -> list[list[int]] | None:
    """image_grid_pinpoints of an original config.json; None: those of the kind.

    The original code reads them as [width, height], transformers as [height, width]: where two grids show an image
    equally well, and the list names the one first, that code takes the other.  As transformers does, they are kept as
    they are written.
    """
    pinpoints = values.get("image_grid_pinpoints")
    if isinstance(pinpoints, str):  # as the training scripts are given them
        rows, columns = LLAVA_KINDS[kind].grids[-1]
        if kind == "llava_onevision" and pinpoints.replace(" ", "") == f"(1x1),...,({rows}x{columns})":
            return None
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError):
            raise UserError(f"image_grid_pinpoints is {pinpoints!r}; wanted a list of pairs of pixels") from None
    return [list(size) for size in pinpoints or []] or None


@dataclass(frozen=True)
class Tower:
    """Where the tower of an original folder comes from."""

    config: Any  # transformers' config object
    folder: Path | None  # with its config, image processor and, unless they are inside, its weights
    inside: bool
    feature_layer: int
    notes: list[str]


def find_tower(original: Original, clip: Path | None, names: Iterable[str]) -> Tower:
    """Find the tower and its config.

    Args:
        clip: the tower's folder as the user gave it; it wins over the name in config.json.
        names: raw tensor names of the original folder.
    Raises:
        UserError: the tower, or its config, is nowhere to be found, or its width is not mm_hidden_size.
    """
    inner = [name for name in names if name.startswith(_TOWER)]
    inside = bool(inner)
    named, notes = Path(original.tower_name), []
    if clip is None and named.is_absolute() and (named / "config.json").is_file():
        clip = named
    if clip is not None:
        config = hub_files.tower_config(clip)
        if inside:
            notes.append(f"the tower's weights are those inside {original.folder.name}, not those of {clip.name}")
    elif inside and original.tower_name in published_towers():
        config = hub_files.config_object(*published_towers()[original.tower_name])
    else:
        problem = "holds a tower without its config" if inside else "holds no tower"
        raise UserError(
            f"{original.folder} {problem}: its config.json names {original.tower_name!r}; pass the folder of that "
            "model as SOURCE_CLIP_CKPT_PATH"
        )
    width = original.values.get("mm_hidden_size", config.hidden_size)
    if width != config.hidden_size:
        raise UserError(
            f"{original.folder}: mm_hidden_size is {width}, but the tower is {config.hidden_size} wide; "
            f"pass the folder of {original.tower_name} as SOURCE_CLIP_CKPT_PATH"
        )
    layer = original.feature_layer
    if inside and _as_stored(config, inner):
        layer = -1
        notes.append(f"the tower inside ends with the layer that is used: {config.num_hidden_layers}, counted from 1")
    return Tower(config, clip, inside, layer, notes)


def _as_stored(config: Any, names: Iterable[str]) -> bool:
    """Change the config of a tower to what a folder holds of it, where the original code took layers off.

    Args:
        names: raw names of the tower's tensors.
    Returns:
        Does the tower end with the hidden layer that the projector sees?
    """
    dropped = VISION_TOWERS[config.model_type].original_layers_dropped
    stored = {int(found[1]) for name in names if (found := re.search(r"\.encoder\.layers\.(\d+)\.", name))}
    if not dropped or len(stored) != config.num_hidden_layers - dropped:
        return False
    config.num_hidden_layers -= dropped
    flag = VISION_TOWERS[config.model_type].pooling_head_flag
    if flag is not None:
        config.update({flag: any(".vision_model.head." in name for name in names)})
    return True


def advice(original: Original, trained_with: TrainingSettings | None) -> list[str]:
    """What a run that starts from the converted checkpoint does unless it is told otherwise."""
    notes = ["config.json does not say how the original fitted images to a square; training on crops them"]
    if trained_with is not None:
        told = (f"{name.upper()}={trained_with.spelled(name)}" for name in IMAGE_SETTINGS)
        notes = [f"training on sees images as the original did: {', '.join(told)}"]
    newline = original.values.get("mm_newline_position") or VIDEO_NEWLINE
    if LLAVA_KINDS[original.kind].video_token and newline != VIDEO_NEWLINE:
        notes.append(f"mm_newline_position is {newline!r}: here a video ends with one {NEWLINE}")
    return notes


def save_text_files(source: Path, target: Path, with_tokenizer: bool) -> None:
    """Keep config and, unless tokens were added to it, tokenizer of an original folder as they are."""
    target.mkdir()
    for name in _TEXT_FILES if with_tokenizer else _TEXT_FILES[:1]:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# ---------------------------------------------------------------- writing


def original_name(hub_name: str, projector: str) -> str:
    """Name in the original layout of a tensor of hub LLaVA files."""
    first, second = ("model.mm_projector.0.", "model.mm_projector.2.")
    places = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": _TOWER + "vision_tower.",
        "multi_modal_projector.linear_1.": first if projector != "linear" else "model.mm_projector.",
        "multi_modal_projector.linear_2.": second,
    }
    if hub_name == NEWLINE:
        return f"model.{NEWLINE}"
    begin = next(begin for begin in places if hub_name.startswith(begin))
    return places[begin] + hub_name.removeprefix(begin)


@dataclass(frozen=True)
class Export:
    """How a checkpoint is written in the original layout."""

    config: dict[str, Any]
    texts: Path | None  # folder of the source's own tokenizer; None: the checkpoint's
    rows: int  # of the vocabulary
    with_tower: bool
    projector: str
    notes: list[str]
    trained_with: TrainingSettings | None

    def renamed(self, tensors: Iterable[HubTensor], blocks: Blocks) -> tuple[list[HubTensor], Blocks]:
        """The tensors of the folder under their original names, and blocks() that is asked for those."""
        hub: dict[str, HubTensor] = {}
        for tensor in tensors:
            if tensor.name.startswith("vision_tower.") and not self.with_tower:
                continue
            if tensor.name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensor = HubTensor(tensor.name, (self.rows, *tensor.shape[1:]))
            hub[original_name(tensor.name, self.projector)] = tensor
        renamed = [HubTensor(name, tensor.shape) for name, tensor in hub.items()]
        return renamed, lambda tensor: blocks(hub[tensor.name])

    def write_text_files(self, folder: Path, hub: Path) -> list[str]:
        """Config, tokenizer, settings of the training and, with the tower, its image processor; `hub` is the
        checkpoint's llava/ folder.  Returns notes for the user."""
        source = self.texts or hub
        for name in _TEXT_FILES[1:]:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if self.with_tower and not (folder / IMAGE_PROCESSOR).exists():
            shutil.copyfile(LlavaFolder(hub).image_processor, folder / IMAGE_PROCESSOR)
        if self.trained_with is not None:
            LlavaFolder(folder).write_training_settings(self.trained_with)
        saved = LlavaFolder(hub).original / CONFIG
        if saved.is_file() and hub_files.read_json(saved) == self.config:
            shutil.copyfile(saved, folder / CONFIG)  # byte for byte
        else:
            text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
            (folder / CONFIG).write_text(text, encoding="utf-8")
        if self.texts is None:
            tokenizer = write_tokenizer(folder, hub)
            write_sentencepiece_config(folder, tokenizer)
        else:
            tokenizer = load_tokenizer(hub)
        return write_chat_files(folder, hub, tokenizer, self.trained_with, bos=False)


def plan_export(
    hub: Path, config: dict[str, Any], geometry: LlavaGeometry, precision: str, tower_name: str | None, with_tower: bool
) -> Export:
    """How to write the checkpoint with this llava/ folder in the original layout.

    Args:
        config: hub/config.json.
        tower_name: for mm_vision_tower; None: that of the source, or of the known tower with these numbers.
    Raises:
        UserError: the original code has no class for this LLM or projector, or the tower has no name.
    """
    known = [name for name, family in LANGUAGE_MODELS.items() if family.original]
    check_known("the original layout's LLM", geometry.language.model_type, known)
    saved, trained_with = LlavaFolder(hub).original, LlavaFolder(hub).training_settings
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    rows, notes, texts = geometry.language.vocabulary, [], None
    if (saved / "config.json").is_file():
        values = hub_files.read_json(saved / "config.json")
        if any((saved / name).is_file() for name in _TOKENIZERS):
            texts = saved
            if values["vocab_size"] < rows:
                rows = values["vocab_size"]
                notes.append(f"the vocabulary has the source's {rows} rows: the original layout has no <image>")
        values |= {"vocab_size": rows} | ({"torch_dtype": dtype} if "torch_dtype" in values else {})
        if tower_name:
            values["mm_vision_tower"] = tower_name
    else:
        values = _derived_config(config, geometry, dtype, tower_name or _known_tower(config, hub))
        values["unfreeze_mm_vision_tower"] = with_tower  # with it, the original code takes the tower inside
        if trained_with is None and geometry.any_resolution is None:
            notes.append("image_aspect_ratio is square (centre crop); set it to pad when trained on padded images")
    if trained_with is not None:
        values |= original_values(values, trained_with)
        notes += original_advice(trained_with)
    name = values["mm_vision_tower"]
    if not with_tower:
        notes.append(f"without the tower: who loads the folder takes {name}; a tuned tower needs --layout original")
    elif not values.get("unfreeze_mm_vision_tower") and "mm_vision_tower" not in (values.get("mm_tunable_parts") or ""):
        notes.append(
            f"the original code loads {name} instead of the tower inside unless config.json says "
            "unfreeze_mm_vision_tower: set it to true when the tower was tuned"
        )
    return Export(values, texts, rows, with_tower, geometry.projector_type, notes, trained_with)


def _known_tower(config: dict[str, Any], hub: Path) -> str:
    """mm_vision_tower: the known tower with the checkpoint's numbers, or else the folder the tower came from."""
    vision = config["vision_config"]
    whole = vision | {"num_hidden_layers": vision["num_hidden_layers"] + _layers_taken_off(config)}
    for name, numbers in VISION_TOWERS[vision["model_type"]].published.items():
        if all(whole.get(key) == value for key, value in numbers.items() if key != "projection_dim"):
            return name
    name = LlavaFolder(hub).provenance.get("sources", {}).get("clip", {}).get("name")
    if not name:
        raise UserError("the original layout names the vision tower, and this one has none; pass --vision-tower-name")
    return name


def _layers_taken_off(config: dict[str, Any]) -> int:
    """How many layers the named tower has above the last of the checkpoint's, as the original code stores it."""
    vision = config["vision_config"]
    ends_with_it = config["vision_feature_layer"] in (-1, vision["num_hidden_layers"])
    return VISION_TOWERS[vision["model_type"]].original_layers_dropped if ends_with_it else 0


def _derived_config(config: dict[str, Any], geometry: LlavaGeometry, dtype: str, tower_name: str) -> dict[str, Any]:
    """config.json of the original code for a checkpoint that came from elsewhere."""
    model_type, name = geometry.language.family.original
    text, taken_off = hub_files.with_older_rope(config["text_config"]), _layers_taken_off(config)
    for field in ("rope_parameters", "dtype", "transformers_version"):
        text.pop(field, None)
    return text | {
        "architectures": [name],
        "model_type": model_type,
        "torch_dtype": dtype,
        "use_mm_proj": True,
        "mm_vision_tower": tower_name,
        "mm_hidden_size": geometry.tower.hidden,
        "mm_projector_type": geometry.projector_type,
        "mm_vision_select_layer": -1 - taken_off if taken_off else config["vision_feature_layer"],
        "mm_vision_select_feature": "patch",
        **_of_images(config, geometry),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
    }


def _of_images(config: dict[str, Any], geometry: LlavaGeometry) -> dict[str, Any]:
    """How the original code makes features of an image."""
    if geometry.any_resolution is None:
        return {"mm_patch_merge_type": "flat", "image_aspect_ratio": "square"}
    values = {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": ANY_RESOLUTION,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
    }
    if geometry.kind.aspect_ratio:
        values["image_aspect_ratio"] = config.get("vision_aspect_ratio", geometry.kind.aspect_ratio)
        # of a video's frames, as transformers does it
        values |= {"mm_spatial_pool_mode": "bilinear", "mm_newline_position": VIDEO_NEWLINE}
    return values
