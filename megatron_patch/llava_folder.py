"""The `llava/` folder of a checkpoint: all that a reader needs beside the weights.  Its files are named only here.

    config.json                  numbers of the model, as transformers writes them
    tokenizer.json and others    the tokenizer; tokenizer_files.load_tokenizer reads it from the folder
    tokenizer.model              sentencepiece's, where the source had one: not read, for the export
    preprocessor_config.json     pixel statistics, side, crop and filter of the vision tower's images
    processor_config.json        transformers' LlavaProcessor, or that of the model's kind
    video_preprocessor_config.json  of LLaVA-OneVision
    provenance.json              what the folder was made of, by which versions
    untrained_tower.safetensors  layers of the tower that do not run, for the export
    llava_training.json          image and prompt settings of the training (TrainingSettings); absent before any
    lora.json                    of a checkpoint of adapters: their numbers and their base (lora.LoraRecord)
    conversation_template.*      the training's own template, where it is none of the known names
    original/                    config and tokenizer of a source in liuhaotian's layout, as they were

An exported Hugging Face folder holds the same names beside its weights and is read by the same class; it has more:

    chat_template.jinja          the training's template for apply_chat_template
    generation_config.json       greedy, up to the token that ends an answer
    README.md                    the model card

llava_training.json is one JSON object: "version": 1 and the fields of TrainingSettings, image_tiles as "2x2", for a
template of one's own the name of its file in the folder.

Standard library only.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_patch.atomic_files import atomic_file, write_text
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry, read_geometry_of
from megatron_patch.lora import LoraRecord

NAME = "llava"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
MODEL_CARD = "README.md"
PROVENANCE = "provenance.json"
UNTRAINED_TOWER = "untrained_tower.safetensors"
TRAINING = "llava_training.json"
LORA = "lora.json"
TEMPLATE = "conversation_template"  # with the suffix of the training's file
ORIGINAL = "original"

VERSION = 1  # raise it when a reader of today would misunderstand the file
ANY_RESOLUTION = "anyres"  # of a model that has a rule for it: tiles near the image's own resolution
IMAGE_ASPECT_RATIOS = ("crop", "pad", "stretch", ANY_RESOLUTION)
_TEMPLATE_SUFFIXES = (".json", ".yaml", ".yml")
IMAGE_SETTINGS = ("image_aspect_ratio", "image_tiles", "exif_orientation", "image_start_end")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How records became tokens and pixels.  In capitals each field is the launchers' option."""

    conversation_template: str | None  # a name or the path of a file; None: not known
    image_aspect_ratio: str = "crop"  # of IMAGE_ASPECT_RATIOS
    image_tiles: tuple[int, int] = (1, 1)  # columns, rows; 1, 1: the image alone
    exif_orientation: bool = True  # images are turned as their EXIF tag says
    image_start_end: bool = False  # each image stands between <im_start> and <im_end>
    image_conv_front: bool = False  # images stand before the conversation

    def differences(self, other: "TrainingSettings") -> list[str]:
        """Names of the fields in which the other differs; template files are compared by their content."""
        names = [field.name for field in dataclasses.fields(self)]
        different = [name for name in names if getattr(self, name) != getattr(other, name)]
        if "conversation_template" in different:
            contents = [_template_bytes(settings.conversation_template) for settings in (self, other)]
            if contents[0] is not None and contents[0] == contents[1]:
                different.remove("conversation_template")
        return different

    def for_data(self) -> dict[str, Any]:
        """Fields of data.loading.config.DataConfig that follow from these: all but the template."""
        return {
            "image_aspect_ratio": self.image_aspect_ratio,
            "tile_columns": self.image_tiles[0],
            "tile_rows": self.image_tiles[1],
            "apply_exif_orientation": self.exif_orientation,
            "image_start_end": self.image_start_end,
            "image_conv_front": self.image_conv_front,
        }

    def spelled(self, name: str) -> str:
        """A field as the launchers take it: `2x2`, `true`, `pad`."""
        value = getattr(self, name)
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)


def _is_template_file(template: str | None) -> bool:
    return template is not None and Path(template).suffix.lower() in _TEMPLATE_SUFFIXES


def _template_bytes(template: str | None) -> bytes | None:
    """Content of a template file; None where it is a name, or no such file."""
    return Path(template).read_bytes() if _is_template_file(template) and Path(template).is_file() else None


def _tiles(text: Any) -> tuple[int, int]:
    columns, rows = (int(part) for part in text.split("x"))
    if columns < 1 or rows < 1:
        raise ValueError(text)
    return columns, rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; wanted one, copy the file again from where it came")
    return value


@dataclasses.dataclass(frozen=True)
class LlavaFolder:
    """Reads and writes one folder; nothing is read before it is asked for."""

    path: Path

    @classmethod
    def of(cls, checkpoint: str | Path) -> "LlavaFolder":
        """The folder of a checkpoint."""
        return cls(Path(checkpoint) / NAME)

    @property
    def config(self) -> Path:
        """File with the numbers of the model."""
        return self.path / CONFIG

    def geometry(self) -> LlavaGeometry:
        """The model's geometry.  Raises UserError."""
        return read_geometry_of(self.path)

    @property
    def tokenizer(self) -> Path:
        """The folder that load_tokenizer and AutoTokenizer read."""
        return self.path

    @property
    def image_processor(self) -> Path:
        """File of the vision tower's image processor."""
        return self.path / IMAGE_PROCESSOR

    def image_processing(self, side_px: int) -> dict[str, Any]:
        """What the image processor says: image_mean and image_std (three numbers of 0..1), center_crop, resample.

        Raises:
            UserError: there is none, or it makes images that are not side_px x side_px.
        """
        where = self.image_processor
        if not where.is_file():
            raise UserError(f"{where}: no such file; it holds the pixel statistics of the vision tower, convert again")
        config = _read_json(where)
        center_crop = config.get("do_center_crop", "crop_size" in config)
        size, square = config.get("size"), {"height": side_px, "width": side_px}
        wanted = (side_px, {"shortest_edge": side_px}) if center_crop else (side_px, square)
        if size not in wanted or (center_crop and config.get("crop_size") not in (side_px, square)):
            raise UserError(
                f"{where}: size is {size}, crop_size {config.get('crop_size')}; for {side_px} x {side_px} px set "
                f"size {wanted[1]}{f' and crop_size {square}' if center_crop else ''}"
            )
        return {
            "image_mean": tuple(config["image_mean"]),
            "image_std": tuple(config["image_std"]),
            "center_crop": center_crop,
            "resample": config.get("resample", 3),
        }

    @property
    def untrained_tower(self) -> Path:
        """File with the tower's layers that do not run."""
        return self.path / UNTRAINED_TOWER

    @property
    def original(self) -> Path:
        """Folder with config and tokenizer of a source in the original layout."""
        return self.path / ORIGINAL

    @property
    def provenance(self) -> dict[str, Any]:
        """What the folder was made of; empty where nothing is noted.  Raises UserError."""
        file = self.path / PROVENANCE
        return _read_json(file) if file.is_file() else {}

    def write_provenance(self, text: str) -> None:
        """Write the note, JSON, whole or not at all."""
        write_text(self.path / PROVENANCE, text)

    @property
    def lora(self) -> LoraRecord | None:
        """What the checkpoint's adapters are; None where it holds whole weights.  Raises UserError: it is damaged."""
        file = self.path / LORA
        return LoraRecord.of_json(_read_json(file), file) if file.is_file() else None

    def write_lora(self, record: LoraRecord) -> None:
        """Write the record, whole or not at all."""
        write_text(self.path / LORA, json.dumps(record.as_json(), indent=2, ensure_ascii=False) + "\n")

    @property
    def training_settings(self) -> TrainingSettings | None:
        """What the weights were trained with; None where no training has said it.

        Raises:
            UserError: the file cannot be read, or is of a later version.
        """
        file = self.path / TRAINING
        if not file.is_file():
            return None
        values = _read_json(file)
        version = values.pop("version", None)
        if version != VERSION:
            raise UserError(
                f"{file}: its version is {version!r}, wanted {VERSION}; read this checkpoint with the toolkit that "
                "wrote it or a newer one"
            )
        try:
            settings = TrainingSettings(**values | {"image_tiles": _tiles(values["image_tiles"])})
            if settings.image_aspect_ratio not in IMAGE_ASPECT_RATIOS:
                raise ValueError(f"image_aspect_ratio {settings.image_aspect_ratio!r}")
            for name in ("exif_orientation", "image_start_end", "image_conv_front"):
                if not isinstance(getattr(settings, name), bool):
                    raise ValueError(f"{name} {getattr(settings, name)!r}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            wanted = ", ".join(field.name for field in dataclasses.fields(TrainingSettings))
            raise UserError(f"{file} is damaged ({error}); wanted {wanted}; copy it again from its source") from None
        template = settings.conversation_template
        if _is_template_file(template):
            settings = dataclasses.replace(settings, conversation_template=str(self.path / Path(template).name))
        return settings

    @property
    def settings(self) -> TrainingSettings:
        """training_settings, or before any training what its kind of model sees.  Raises UserError."""
        return self.training_settings or self.untrained_settings

    @property
    def untrained_settings(self) -> TrainingSettings:
        """What a model of this kind sees unless it is told otherwise.  Raises UserError."""
        return TrainingSettings(None, ANY_RESOLUTION if self.geometry().any_resolution else "crop")

    def write_training_settings(self, settings: TrainingSettings) -> None:
        """Write them, a template file beside them, whole or not at all; equal ones are left alone."""
        template = settings.conversation_template
        if _is_template_file(template):
            kept = self.path / f"{TEMPLATE}{Path(template).suffix.lower()}"
            if Path(template).absolute() != kept.absolute():
                with atomic_file(kept) as beside:
                    shutil.copyfile(template, beside)
            template = kept.name
        values = dataclasses.asdict(settings) | {
            "conversation_template": template,
            "image_tiles": settings.spelled("image_tiles"),
        }
        text = json.dumps({"version": VERSION} | values, indent=2, ensure_ascii=False) + "\n"
        file = self.path / TRAINING
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)
