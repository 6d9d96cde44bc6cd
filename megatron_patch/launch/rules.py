"""What one value must be: an English text, which --help and a refusal show, and what it means."""

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch import llava_folder
from megatron_patch.lora import PARTS, PEFT_CONFIG
from megatron_patch.model_sizes import MODEL_SIZES
from megatron_patch.object_storage import is_url, url_problem

# As it was called: the launchers may be reached through a link, and name their programs beside it.
REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Rule:
    """text: completes "must be ...".  problem: None for a value that obeys it, else what was found, or "".

    parse: the value for Python; choices: all values, where there are few.
    """

    text: str
    problem: Callable[[str], str | None]
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()


def _rule(text: str, obeys: Callable[[str], bool], parse: Callable[[str], Any] = str) -> Rule:
    return Rule(text, lambda value: None if obeys(value) else "", parse)


# ---------------------------------------------------------------- words and numbers


def one_of(*words: str) -> Rule:
    """One of a few words."""
    return Rule(f"one of {' '.join(words)}", lambda value: None if value in words else "", str, words)


def whole(low: int, high: int) -> Rule:
    """A whole number without sign and leading zeros."""

    def obeys(value: str) -> bool:
        return bool(re.fullmatch("0|[1-9][0-9]{0,8}", value)) and low <= int(value) <= high

    return _rule(f"a whole number from {low} to {high}", obeys, int)


def is_number(text: str) -> bool:
    """Is it a decimal number, maybe with an exponent of ten, and neither infinite nor negative?"""
    pattern = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?"
    return bool(re.fullmatch(pattern, text, re.ASCII)) and math.isfinite(float(text))


def number(text: str, fits: Callable[[float], bool]) -> Rule:
    """A number, of those that fit."""
    return _rule(text, lambda value: is_number(value) and fits(float(value)), float)


def _any_text(value: str) -> bool:
    return bool(value.strip())


BOOLEAN = one_of("true", "false")
AUTO_BOOLEAN = one_of("auto", "true", "false")
MODEL_SIZE = one_of(*MODEL_SIZES)
COUNT = whole(1, 999999999)
COUNT_OR_ZERO = whole(0, 999999999)
PARALLEL = whole(1, 99999)
PORT = whole(1, 65535)
ABOVE_0 = number("a number above 0", lambda value: value > 0)
FROM_0 = number("a number from 0", lambda value: value >= 0)
DECAY = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
TEXT = _rule("text", _any_text)
HOST = _rule("a host name or address", lambda value: bool(re.fullmatch("[A-Za-z0-9:][A-Za-z0-9._:-]*", value)))


def _listed(value: str, known: Iterable[str]) -> str | None:
    known = list(known)
    return None if value in known else f"known: {' '.join(known)}"


def files_of(folder: str, suffix: str) -> list[str]:
    """Names of a folder's files without their suffix, those that begin with _ left out."""
    names = os.listdir(os.path.join(REPOSITORY, "megatron_patch", folder))
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix) and name[0] != "_")


def _template_problem(value: str) -> str | None:
    if value.endswith((".json", ".yaml", ".yml")) and os.path.isfile(value):
        return None
    return _listed(value, ["auto", *files_of("data/conversation_templates", ".yaml")])


def _iterations(text: str) -> tuple[int, int]:
    first, last = text.split("-")
    return int(first), int(last)


def _are_iterations(value: str) -> bool:
    return (
        bool(re.fullmatch("[1-9][0-9]{0,8}-[1-9][0-9]{0,8}", value)) and _iterations(value)[0] <= _iterations(value)[1]
    )


def grid(text: str) -> tuple[int, int] | None:
    """`2x3` -> (2, 3): columns and rows; `auto` -> None."""
    if text == "auto":
        return None
    columns, rows = text.split("x")
    if int(columns) < 1 or int(rows) < 1:
        raise ValueError(text)
    return int(columns), int(rows)


TEMPLATE = Rule("auto, a built-in template, or a .json or .yaml file", _template_problem)
ACCELERATOR = Rule("auto or an accelerator", lambda value: _listed(value, ["auto", *files_of("device", ".py")]))
BENCHMARK = Rule(
    "a benchmark of evaluate_llava.sh", lambda value: _listed(value, files_of("evaluation/benchmarks", ".py"))
)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


NAMES = _rule("names, as q_proj,v_proj, or all", lambda value: bool(re.fullmatch(r"\w+(,\w+)*", value)), _names)
MODEL_PARTS = Rule(
    f"of {' '.join(PARTS)}, with commas between",
    lambda value: None if value and set(value.split(",")) <= PARTS.keys() else "",
    lambda value: tuple(part for part in PARTS if part in value.split(",")),
)
GRID = _rule(
    "COLUMNSxROWS, as 2x2, or auto",
    lambda value: value == "auto" or bool(re.fullmatch("[1-9]x[1-9]", value)),
    grid,
)
ITERATIONS = _rule("iterations, as 10-12", _are_iterations, _iterations)
RANKS = _rule(
    "ranks, as 0,1",
    lambda value: bool(re.fullmatch("(0|[1-9][0-9]{0,4})(,(0|[1-9][0-9]{0,4}))*", value)),
    lambda value: [int(rank) for rank in value.split(",")],
)
_GPU = "(0|[1-9][0-9]{0,3}|(GPU|MIG)-[0-9A-Za-z/-]+)"
GPU_IDS = _rule(
    "GPUs by number or UUID, as 0,2,3", lambda value: bool(re.fullmatch(f"{_GPU}(,{_GPU})*", value, re.ASCII))
)


# ---------------------------------------------------------------- files and folders


def missing(path: str, part: str) -> str | None:
    """Why there is no `part` in the folder; None: there is."""
    if not os.path.exists(path):
        return "it does not exist"
    if not os.path.isdir(path):
        return "it is not a folder"
    return None if os.path.exists(os.path.join(path, part)) else f"it has no {part}"


CONVERT = "convert the Hugging Face model that it was made of, or exported to, with hf2mcore_convertor_llava.sh"
NEMO = ("context", "weights", "model_weights", "model_config.yaml")  # of NeMo 2's and 1's folders


def checkpoint_problem(path: str) -> str | None:
    """Why a folder is no finished checkpoint: tracker, its iteration, llava/."""
    if path.endswith(".nemo") or (os.path.isdir(path) and set(NEMO) & set(os.listdir(path))):
        return f"it is NeMo's; {CONVERT}"
    if found := missing(path, TRACKER):
        return found
    newest = newest_iteration(path)
    if newest is None:
        return f"its {TRACKER} names no iteration"
    if not os.path.isdir(os.path.join(path, newest)):
        return f"it has no {newest}, which its {TRACKER} names"
    if absent := absent_files(os.path.join(path, newest)):
        return f"its {newest} lacks {absent}: copy it again"
    found = missing(path, "llava/config.json")
    return found and f"{found}: another program has written it; {CONVERT}"


def newest_iteration(path: str) -> str | None:
    """Folder that the tracker of a checkpoint names, as `release` or `iter_0000010`; None: it names none."""
    try:
        with open(os.path.join(path, TRACKER), encoding="ascii", errors="replace") as file:
            word = file.read().strip()
    except OSError:
        return None
    if re.fullmatch("[0-9]{1,9}", word, re.ASCII):
        return f"iter_{int(word):07d}"
    return word if word == "release" else None


def absent_files(iteration: str) -> str | None:
    """The first data file that the .metadata of a torch_dist folder names and that is not there; None: all are.

    The names stand in the pickle as they are; nothing of it is run.
    """
    try:
        with open(os.path.join(iteration, ".metadata"), "rb") as file:
            named = {found.decode() for found in re.findall(rb"__[0-9]+_[0-9]+\.distcp", file.read())}
    except OSError:
        return None  # of another format, whose reader looks itself
    here = set(os.listdir(iteration))
    return min(named - here, default=None)


def _none_or(problem: Callable[[str], str | None]) -> Callable[[str], str | None]:
    return lambda value: None if value == "none" else problem(value)


def dataset_problem(value: str) -> str | None:
    """Why it is no energon dataset.  Object storage is not asked here: stored_data.py does, once all else is right."""
    if is_url(value):
        return url_problem(value)
    if value.endswith((".yaml", ".yml")) and os.path.isfile(value):
        return None
    return missing(value, ".nv-meta")


def existing_part(path: str) -> str:
    """The path, or the folder above it that is there."""
    place = os.path.realpath(path)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    return place


def writable_problem(value: str) -> str | None:
    """Why nothing can be written into this folder, which may have to be made."""
    if not value:
        return "it is empty"
    if is_url(value):
        return "it is in object storage: only data is read from there"
    if os.path.realpath(value) == "/":
        return "it is the root of the file system"
    place = existing_part(value)
    if not os.path.isdir(place):
        return f"{place} is a file"
    return None if os.access(place, os.W_OK) else f"{place} is not writable"


def _new_or_empty_problem(value: str) -> str | None:
    if problem := writable_problem(value):
        return problem
    return "it is not empty" if os.path.isdir(value) and os.listdir(value) else None


def _file_problem(value: str) -> str | None:
    if os.path.isdir(value):
        return "it is a folder"
    return None if os.path.isfile(value) else "it does not exist"


def _llava_folder_problem(value: str) -> str | None:
    parts = (llava_folder.CONFIG, llava_folder.IMAGE_PROCESSOR, llava_folder.TOKENIZER_CONFIG)
    return next((found for part in parts if (found := missing(value, part))), None)


def _tower_problem(value: str) -> str | None:
    return None if value.endswith(".pt") and os.path.isfile(value) else missing(value, "config.json")


def _model_or_checkpoint_problem(value: str) -> str | None:
    return None if os.path.isfile(os.path.join(value, "config.json")) else checkpoint_problem(value)


CHECKPOINT = Rule("a converted checkpoint", checkpoint_problem)
CHECKPOINT_OR_NONE = Rule("a converted checkpoint, or none", _none_or(checkpoint_problem))
MODEL_OR_CHECKPOINT = Rule("a Hugging Face model folder or a converted checkpoint", _model_or_checkpoint_problem)
MODEL_FOLDER = Rule("a Hugging Face model folder", lambda value: missing(value, "config.json"))
TOWER = Rule("a Hugging Face model folder, a .pt file, or none", _none_or(_tower_problem))
LLAVA_FOLDER = Rule("a folder with LLaVA configuration and tokenizer", _llava_folder_problem)
DATASET = Rule(
    "an energon dataset (folder with .nv-meta, or a .yaml that lists such folders; a path, msc:// or s3://)",
    dataset_problem,
)
OUTPUT = Rule("a folder to write into, not /", writable_problem, Path)
NEW_FOLDER = Rule("a new or empty folder, not /", _new_or_empty_problem)
FEATURES = Rule("a folder of cache_tower_features.py", lambda value: missing(value, "features.json"), Path)
PEFT_FOLDER = Rule("a folder that peft has saved", lambda value: missing(value, PEFT_CONFIG), Path)
FOLDER = Rule("a folder", lambda value: None if os.path.isdir(value) else "there is none", Path)
FILE = Rule("a file", _file_problem, Path)
FILE_OR_FOLDER = Rule("a file or folder", lambda value: None if os.path.exists(value) else "it does not exist", Path)


def _program_problem(value: str) -> str | None:
    if os.sep in value:
        return None if os.path.isfile(value) and os.access(value, os.X_OK) else ""
    return None if any(os.access(os.path.join(folder, value), os.X_OK) for folder in os.get_exec_path()) else ""


PROGRAM = Rule("a program", _program_problem)
