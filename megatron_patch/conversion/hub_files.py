"""Config, tokenizer and processor files.  With usage_files.py the only one of the room that needs transformers; it is
imported when one of these functions runs, never with the package."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_patch.conversion import openai_clip
from megatron_patch.conversion.trained_settings import tower_processor
from megatron_patch.errors import UserError
from megatron_patch.geometry import check_known, read_geometry
from megatron_patch.language_models import LANGUAGE_MODELS
from megatron_patch.llava_folder import (
    CONFIG,
    GENERATION_CONFIG,
    IMAGE_PROCESSOR,
    PROCESSOR,
    SENTENCEPIECE,
    TOKENIZER_CONFIG,
    VIDEO_PROCESSOR,
    LlavaFolder,
)
from megatron_patch.llava_kinds import LLAVA_KINDS, VIDEO_MARK
from megatron_patch.tokenizer_files import load_tokenizer
from megatron_patch.vision_towers import OF_OPENAI_FILES, VISION_TOWERS, whole_models

IMAGE_TOKEN = "<image>"
_PROBES = ("What is in the picture?", " a  b\tc\nd", "Grüße, 世界! 42 + 1.5", "USER: x ASSISTANT: y</s>")


@contextmanager
def _quiet_transformers():
    """transformers without its advice (about torchvision, files saved, ...): our messages are what the user reads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: not there, or no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not there; wanted a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def model_type(folder: Path) -> str:
    """model_type of a hub folder's config.json."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; wanted a Hugging Face model folder")
    return str(read_json(folder / "config.json").get("model_type"))


def _auto_config(folder: Path):
    from transformers import AutoConfig

    with _quiet_transformers():
        try:
            return AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise UserError(f"{folder}/config.json is refused by transformers: {error}") from error


def full_config(folder: Path) -> dict[str, Any]:
    """config.json of a hub folder with every default that transformers fills in."""
    model_type(folder)  # refuses what is no folder or has no config: transformers would look for it on the network
    return json.loads(_auto_config(folder).to_json_string(use_diff=False))


@dataclass
class Tokens:
    """A tokenizer ready for LLaVA: it has `<image>` and a pad token."""

    tokenizer: Any
    image_id: int
    largest_id: int
    notes: list[str]
    video_id: int | None = None  # where it was asked for


def prepare_tokenizer(
    folder: Path, add_tokens: Sequence[str] = (), config: Any = None, video_token: bool = False
) -> Tokens:
    """The folder's tokenizer with new special tokens, then `<image>`, each when missing; a pad token named when missing
    (unk, else eos).

    Args:
        video_token: `<video>` stands behind `<image>`, when missing too.
        config: transformers' config object of the LLM, where the folder's config.json is none that transformers knows.
    Raises:
        UserError: there is no tokenizer that transformers can load from these files.
    """
    from transformers import AddedToken

    with _quiet_transformers():
        tokenizer = load_tokenizer(folder, config)
        notes = _add_special_tokens(tokenizer, add_tokens)
        for token in (IMAGE_TOKEN, VIDEO_MARK) if video_token else (IMAGE_TOKEN,):
            if token not in tokenizer.get_vocab():
                tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
                notes.append(f"{token} added to the tokenizer as id {tokenizer.convert_tokens_to_ids(token)}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
            if tokenizer.pad_token is None:
                raise UserError(f"{folder}: the tokenizer has no pad, unk or eos token; give it a pad token")
            notes.append(f"the tokenizer had no pad token; it pads with {tokenizer.pad_token!r}")
    ids = tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"{folder}: the tokenizer cuts {IMAGE_TOKEN} into {len(ids)} tokens; make it a special token")
    video_id = tokenizer.convert_tokens_to_ids(VIDEO_MARK) if video_token else None
    return Tokens(tokenizer, ids[0], max(tokenizer.get_vocab().values()), notes, video_id)


def _add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Append the tokens that the tokenizer lacks, in their order; returns notes for the user."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    notes = [f"{token} is id {known[token]} of the tokenizer already" for token in tokens if token in known]
    if new:
        first, last = (tokenizer.convert_tokens_to_ids(token) for token in (new[0], new[-1]))
        notes.insert(0, f"{len(new)} special token(s) added to the tokenizer: {new[0]} is {first}, {new[-1]} is {last}")
    return notes


def llava_config(
    llm: Path,
    clip: Path,
    tokens: Tokens,
    vocabulary: int,
    precision: str,
    projector: str,
    feature_layer: int,
    kind: str,
) -> dict[str, Any]:
    """Full config of an LLM folder and a CLIP folder, the choices of this kind of LLAVA_KINDS for the rest.

    Raises:
        UserError: an LLM or tower the table does not know.
    """
    check_known("LLM model_type", model_type(llm), LANGUAGE_MODELS)
    text, vision = _auto_config(llm), tower_config(clip)
    return compose_config(text, vision, tokens, vocabulary, precision, projector, feature_layer, kind)


def tower_config(folder: Path) -> Any:
    """transformers' config object of a tower folder or OpenAI's file; of a model with a text tower, its vision half.

    Raises:
        UserError: a tower the table does not know.
    """
    if folder.is_file():
        return config_object(OF_OPENAI_FILES, openai_clip.read_config(folder))
    tower_type = model_type(folder)
    check_known("vision tower model_type", tower_type, (*VISION_TOWERS, *whole_models()))
    config = _auto_config(folder)
    return config.vision_config if tower_type in whole_models() else config


def config_object(model_type: str, values: dict[str, Any]) -> Any:
    """transformers' config object of this kind with these values and the defaults for the rest."""
    from transformers import AutoConfig

    with _quiet_transformers():
        try:
            return AutoConfig.for_model(model_type, **values)
        except Exception as error:
            raise UserError(f"transformers refuses the {model_type} config {values}: {error}") from error


def compose_config(
    text: Any,
    vision: Any,
    tokens: Tokens,
    vocabulary: int,
    precision: str,
    projector: str,
    feature_layer: int,
    kind: str = "llava",
    pinpoints: Sequence[Sequence[int]] | None = None,
    aspect_ratio: str | None = None,
) -> dict[str, Any]:
    """Full LLaVA config from transformers' config objects of its two halves.

    Args:
        kind: of LLAVA_KINDS.
        pinpoints: image_grid_pinpoints, where the kind has them; None: those of the kind.
        aspect_ratio: vision_aspect_ratio, likewise.
    """
    text.vocab_size = vocabulary
    row = LLAVA_KINDS[kind]
    values = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": tokens.image_id,
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": VISION_TOWERS[vision.model_type].select_strategy,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if row.any_resolution:
        values["image_grid_pinpoints"] = list(pinpoints or row.pinpoints(vision.image_size))
    if row.aspect_ratio:
        values["vision_aspect_ratio"] = aspect_ratio or row.aspect_ratio
    if tokens.video_id is not None:
        values["video_token_index"] = tokens.video_id
    with _quiet_transformers():
        config = config_object(kind, values)
        return finish_config(json.loads(config.to_json_string(use_diff=False)), precision, projector)


def finish_config(config: dict[str, Any], precision: str, projector: str) -> dict[str, Any]:
    """The same config with our dtype, its class and, for projectors the hub's LLaVA does not have, the projector."""
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    parts = {part: _tidy(config[part]) | {"dtype": dtype} for part in ("text_config", "vision_config")}
    config = _tidy(config) | parts
    kind = config.setdefault("model_type", "llava")
    check_known("model_type", kind, LLAVA_KINDS)
    config |= {"architectures": [LLAVA_KINDS[kind].architecture], "dtype": dtype}
    if projector != "mlp2x_gelu":
        config["mm_projector_type"] = projector
    if LLAVA_KINDS[kind].image_seq_length:
        # LLaVA folders may hold transformers' default of 576 for any tower; the launchers compare SEQ_LEN with it
        config["image_seq_length"] = read_geometry(config).tower.image_tokens
    return config


def with_older_rope(text: dict[str, Any]) -> dict[str, Any]:
    """The same config of an LLM with rope in the words of transformers 4 as well, which has another base without."""
    rope = dict(text.get("rope_parameters") or {})
    base = rope.pop("rope_theta", text.get("rope_theta", 10000.0))
    scaled = rope.get("rope_type", "default") != "default"
    return text | {"rope_theta": base, "rope_scaling": rope if scaled else None}


# What every transformers config carries and says nothing about this model.
_SAYS_NOTHING = (
    "_name_or_path",
    "torch_dtype",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)


def _tidy(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _SAYS_NOTHING}


def _square(size: object, shape: bool) -> object:
    """Image sizes as transformers 5 spells them, from the single number of older files."""
    if not isinstance(size, int):
        return size
    return {"height": size, "width": size} if shape else {"shortest_edge": size}


def image_processor(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """preprocessor_config.json of a tower folder, spelled for transformers 5; its kind's numbers when there is none.

    Raises:
        UserError: it crops to another size than the tower takes.
    """
    side = config["vision_config"]["image_size"]
    path, notes = folder / IMAGE_PROCESSOR, []
    nested = folder / PROCESSOR
    if path.is_file():
        values = read_json(path)
    elif nested.is_file() and isinstance(read_json(nested).get("image_processor"), dict):
        values = read_json(nested)["image_processor"]
    else:
        values = {}
        notes.append(
            f"{folder.name} has no {IMAGE_PROCESSOR}: mean, std and bicubic resizing to {side} px are those of "
            "the tower's kind"
        )
    values = tower_processor(values, LlavaFolder(folder).training_settings)
    kind = VISION_TOWERS[config["vision_config"]["model_type"]]
    defaults = {
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(kind.image_mean),
        "image_std": list(kind.image_std),
        "do_convert_rgb": True,
    }
    process = _cropped if kind.center_crop else _squeezed
    images = {"image_processor_type": kind.image_processor} | process(folder, values, defaults, side)
    return images | _of_any_resolution(folder, values, config), notes


def _of_any_resolution(folder: Path, values: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What the processor of a kind that cuts tiles has beside the tower's; nothing of the others."""
    kind, pinpoints = LLAVA_KINDS[config["model_type"]], config.get("image_grid_pinpoints")
    if not kind.any_resolution:
        return {}
    if values.get("image_grid_pinpoints", pinpoints) != pinpoints:
        raise UserError(
            f"{folder}: image_grid_pinpoints of {IMAGE_PROCESSOR} and {CONFIG} differ; the processor would cut other "
            "tiles than the model expects: make them equal"
        )
    return {"image_processor_type": kind.image_processor, "image_grid_pinpoints": pinpoints, "do_pad": True}


def _video_processor(source: Path, images: dict[str, Any]) -> dict[str, Any]:
    """video_preprocessor_config.json of the source; where it has none, frames are squeezed as images are."""
    if (source / VIDEO_PROCESSOR).is_file():
        return read_json(source / VIDEO_PROCESSOR)
    names = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    values = {name: images[name] for name in names}
    return {"video_processor_type": "LlavaOnevisionVideoProcessor"} | values


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    """processor_config.json: from what the processor counts the tokens of an image."""
    kind, vision = LLAVA_KINDS[config["model_type"]], config["vision_config"]
    values = {
        "processor_class": kind.processor,
        "image_token": IMAGE_TOKEN,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    if kind.video_token:
        patches = read_geometry(config).any_resolution.patches
        return values | {
            "video_token": VIDEO_MARK,
            "num_image_tokens": patches * patches,
            "vision_aspect_ratio": config["vision_aspect_ratio"],
        }
    return values | {
        "patch_size": vision["patch_size"],
        # the class token, which the strategy "default" subtracts again
        "num_additional_image_tokens": int(VISION_TOWERS[vision["model_type"]].class_token),
    }


def _cropped(folder: Path, values: dict[str, Any], defaults: dict[str, Any], side: int) -> dict[str, Any]:
    """The shorter side to `side` pixels or what the folder says, then the centre of `side` x `side`."""
    defaults |= {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": {"height": side, "width": side}}
    values = {name: value for name, value in values.items() if not name.endswith(("_type", "_class", "extractor"))}
    values = defaults | values
    values["size"], values["crop_size"] = _square(values["size"], False), _square(values["crop_size"], True)
    if values["crop_size"] != {"height": side, "width": side}:
        raise UserError(f"{folder}: images are cropped to {values['crop_size']}, but the tower takes {side} px")
    return values


def _squeezed(folder: Path, values: dict[str, Any], defaults: dict[str, Any], side: int) -> dict[str, Any]:
    """Squeezed to a square of `side` pixels, nothing cut off."""
    square = defaults["size"]
    values = defaults | {name: values[name] for name in defaults if values.get(name) is not None}
    if _square(values["size"], True) != square:
        raise UserError(f"{folder}: images are resized to {values['size']}, but the tower takes {side} px")
    return values | {"size": square}


def write_hub_folder(folder: Path, config: dict[str, Any], tokens: Tokens, llm: Path, tower: Path) -> list[str]:
    """Write config, tokenizer, processor and generation config, then load tokenizer and processor from there.

    Returns:
        Notes for the user.
    Raises:
        UserError: what was written does not load, or tokenizes differently than the source.
    """
    from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config)
    images, notes = image_processor(tower, config)
    write_json(folder / IMAGE_PROCESSOR, images)
    write_json(folder / PROCESSOR, _processor(config))
    if LLAVA_KINDS[config["model_type"]].video_token:
        write_json(folder / VIDEO_PROCESSOR, _video_processor(llm, images))
    with _quiet_transformers():
        tokens.tokenizer.save_pretrained(str(folder))
        settings = read_json(folder / TOKENIZER_CONFIG)  # without a trace of how it was loaded here
        write_json(
            folder / TOKENIZER_CONFIG,
            {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")},
        )
        if (llm / SENTENCEPIECE).is_file():  # transformers 5 does not save it
            shutil.copyfile(llm / SENTENCEPIECE, folder / SENTENCEPIECE)
        if (llm / GENERATION_CONFIG).is_file():
            shutil.copyfile(llm / GENERATION_CONFIG, folder / GENERATION_CONFIG)
        else:
            generation = GenerationConfig.from_model_config(_auto_config(folder).get_text_config())
            generation.save_pretrained(str(folder))
        try:
            saved = {"tokenizer": AutoTokenizer.from_pretrained(str(folder), local_files_only=True)}
            # transformers' processor of videos does not load without torchvision, which nothing here needs
            if not LLAVA_KINDS[config["model_type"]].video_token or find_spec("torchvision"):
                saved["processor"] = AutoProcessor.from_pretrained(str(folder), local_files_only=True).tokenizer
        except Exception as error:
            raise UserError(f"the tokenizer or processor of {llm} does not survive saving: {error}") from error
    for probe in (*_PROBES, f"a {IMAGE_TOKEN}\nb"):
        for name, other in saved.items():
            if other(probe)["input_ids"] != tokens.tokenizer(probe)["input_ids"]:
                raise UserError(
                    f"the saved {name} cuts {probe!r} into other tokens than the one in {llm}; save the source's "
                    "tokenizer with transformers 5 first"
                )
    return notes


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file as transformers does."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def file_fingerprint(path: Path) -> dict[str, Any]:
    """What a single source file was: name, size, SHA-256."""
    with open(path, "rb") as file:
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def fingerprint(folder: Path) -> dict[str, Any]:
    """What a source folder held: name, sizes of its files, SHA-256 of the small JSON ones; of a file its own."""
    if folder.is_file():
        return file_fingerprint(folder)
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            entry: dict[str, Any] = {"bytes": path.stat().st_size}
            if path.suffix == ".json" and path.stat().st_size < 2**24:
                entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            files[path.name] = entry
    return {"name": folder.name, "files": files}
