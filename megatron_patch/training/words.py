"""What a run needs to know before Megatron starts: our own arguments, the `llava/` folder, the words derived from both."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from megatron_patch import device
from megatron_patch.arguments import TEMPLATE_OF_MODEL, add_arguments
from megatron_patch.errors import UserError
from megatron_patch.model.geometry import LlavaGeometry, megatron_words, read_geometry

TRACKER = "latest_checkpointed_iteration.txt"
LLAVA_FOLDER = "llava"


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Read once, checked once."""

    geometry: LlavaGeometry
    llava_folder: Path  # configs, tokenizer and processor that this run uses and saves with its checkpoints
    template: str
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    words: tuple[str, ...]  # for Megatron's parser, derived ones first so that the user's win


def _own_arguments(argv: list[str]) -> argparse.Namespace:
    parser = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    # Megatron's words that decide where things lie; its own parser sees them again later
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--seq-length", type=int, required=True)
    return parser.parse_known_args(argv)[0]


def has_checkpoint(folder: Path | None) -> bool:
    """True when `folder` holds a finished checkpoint: the tracker file is written last."""
    return folder is not None and (folder / TRACKER).is_file()


def _llava_folder(arguments: argparse.Namespace) -> Path:
    """Where configs and tokenizer come from: the checkpoint resumed, else the one started from."""
    if has_checkpoint(arguments.load):
        return arguments.load / LLAVA_FOLDER
    if arguments.init_from != "none":
        start = Path(arguments.init_from)
        if not has_checkpoint(start):
            raise UserError(
                f"PRETRAIN_CHECKPOINT_PATH {start}: no {TRACKER} in it, so no finished checkpoint; "
                "convert one with hf2mcore_convertor_llava.sh, or pass `none` to start from random weights"
            )
        return start / LLAVA_FOLDER
    if not arguments.tokenizer_path:
        raise UserError("PRETRAIN_CHECKPOINT_PATH is none and TOKENIZER_PATH is not set; set it to a folder with a tokenizer")
    return Path(arguments.tokenizer_path)


def _pixel_statistics(llava_folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    where = llava_folder / "preprocessor_config.json"
    if not where.is_file():
        raise UserError(f"{where}: no such file; it holds the pixel statistics of the vision tower, convert again")
    config = json.loads(where.read_text())
    return tuple(config["image_mean"]), tuple(config["image_std"])


def read_settings(argv: list[str]) -> RunSettings:
    """Settings of a run from its command line (without the program's name).

    Raises:
        UserError: something is missing or does not fit; nothing has been created yet.
    """
    arguments = _own_arguments(argv)
    folder = _llava_folder(arguments)
    geometry = read_geometry(folder)
    tower = geometry.tower
    if arguments.image_tokens is not None and arguments.image_tokens != tower.image_tokens:
        raise UserError(
            f"SEQ_LEN is {arguments.image_tokens}, the vision tower makes {tower.image_tokens} tokens of a picture "
            f"({tower.side_px} px in patches of {tower.patch_px}); pass {tower.image_tokens}"
        )
    for name in ("train_dataset_path", "valid_dataset_path"):
        path = Path(getattr(arguments, name))
        if not (path / ".nv-meta").is_dir():
            raise UserError(
                f"{name.upper()} {path}: no .nv-meta folder in it, so not an energon folder; "
                "write one with toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
            )
    template = arguments.conversation_template
    if template == "auto":
        template = TEMPLATE_OF_MODEL[geometry.language.model_type]
    mean, std = _pixel_statistics(folder)
    derived = [
        *device.megatron_words(),
        *megatron_words(geometry.language, arguments.seq_length),
        *("--dataloader-type", "external"),
    ]
    if arguments.init_from != "none":
        derived += ["--pretrained-checkpoint", arguments.init_from]
    return RunSettings(geometry, folder, template, mean, std, (*derived, *argv))


def refuse(error: UserError) -> None:
    """Print the one sentence and exit with code 2; rank 0 alone speaks."""
    import os

    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
