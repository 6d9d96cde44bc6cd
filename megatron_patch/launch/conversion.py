"""The checkpoint converter's launcher: its rows, its rules and the words they become."""

import json
import os

from megatron_patch import llava_folder
from megatron_patch.geometry import PROJECTOR_TYPES
from megatron_patch.launch.rows import COMMON_OPTIONS, Argument, Call, Command, Program, option, python_path, quoted
from megatron_patch.launch.rules import (
    BOOLEAN,
    CHECKPOINT,
    FILE,
    MODEL_FOLDER,
    MODEL_OR_CHECKPOINT,
    MODEL_SIZE,
    NEW_FOLDER,
    PARALLEL,
    REPOSITORY,
    TEXT,
    TOWER,
    checkpoint_problem,
    missing,
    one_of,
)
from megatron_patch.llava_kinds import LLAVA_KINDS

ENTRY = f"{REPOSITORY}/toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.py"
ADAPTER_LAYOUTS = ("peft", "original_lora")
LAYOUTS = ("hub", "original", "original_without_tower", *ADAPTER_LAYOUTS)
FORMATS = ("torch_dist", "torch")
FEATURE_LAYERS = ("-2", "-1")

ARGUMENTS = (
    Argument(
        "MODEL_SIZE",
        MODEL_SIZE,
        "size of the language model; compared with its configuration",
        own="--model-size",
    ),
    Argument(
        "SOURCE_LLM_CKPT_PATH",
        MODEL_OR_CHECKPOINT,
        "mg2hf=false: the Hugging Face language model, or a whole LLaVA; mg2hf=true: the checkpoint to export",
        own="--source-llm",
    ),
    Argument(
        "SOURCE_CLIP_CKPT_PATH",
        TOWER,
        "the vision tower: CLIP or SigLIP, or OpenAI's own ViT-*.pt; none when the first source holds it",
        own="--source-clip",
    ),
    Argument("TARGET_CKPT_PATH", NEW_FOLDER, "where the result goes", own="--target"),
    Argument(
        "TP",
        PARALLEL,
        "tensor-parallel size the checkpoint is meant for; any size reads the format torch_dist",
        own="--tensor-model-parallel-size",
    ),
    Argument(
        "PP",
        PARALLEL,
        "pipeline-parallel size the checkpoint is meant for; any size reads the format torch_dist",
        own="--pipeline-model-parallel-size",
    ),
    Argument("mg2hf", BOOLEAN, "false: Hugging Face to Megatron; true: Megatron to Hugging Face", own="--mg2hf"),
    Argument("PR", one_of("fp16", "bf16", "fp32"), "precision of the written weights", own="--precision"),
    Argument(
        "HF_CKPT_PATH",
        MODEL_FOLDER,
        "with mg2hf=true required: the model it came from, compared before the export",
        own="--hf-checkpoint",
    ),
)
OPTIONS = (
    option(
        "PROJECTOR",
        "(mlp2x_gelu)",
        one_of(*PROJECTOR_TYPES),
        "kind of the new projector; not with mg2hf=true",
        own="--projector",
    ),
    option(
        "PROJECTOR_PATH",
        "(a new one)",
        FILE,
        "mm_projector.bin to start from, such as stage 1 of LLaVA leaves; not with mg2hf=true",
        own="--mm-projector",
    ),
    option(
        "VISION_FEATURE_LAYER",
        "(-2)",
        one_of(*FEATURE_LAYERS),
        "layer of the vision tower whose features the projector sees: the last but one or the last; not with "
        "mg2hf=true",
        own="--vision-feature-layer",
    ),
    option(
        "MODEL_KIND",
        "(llava)",
        one_of(*LLAVA_KINDS),
        "kind of the LLaVA that is made of an LLM and a tower: 1.5, or one that sees images at any resolution; not "
        "with mg2hf=true",
        own="--model-kind",
    ),
    option(
        "ADD_TOKENS",
        "(none)",
        TEXT,
        "special tokens for tokenizer, embedding and head, before the image token; x_0..x_7 is a range; not with "
        "mg2hf=true",
        own="--add-tokens",
    ),
    option(
        "EXPORT_LAYOUT",
        "(hub)",
        one_of(*LAYOUTS),
        "with mg2hf=true: the layout of transformers, or that of the original LLaVA code; a checkpoint of adapters is "
        "merged into its base, or written as peft or original_lora have adapters",
        own="--layout",
    ),
    option(
        "VISION_TOWER_NAME",
        "(see meaning)",
        TEXT,
        "with an original layout: its mm_vision_tower; else the name of the source or of the known CLIP",
        own="--vision-tower-name",
    ),
    option(
        "BASE_CKPT_PATH",
        "(where it was)",
        CHECKPOINT,
        "with mg2hf=true and a checkpoint of adapters: their base, where it was moved to",
        own="--base-checkpoint",
    ),
    option(
        "CKPT_FORMAT",
        "(torch_dist)",
        one_of(*FORMATS),
        "torch_dist: any TP and PP reads it; torch: one file per rank of this TP and PP; mg2hf=true reads both",
        own="--format",
    ),
    *COMMON_OPTIONS,
)
# Options of one direction, and what an export or a conversion does instead.
NOT_FOR_EXPORTS = {
    "PROJECTOR": "keeps the projector of the checkpoint",
    "PROJECTOR_PATH": "keeps the projector of the checkpoint",
    "VISION_FEATURE_LAYER": "keeps the checkpoint's",
    "MODEL_KIND": "keeps the checkpoint's",
    "ADD_TOKENS": "keeps the tokenizer of the checkpoint",
    "CKPT_FORMAT": "sees the checkpoint's format itself",
}
ONLY_FOR_EXPORTS = ("EXPORT_LAYOUT", "VISION_TOWER_NAME", "BASE_CKPT_PATH")
PATHS = (
    *("SOURCE_LLM_CKPT_PATH", "SOURCE_CLIP_CKPT_PATH", "TARGET_CKPT_PATH", "HF_CKPT_PATH", "PROJECTOR_PATH"),
    "BASE_CKPT_PATH",
)


def _is_llava(folder: str) -> bool:
    """Is it a whole LLaVA, in the layout of transformers or of the original code?"""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return str(json.load(file).get("model_type", "")).startswith("llava")
    except (OSError, ValueError, AttributeError):
        return False


def _check(call: Call) -> None:
    if call.rest:
        count = len(ARGUMENTS)
        call.complain(
            f"argument {count + 1} {quoted(call.rest[0])}",
            f"is one too many: there are {count} arguments; quote values that hold spaces",
        )
    if call.right("mg2hf"):
        (_check_export if call["mg2hf"] == "true" else _check_conversion)(call)


def _check_export(call: Call) -> None:
    source = call["SOURCE_LLM_CKPT_PATH"]
    if call.right("SOURCE_LLM_CKPT_PATH") and (problem := checkpoint_problem(source)):
        call.refuse("SOURCE_LLM_CKPT_PATH", f"must be a converted checkpoint with mg2hf=true ({problem})")
    elif call.right("SOURCE_LLM_CKPT_PATH"):
        has_adapters = os.path.isfile(os.path.join(source, llava_folder.NAME, llava_folder.LORA))
        if call["EXPORT_LAYOUT"] in ADAPTER_LAYOUTS and not has_adapters:
            call.refuse("EXPORT_LAYOUT", "is for a checkpoint of adapters (LORA_RANK), and this one has whole weights")
        if call["BASE_CKPT_PATH"] and not has_adapters:
            call.refuse("BASE_CKPT_PATH", "is for a checkpoint of adapters (LORA_RANK), and this one has whole weights")
    for name, instead in NOT_FOR_EXPORTS.items():
        if call[name]:
            call.refuse(name, f"is for mg2hf=false: an export {instead}")
    if call["VISION_TOWER_NAME"] and not call["EXPORT_LAYOUT"].startswith("original"):
        call.refuse("VISION_TOWER_NAME", "is for EXPORT_LAYOUT=original or original_without_tower")
    if not call["HF_CKPT_PATH"]:
        call.complain(
            f"argument {len(ARGUMENTS)} HF_CKPT_PATH", f"is missing: with mg2hf=true it must be {MODEL_FOLDER.text}"
        )


def _check_conversion(call: Call) -> None:
    source = call["SOURCE_LLM_CKPT_PATH"]
    for name in ONLY_FOR_EXPORTS:
        if call[name]:
            call.refuse(name, "is for mg2hf=true: a checkpoint has one layout only")
    if not call.right("SOURCE_LLM_CKPT_PATH"):
        return
    if problem := missing(source, "config.json"):
        call.refuse("SOURCE_LLM_CKPT_PATH", f"must be a Hugging Face model folder with mg2hf=false ({problem})")
    elif call.right("SOURCE_CLIP_CKPT_PATH") and call["SOURCE_CLIP_CKPT_PATH"] == "none" and not _is_llava(source):
        call.refuse(
            "SOURCE_CLIP_CKPT_PATH",
            "must be a Hugging Face CLIP or SigLIP folder: SOURCE_LLM_CKPT_PATH holds no vision tower (its model_type "
            "is not llava)",
        )


def _start(call: Call, _: None) -> Program:
    export = call["mg2hf"] == "true"
    unused = "SOURCE_CLIP_CKPT_PATH" if export else "HF_CKPT_PATH"
    if call[unused] not in ("", "none"):
        why = ": the checkpoint holds its vision tower" if export else ""
        call.notes.append(f"{unused} is not used with mg2hf={call['mg2hf']}{why}")
    words = []
    for row in (*ARGUMENTS, *OPTIONS):
        if row.name == unused:
            continue
        if row.name == "ADD_TOKENS":
            words += [row.own, *call[row.name].split()] if call[row.name] else []
        else:
            words += row.words(call.absolute(row.name) if row.name in PATHS else call[row.name])
    return Program([call.python(), "-u", ENTRY, *words], {"PYTHONPATH": python_path(call.environment)})


COMMAND = Command(
    "Converts Hugging Face models to a Megatron checkpoint, and back. The 9th argument is needed when mg2hf=true.",
    ARGUMENTS,
    OPTIONS,
    _check,
    _start,
    optional=1,
)
