"""Every wrong argument is refused by position, name, value and rule, all at once, before anything is created."""

import argparse
import json
import re
import socket
import sys

import pytest

from megatron_patch.arguments import add_arguments
from megatron_patch.model_sizes import MODEL_SIZES
from tests.launchers.launching import CONVERTER, LLAVA_7B, NEXT, ROOT, STAGE_1, STAGE_2, Inputs, start, tree
from tests.launchers.readme_tables import rows_of_help

WRONG_TRAINING = {
    "ENV": "laptop",
    "MODEL_SIZE": "9B",
    "BATCH_SIZE": "0",
    "GLOBAL_BATCH_SIZE": "1e3",
    "LR": "0.0",
    "MIN_LR": "nan",
    "SEQ_LEN": "",
    "DECODER_SEQ_LEN": "01024",
    "PR": "bf61",
    "TP": "four",
    "PP": "-1",
    "CP": "1;touch x",
    "DO": "yes",
    "FL": "True",
    "AC": "sel full",
    "OPTIMIZER_OFFLOAD": "dynamic",
    "SAVE_INTERVAL": "$(touch x)",
    "DATASET_PATH": "no such folder",
    "VALID_DATASET_PATH": "*",
    "PRETRAIN_CHECKPOINT_PATH": "-none",
    "TRAIN_ITERS": "arg[TP]",
    "LR_WARMUP_ITERS": "-5",
    "OUTPUT_BASEPATH": "/",
}
WRONG_CONVERSION = {
    "MODEL_SIZE": "7b",
    "SOURCE_LLM_CKPT_PATH": "no such folder",
    "SOURCE_CLIP_CKPT_PATH": ";touch x",
    "TARGET_CKPT_PATH": "//",
    "TP": "1.5",
    "PP": "0",
    "mg2hf": "True",
    "PR": "fp8",
    "HF_CKPT_PATH": "$(touch x)",
}


SERVE = ROOT / "examples/llava_mcore/serve_llava.sh"
CUDA = {"ACCELERATOR": "cuda", "NPROC_PER_NODE": "4"}


def expected_lines(script, wrong: dict[str, str]) -> list[str]:
    """The beginning of each refusal: position, name, value and the rule as --help shows it."""
    rows = {row.name: row for row in rows_of_help(script).arguments}
    return [f"argument {rows[name].number} {name}='{value}' must be {rows[name].rule}" for name, value in wrong.items()]


def assert_refused(result, folder, before, *lines: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    for line in lines:
        assert line in result.stderr
    assert tree(folder) == before


@pytest.mark.parametrize(("name", "value"), WRONG_TRAINING.items())
def test_each_wrong_training_argument_is_refused_alone(inputs: Inputs, name: str, value: str):
    before = tree(inputs.folder)
    result = start(STAGE_1, inputs.training(**{name: value}), "sh", cwd=inputs.folder)
    assert_refused(result, inputs.folder, before, *expected_lines(STAGE_1, {name: value}))
    assert result.stderr.splitlines()[0] == "error: 1 wrong or missing; nothing was started or written"


@pytest.mark.parametrize("script", [STAGE_1, STAGE_2])
def test_all_wrong_training_arguments_are_named_at_once(inputs: Inputs, script):
    before = tree(inputs.folder)
    result = start(script, list(WRONG_TRAINING.values()), cwd=inputs.folder)
    assert_refused(result, inputs.folder, before, *expected_lines(script, WRONG_TRAINING))
    assert result.stderr.splitlines()[0].startswith("error: 23 wrong")
    assert len(WRONG_TRAINING) == len(rows_of_help(script).arguments) == 23


@pytest.mark.parametrize(("name", "value"), WRONG_CONVERSION.items())
def test_each_wrong_conversion_argument_is_refused_alone(inputs: Inputs, name: str, value: str):
    before = tree(inputs.folder)
    result = start(CONVERTER, inputs.conversion(**{name: value}), "sh", cwd=inputs.folder)
    assert_refused(result, inputs.folder, before, *expected_lines(CONVERTER, {name: value}))
    assert result.stderr.splitlines()[0].startswith("error: 1 wrong")


def test_all_wrong_conversion_arguments_are_named_at_once(inputs: Inputs):
    before = tree(inputs.folder)
    result = start(CONVERTER, list(WRONG_CONVERSION.values()), cwd=inputs.folder)
    assert_refused(result, inputs.folder, before, *expected_lines(CONVERTER, WRONG_CONVERSION))
    assert result.stderr.splitlines()[0].startswith("error: 9 wrong")


@pytest.mark.parametrize(
    ("changes", "environment", "line"),
    [
        ({"MIN_LR": "1.6e-4"}, {}, "argument 6 MIN_LR='1.6e-4' must be at most LR=0.00015"),
        ({"LR": "1e-5", "MIN_LR": "0.0000100001"}, {}, "argument 6 MIN_LR='0.0000100001' must be at most LR=1e-5"),
        ({"DECODER_SEQ_LEN": "576"}, {}, "argument 8 DECODER_SEQ_LEN='576' must be more than SEQ_LEN=576"),
        ({"DECODER_SEQ_LEN": "1022"}, {}, "argument 8 DECODER_SEQ_LEN='1022' must be divisible by 4"),
        ({"DECODER_SEQ_LEN": "1026", "TP": "1", "CP": "2"}, {}, "DECODER_SEQ_LEN='1026' must be divisible by 4"),
        ({"LR_WARMUP_ITERS": "20000"}, {}, "argument 22 LR_WARMUP_ITERS='20000' must be less than TRAIN_ITERS=20000"),
        ({"BATCH_SIZE": "3"}, {}, "argument 4 GLOBAL_BATCH_SIZE='256' must be divisible by 3: BATCH_SIZE=3 x data-p"),
        (
            {"BATCH_SIZE": "96"},
            {"NPROC_PER_NODE": "8"},
            "divisible by 192: BATCH_SIZE=96 x data-parallel size 2",
        ),
        ({}, {"NPROC_PER_NODE": "6"}, "argument 10 TP='4' x PP=1 x CP=1 = 4 must divide the 6 processes"),
        ({"PR": "fp8"}, {}, "argument 9 PR='fp8' needs a GPU, and this run is on CPU"),
        ({"AC": "offload"}, {}, "argument 15 AC='offload' needs a GPU"),
        ({"OPTIMIZER_OFFLOAD": "static"}, {}, "argument 16 OPTIMIZER_OFFLOAD='static' needs a GPU"),
        ({"OPTIMIZER_OFFLOAD": "auto", "DO": "false"}, CUDA, "argument 16 OPTIMIZER_OFFLOAD='auto' needs DO=true"),
        ({"PRETRAIN_CHECKPOINT_PATH": "none"}, {}, "argument 20 PRETRAIN_CHECKPOINT_PATH='none' needs TOKENIZER_PATH"),
        (
            {"OUTPUT_BASEPATH": ""},
            {},
            "argument 23 OUTPUT_BASEPATH='' must be a folder to write into, not / (it is e",
        ),
        ({"OUTPUT_BASEPATH": "/usr/.."}, {}, "argument 23 OUTPUT_BASEPATH='/usr/..' must be"),
        ({"OUTPUT_BASEPATH": "llm/config.json/x"}, {}, "config.json is a file)"),
        (
            {},
            {"ACCELERATOR": "tpu"},
            "environment ACCELERATOR='tpu' must be auto or an accelerator (known: auto cpu cuda)",
        ),
        ({}, {"NPROC_PER_NODE": "0"}, "environment NPROC_PER_NODE='0' must be a whole number from 1 to 4096"),
        ({}, {"FREEZE_PROJECTOR": "1"}, "environment FREEZE_PROJECTOR='1' must be one of true false"),
        (
            {},
            {"CONVERSATION_TEMPLATE": "v2"},
            "environment CONVERSATION_TEMPLATE='v2' must be auto, a built-in template, or a .json",
        ),
        (
            {},
            {"CONVERSATION_TEMPLATE": "none.json"},
            "or a .json or .yaml file (known: auto chatml chatml_direct japanese_v1 ",
        ),
        ({}, {"IMAGE_TILES": "2"}, "environment IMAGE_TILES='2' must be COLUMNSxROWS, as 2x2"),
        ({}, {"IMAGE_TILES": "1x2"}, "DECODER_SEQ_LEN='1024' must be more than 1728, SEQ_LEN=576 for each of 2 tiles"),
        ({}, {"PACKING": "true", "DATA_ORDER": "modality"}, "DATA_ORDER='modality' is not for PACKING=true"),
        ({}, {"PACKING": "true", "DATA_ORDER": "modality_window"}, "DATA_ORDER='modality_window' is not for PACKING"),
        ({}, {"PACKING": "true", "BALANCE_COST": "true"}, "BALANCE_COST='true' is not for PACKING=true"),
        (
            {},
            {"PRESET": "llava"},
            "environment PRESET='llava' must be one of llava-1.5 llava-next llava-onevision pai neva ",
        ),
        ({"LR": "-"}, {"PRESET": ""}, "argument 5 LR='-' must be a number above 0"),
        ({"TP": "-"}, {"PRESET": "llava-1.5"}, "argument 10 TP='-' must be a whole number"),
        ({}, {"FSDP": "zero3"}, "environment FSDP='zero3' must be one of false full hybrid grad"),
        ({}, {"FSDP": "full"}, "argument 13 DO='true' must be false with FSDP=full: the weights' pieces have"),
        ({"DO": "false", "PP": "2"}, {"FSDP": "full"}, "argument 11 PP='2' must be 1 with FSDP=full"),
        ({"DO": "false", "PR": "fp16"}, {"FSDP": "grad"}, "argument 9 PR='fp16' must be bf16 or fp32 with FSDP=grad"),
        ({"DO": "false"}, {"FSDP": "full", "EMA_DECAY": "0.9"}, "EMA_DECAY='0.9' must be 0 with FSDP=full"),
        ({"DO": "false"}, {"FSDP": "full", "SAMPLE_ANSWERS": "4"}, "SAMPLE_ANSWERS='4' must be 0 with FSDP=full"),
        ({"DO": "false"}, {"FSDP": "full", "ASYNC_SAVE": "true"}, "ASYNC_SAVE='true' must be false with FSDP=full"),
        ({}, {"VIRTUAL_STAGES": "2"}, "environment VIRTUAL_STAGES='2' needs PP above 1"),
        ({}, {"FIRST_STAGE_LAYERS": "2"}, "environment FIRST_STAGE_LAYERS='2' needs PP above 1"),
        (
            {"PP": "2", "GLOBAL_BATCH_SIZE": "255"},
            {"VIRTUAL_STAGES": "2"},
            "GLOBAL_BATCH_SIZE='255' must be divisible by 2: with VIRTUAL_STAGES",
        ),
        ({}, {"DATA_ORDER": "random"}, "environment DATA_ORDER='random' must be one of cyclic single modality"),
        ({}, {"IMAGE_ASPECT_RATIO": "any"}, "environment IMAGE_ASPECT_RATIO='any' must be one of auto crop pad"),
        ({}, {"MASTER_PORT": "65536"}, "environment MASTER_PORT='65536' must be a whole number from 1 to 65535"),
        ({}, {"ADAM_BETA2": "1.0"}, "environment ADAM_BETA2='1.0' must be a number from 0 to below 1"),
        ({}, {"WEIGHT_DECAY": "-0.1"}, "environment WEIGHT_DECAY='-0.1' must be a number from 0"),
        ({}, {"EVAL_BENCHMARK": "vqa"}, "environment EVAL_BENCHMARK='vqa' must be a benchmark of evaluate_llava.sh"),
        ({}, {"EVAL_BENCHMARK": "pope"}, "environment EVAL_BENCHMARK='pope' needs EVAL_BENCHMARK_DATA"),
        (
            {},
            {"EVAL_BENCHMARK": "pope", "EVAL_BENCHMARK_DATA": ".", "EVAL_ITERS": "0"},
            "environment EVAL_BENCHMARK='pope' needs EVAL_ITERS above 0",
        ),
        ({}, {"EVAL_BENCHMARK_DATA": "."}, "environment EVAL_BENCHMARK_DATA='.' needs EVAL_BENCHMARK"),
        ({}, {"EVAL_BENCHMARK_DATA": "absent"}, "EVAL_BENCHMARK_DATA='absent' must be a file or folder"),
        ({}, {"EVAL_BENCHMARK_IMAGES": "absent"}, "EVAL_BENCHMARK_IMAGES='absent' must be a folder"),
        ({}, {"EVAL_BENCHMARK_QUESTIONS": "0"}, "EVAL_BENCHMARK_QUESTIONS='0' must be a whole number from 1"),
        ({}, {"BEST_BY": "score"}, "environment BEST_BY='score' needs EVAL_BENCHMARK"),
        ({}, {"SAMPLE_ANSWERS": "4", "EVAL_ITERS": "0"}, "environment SAMPLE_ANSWERS='4' needs EVAL_ITERS above 0"),
        ({}, {"PROFILE": "12-10"}, "environment PROFILE='12-10' must be iterations, as 10-12"),
        ({}, {"PROFILE": "10-20001"}, "environment PROFILE='10-20001' must end by TRAIN_ITERS=20000"),
        ({}, {"PROFILE": "10-12", "PROFILER": "nsys"}, "environment PROFILER='nsys' needs a GPU"),
        ({}, {"PROFILE_RANKS": "0,,1"}, "environment PROFILE_RANKS='0,,1' must be ranks, as 0,1"),
        ({}, {"PROFILE_RANKS": "0,4"}, "environment PROFILE_RANKS='0,4' must be less than 4, the number of processes"),
        ({}, {"WANDB_PROJECT": "x"}, "environment WANDB_PROJECT or WANDB_NAME needs WANDB_API_KEY in the environment"),
        ({}, {"EVAL_ITERS": "ten"}, "environment EVAL_ITERS='ten' must be a whole number from 0 to 999999999"),
        ({}, {"ON_BAD_LOSS": "ignore"}, "environment ON_BAD_LOSS='ignore' must be one of stop skip rollback"),
        ({}, {"SPIKE_FACTOR": "0.5"}, "environment SPIKE_FACTOR='0.5' must be 0 or above 1"),
        ({}, {"MAX_ROLLBACKS": "100"}, "environment MAX_ROLLBACKS='100' must be a whole number from 0 to 99"),
        ({}, {"TIME_LIMIT": "0"}, "environment TIME_LIMIT='0' must be a whole number from 1 to 999999999"),
        ({}, {"KEEP_LAST": "-1"}, "environment KEEP_LAST='-1' must be a whole number from 0"),
        ({}, {"KEEP_BEST": "true", "EVAL_ITERS": "0"}, "environment KEEP_BEST='true' needs EVAL_ITERS above 0"),
        ({}, {"DETERMINISTIC": "yes"}, "environment DETERMINISTIC='yes' must be one of true false"),
        (
            {"TP": "16"},
            {},
            "TP='16' cannot cut this model: num_key_value_heads of the LLM is 8; pass a TP that divides",
        ),
        ({"PP": "3"}, {}, "argument 11 PP='3' does not divide the 32 layers of the LLM; pass a PP that divides them"),
        ({"PP": "2"}, {"VIRTUAL_STAGES": "3"}, "PP='2' x VIRTUAL_STAGES 3 does not divide the 32 layers of the LLM"),
        ({"PP": "4"}, {"FIRST_STAGE_LAYERS": "4"}, "FIRST_STAGE_LAYERS='4' leaves 28 of 32 layers for the other 3"),
        ({"DECODER_SEQ_LEN": "65536"}, {}, "DECODER_SEQ_LEN='65536' must be at most 32768: so many positions"),
        ({"SEQ_LEN": "256"}, {}, "argument 7 SEQ_LEN='256' must be 576: so many tokens the checkpoint's vision tower"),
        ({"MODEL_SIZE": "13B"}, {}, "argument 2 MODEL_SIZE='13B' must be that of the checkpoint: "),
        ({}, {"GLOO_SOCKET_IFNAME": "none0"}, "environment GLOO_SOCKET_IFNAME=none0 must be a network interface (kno"),
        ({}, {"NCCL_SOCKET_IFNAME": "lo,none"}, "environment NCCL_SOCKET_IFNAME=lo,none must be a network interface"),
        ({}, {"WORLD_SIZE": "8"}, "environment WORLD_SIZE=8 is of a job of several nodes, and ENV=dsw starts 4 pro"),
        ({}, {"NODE_RANK": "1"}, "environment NODE_RANK=1 is of a job of several nodes"),
        ({}, {"SLURM_NNODES": "2"}, "environment SLURM_NNODES=2 is of a job of several nodes"),
        ({"TRAIN_ITERS": "1"}, {}, "LR_WARMUP_ITERS='200' must be less than TRAIN_ITERS=1"),
        ({"LR": "9" * 400}, {}, "must be a number above 0"),
        ({"MIN_LR": "1e-400"}, {}, "argument 6 MIN_LR='1e-400' must be a number from 0"),
        ({}, {"ADAM_BETA2": "0.99999999999999999999"}, "ADAM_BETA2='0.99999999999999999999' must be a number from 0"),
        ({"DATASET_PATH": "wds/.nv-meta"}, {}, "argument 18 DATASET_PATH='wds/.nv-meta' must be an energon dataset"),
        ({}, {"FEATURE_CACHE": "wds"}, "environment FEATURE_CACHE='wds' must be a folder of cache_tower_features.py"),
        ({}, {"LORA_RANK": "-1"}, "environment LORA_RANK='-1' must be a whole number from 0"),
        ({}, {"LORA_ALPHA": "16"}, "environment LORA_ALPHA='16' needs LORA_RANK above 0"),
        ({}, {"LORA_RSLORA": "true"}, "environment LORA_RSLORA='true' needs LORA_RANK above 0"),
        (
            {},
            {"LORA_RANK": "8", "LORA_DROPOUT": "1"},
            "environment LORA_DROPOUT='1' must be a number from 0 to below 1",
        ),
        ({}, {"LORA_RANK": "8", "LORA_TARGETS": "q,"}, "environment LORA_TARGETS='q,' must be names, as q_proj,v_proj"),
        (
            {},
            {"LORA_RANK": "8", "LORA_TARGETS": "q_proj,fc1"},
            "LORA_TARGETS='q_proj,fc1' must be of down_proj gate_proj k_proj o_proj q_proj up_proj v_proj in language_",
        ),
        (
            {},
            {"LORA_RANK": "8", "LORA_PARTS": "llm"},
            "environment LORA_PARTS='llm' must be of language_model vision_tower projector, with commas between",
        ),
        ({}, {"LORA_RANK": "8", "LORA_ADAPTER": "wds"}, "LORA_ADAPTER='wds' must be a folder that peft has saved (it "),
        (
            {"PRETRAIN_CHECKPOINT_PATH": "none"},
            {"LORA_RANK": "8", "TOKENIZER_PATH": "checkpoint/llava"},
            "environment LORA_RANK='8' needs a checkpoint as PRETRAIN_CHECKPOINT_PATH",
        ),
        ({}, {"PYTHON": "no-such-python"}, "environment PYTHON='no-such-python' must be a program"),
        ({}, {"DRY_RUN": "yes"}, "environment DRY_RUN='yes' must be one of 0 1"),
    ],
)
def test_rules_between_training_arguments(inputs: Inputs, changes: dict, environment: dict, line: str):
    before = tree(inputs.folder)
    result = start(STAGE_1, inputs.training(**changes), cwd=inputs.folder, **environment)
    assert_refused(result, inputs.folder, before, line)
    assert result.stderr.splitlines()[0].startswith("error: 1 wrong")


@pytest.mark.parametrize(
    ("kind", "environment", "line"),
    [
        ({}, {"IMAGE_ASPECT_RATIO": "anyres"}, "environment IMAGE_ASPECT_RATIO='anyres' must be crop, pad or stretch"),
        (NEXT, {"IMAGE_TILES": "2x2"}, "environment IMAGE_TILES='2x2' must be 1x1 with IMAGE_ASPECT_RATIO=anyres"),
        (NEXT, {"FEATURE_CACHE": "cache"}, "environment FEATURE_CACHE='cache' is not for IMAGE_ASPECT_RATIO=anyres"),
    ],
)
def test_images_of_any_resolution_are_for_models_that_have_a_rule(
    inputs: Inputs, kind: dict, environment: dict, line: str
):
    (inputs.checkpoint / "llava/config.json").write_text(json.dumps(LLAVA_7B | kind))
    (inputs.folder / "cache").mkdir()
    (inputs.folder / "cache/features.json").write_text("{}")
    before = tree(inputs.folder)
    result = start(STAGE_1, inputs.training(DECODER_SEQ_LEN="4096"), cwd=inputs.folder, **environment)
    assert_refused(result, inputs.folder, before, line)
    assert result.stderr.splitlines()[0].startswith("error: 1 wrong")
    for changes in ({"IMAGE_ASPECT_RATIO": "crop"}, {}) if kind else ({},):
        assert start(STAGE_1, inputs.training(DECODER_SEQ_LEN="4096"), DRY_RUN="1", **changes).returncode == 0


def test_checkpoint_that_is_not_finished_is_refused_by_what_is_missing(inputs: Inputs):
    tracker = inputs.checkpoint / "latest_checkpointed_iteration.txt"
    for text, missing in (
        ("10", "it has no iter_0000010"),
        ("soon", "names no iteration"),
        (None, f"no {tracker.name}"),
    ):
        tracker.unlink() if text is None else tracker.write_text(text)
        result = start(STAGE_1, inputs.training())
        assert result.returncode == 2 and missing in result.stderr
    (inputs.checkpoint / "iter_0000010").mkdir()
    tracker.write_text("10\n")
    assert start(STAGE_1, inputs.training(), DRY_RUN="1").returncode == 0
    (inputs.checkpoint / "llava/config.json").unlink()
    said = start(STAGE_1, inputs.training(), DRY_RUN="1").stderr
    assert "(it has no llava/config.json: another program has written it; convert the Hugging Face model that" in said


@pytest.mark.parametrize("part", ["context", "model_config.yaml"])
def test_nemos_checkpoint_is_refused_with_the_way_to_go(inputs: Inputs, part: str):
    (inputs.folder / "nemo" / part).mkdir(parents=True)
    before = tree(inputs.folder)
    for name in (inputs.folder / "nemo", inputs.folder / "llava.nemo"):
        result = start(STAGE_1, inputs.training(PRETRAIN_CHECKPOINT_PATH=str(name)))
        line = (
            "(it is NeMo's; convert the Hugging Face model that it was made of, or exported to, with hf2mcore_convertor"
        )
        assert_refused(result, inputs.folder, before, line)


def test_arguments_that_repeat_the_checkpoint_must_agree(inputs: Inputs):
    llava = inputs.checkpoint / "llava"
    (llava / "provenance.json").write_text('{"arguments": {\n  "model_size": "13B", "precision": "bf16"}}')
    config = LLAVA_7B | {"vision_config": LLAVA_7B["vision_config"] | {"image_size": 224}}
    (llava / "config.json").write_text(json.dumps(config))
    result = start(STAGE_1, inputs.training(), DRY_RUN="1")
    assert result.returncode == 2 and "argument 2 MODEL_SIZE='7B' must be 13B" in result.stderr
    assert "argument 7 SEQ_LEN='576' must be 256: " in result.stderr
    config["text_config"] = LLAVA_7B["text_config"] | {"num_hidden_layers": 52}
    (llava / "config.json").write_text(json.dumps(config))
    assert start(STAGE_1, inputs.training(MODEL_SIZE="13B", SEQ_LEN="256"), DRY_RUN="1").returncode == 0


def test_missing_arguments_are_listed_by_name(inputs: Inputs):
    before = tree(inputs.folder)
    result = start(STAGE_1, inputs.training(TP="x")[:-2], cwd=inputs.folder)
    rule = "must be a folder to write into, not /"
    assert_refused(
        result, inputs.folder, before, f"argument 23 OUTPUT_BASEPATH is missing: {rule}", "argument 10 TP='x'"
    )
    assert "argument 22 LR_WARMUP_ITERS is missing" in result.stderr
    assert result.stderr.splitlines()[0].startswith("error: 3 wrong or missing")


def test_words_after_the_last_argument(inputs: Inputs):
    words = [*inputs.training(), "--log-throughput", "$(touch x)", "a  b"]
    result = start(STAGE_1, words, cwd=inputs.folder, DRY_RUN="1")
    assert result.stdout.splitlines()[-3:] == words[-3:]
    for extra in ("log-throughput", "-x", "--", ""):
        result = start(STAGE_1, [*inputs.training(), extra], cwd=inputs.folder, DRY_RUN="1")
        assert_refused(result, inputs.folder, tree(inputs.folder), f"argument 24 '{extra}' must begin with --")
    words = [*inputs.conversion(HF_CKPT_PATH=str(inputs.llm)), "x"]
    assert_refused(start(CONVERTER, words), inputs.folder, tree(inputs.folder), "argument 10 'x' is one too many")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"mg2hf": "true", "SOURCE_LLM_CKPT_PATH": "checkpoint"},
            "argument 9 HF_CKPT_PATH is missing: with mg2hf=true",
        ),
        (
            {"mg2hf": "true", "HF_CKPT_PATH": "llm"},
            "must be a converted checkpoint with mg2hf=true (it has no l",
        ),
        ({"SOURCE_LLM_CKPT_PATH": "checkpoint"}, "must be a Hugging Face model folder with mg2hf=false"),
        (
            {"SOURCE_CLIP_CKPT_PATH": "none"},
            "argument 3 SOURCE_CLIP_CKPT_PATH='none' must be a Hugging Face CLIP or SigLIP",
        ),
        (
            {"TARGET_CKPT_PATH": "llm"},
            "argument 4 TARGET_CKPT_PATH='llm' must be a new or empty folder, not / (it",
        ),
    ],
)
def test_rules_between_conversion_arguments(inputs: Inputs, changes: dict, line: str):
    before = tree(inputs.folder)
    result = start(CONVERTER, inputs.conversion(**changes), cwd=inputs.folder)
    assert_refused(result, inputs.folder, before, line)
    assert result.stderr.splitlines()[0].startswith("error: 1 wrong")


@pytest.mark.parametrize(
    ("mg2hf", "environment", "line"),
    [
        (
            "true",
            {"PROJECTOR_PATH": "llm/config.json"},
            "environment PROJECTOR_PATH='llm/config.json' is for mg2hf=false",
        ),
        ("true", {"ADD_TOKENS": "<a>"}, "environment ADD_TOKENS='<a>' is for mg2hf=false"),
        ("true", {"VISION_TOWER_NAME": "x"}, "environment VISION_TOWER_NAME='x' is for EXPORT_LAYOUT=original"),
        ("true", {"EXPORT_LAYOUT": "originl"}, "environment EXPORT_LAYOUT='originl' must be one of hub original orig"),
        ("false", {"EXPORT_LAYOUT": "original"}, "environment EXPORT_LAYOUT='original' is for mg2hf=true"),
        (
            "false",
            {"PROJECTOR_PATH": "absent"},
            "environment PROJECTOR_PATH='absent' must be a file (it does not exist)",
        ),
        ("false", {"PROJECTOR_PATH": "llm"}, "environment PROJECTOR_PATH='llm' must be a file (it is a folder)"),
        ("false", {"ADD_TOKENS": " "}, "environment ADD_TOKENS=' ' must be text"),
    ],
)
def test_options_of_the_conversion(inputs: Inputs, mg2hf: str, environment: dict, line: str):
    changes = {"mg2hf": mg2hf}
    if mg2hf == "true":
        changes |= {"SOURCE_LLM_CKPT_PATH": "checkpoint", "HF_CKPT_PATH": "llm"}
    before = tree(inputs.folder)
    result = start(CONVERTER, inputs.conversion(**changes), cwd=inputs.folder, **environment)
    assert_refused(result, inputs.folder, before, line)


CLUSTER = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "23456",
    "KUBERNETES_CONTAINER_RESOURCE_GPU": "8",
}


def test_cluster_variables_are_required_by_name(inputs: Inputs):
    result = start(STAGE_1, inputs.training(ENV="dlc"))
    assert result.returncode == 2
    for name in CLUSTER:
        assert f"environment {name} is missing: must be" in result.stderr
    wrong = {"RANK": "2", "MASTER_ADDR": "a b", "KUBERNETES_CONTAINER_RESOURCE_GPU": "all", "WORLD_SIZE": "0"}
    for name, value in wrong.items():
        result = start(STAGE_1, inputs.training(ENV="dlc"), **CLUSTER | {name: value})
        assert result.returncode == 2 and f"environment {name}='{value}' must be" in result.stderr


@pytest.mark.parametrize(
    ("mode", "changes", "line"),
    [
        (
            "multinode",
            {"MAX_RESTARTS": "2"},
            "MAX_RESTARTS='2' is not for ENV=multinode: what started the nodes starts",
        ),
        (
            "dlc",
            {"MAX_RESTARTS": "2"},
            "MAX_RESTARTS='2' is not for ENV=dlc: what started the nodes starts them again (",
        ),
        ("multinode", {"NODE_RANK": "2"}, "NODE_RANK='2' must be less than 2: 16 processes are 2 times 8"),
        ("multinode", {"WORLD_SIZE": "12"}, "WORLD_SIZE='12' must be a multiple of the 8 processes of this machine"),
        ("multinode", {"WORLD_SIZE": "4"}, "WORLD_SIZE='4' must be a multiple of the 8 processes of this machine"),
        ("multinode", {"MASTER_ADDR": ""}, "environment MASTER_ADDR is missing: must be a host name"),
        ("multinode", {"NODE_RANK": "-1"}, "NODE_RANK='-1' must be a whole number from 0"),
        ("slurm", {"SLURM_NODEID": "2"}, "SLURM_NODEID='2' must be less than SLURM_NNODES=2 (nodes, counted from 0)"),
        ("slurm", {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' must be a whole number from 0"),
        ("slurm", {"SLURM_JOB_NODELIST": ""}, "environment SLURM_JOB_NODELIST is missing: must be text"),
        ("dlc", {"RANK": "2"}, "environment RANK='2' must be less than WORLD_SIZE=2 (nodes, counted from 0)"),
        ("dlc", {"MASTER_PORT": "0"}, "environment MASTER_PORT='0' must be a whole number from 1 to 65535"),
    ],
)
def test_what_a_cluster_says_must_fit_together(inputs: Inputs, mode: str, changes: dict, line: str):
    told = {
        "dlc": CLUSTER,
        "multinode": {"WORLD_SIZE": "16", "NODE_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "23456"}
        | {"NPROC_PER_NODE": "8"},
        "slurm": {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
        | {"SLURM_GPUS_ON_NODE": "8"},
    }[mode]
    words = inputs.training(ENV=mode, AC="sel")
    assert start(STAGE_1, words, DRY_RUN="1", **told).returncode == 0
    before = tree(inputs.folder)
    assert_refused(start(STAGE_1, words, **told | changes), inputs.folder, before, line)


def test_the_interval_of_fp8_scales_is_refused_by_name(inputs: Inputs):
    """Megatron's parser takes it, and nothing looks at it."""
    before = tree(inputs.folder)
    for words, told in ((["--fp8-interval", "4"], {}), (["--fp8-interval=4"], {}), ([], {"FP8_INTERVAL": "4"})):
        result = start(STAGE_1, [*inputs.training(AC="sel"), *words], **told)
        line = "must be left out: Transformer Engine has ignored it since 1.8"
        assert_refused(result, inputs.folder, before, line)
        assert ("environment FP8_INTERVAL " if told else "argument 24 '--fp8-interval") in result.stderr


@pytest.mark.parametrize("name", ["SAVE_OPTIM", "LOAD_OPTIM"])
def test_a_run_that_starts_again_by_itself_keeps_its_optimizer(inputs: Inputs, name: str):
    for again in ({"MAX_RESTARTS": "1"}, {"ON_BAD_LOSS": "rollback"}):
        result = start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1", **{name: "false"}, **again)
        assert result.returncode == 2 and f"{name}='false' must be true with {next(iter(again))}=" in result.stderr
    made = start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1", **{name: "false"}, ON_BAD_LOSS="skip")
    assert f"--no-{name.lower().replace('_', '-')}" in made.stdout.splitlines()


def test_a_port_in_use_is_refused(inputs: Inputs):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        result = start(STAGE_1, inputs.training(AC="sel"), MASTER_PORT=port)
    assert_refused(result, inputs.folder, tree(inputs.folder), f"MASTER_PORT='{port}' is in use on this machine")
    assert start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1", MASTER_PORT=port).returncode == 0


def test_folders_must_have_the_splits_that_are_read(inputs: Inputs):
    """As energon writes split.yaml, in both forms of a list."""
    split = inputs.dataset / ".nv-meta/split.yaml"
    for text, missing in (
        ("exclude: []\nsplit_parts:\n  test: []\n  train:\n  - a.tar\n  val: [b.tar]\n", None),
        ("exclude: []\nsplit_parts:\n  test: []\n  train:\n  - a.tar\n  val: []\n", "VALID_DATASET_PATH"),
        ("split_parts:\n  val:\n  - a.tar\nexclude: []\n", "DATASET_PATH"),
        ("something: else\n", None),
    ):
        split.write_text(text)
        result = start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1")
        assert (result.returncode == 0) == (missing is None), result.stderr
        if missing:
            name = "train" if missing == "DATASET_PATH" else "val"
            assert f" {missing}='{inputs.dataset}' must have the split {name} (its .nv-meta/split.yaml" in result.stderr
            without = start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1", EVAL_ITERS="0")
            assert (without.returncode == 0) == (name == "val")


def test_a_checkpoint_that_was_not_copied_whole_is_refused(inputs: Inputs):
    release = inputs.checkpoint / "release"
    (release / ".metadata").write_bytes(b"\x80\x04...__0_0.distcp\x94...__0_1.distcp\x94...")
    (release / "__0_0.distcp").touch()
    result = start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1")
    assert result.returncode == 2 and "its release lacks __0_1.distcp: copy it again" in result.stderr
    (release / "__0_1.distcp").touch()
    assert start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1").returncode == 0


def test_stage_2_wants_a_projector_that_stage_1_has_trained(inputs: Inputs):
    (inputs.checkpoint / "llava/provenance.json").write_text('{"projector": {"origin": "new"}}')
    result = start(STAGE_2, inputs.training(AC="sel"), DRY_RUN="1")
    assert result.returncode == 2 and "has a new projector, which no stage 1 has trained" in result.stderr
    assert start(STAGE_1, inputs.training(AC="sel"), DRY_RUN="1").returncode == 0
    words = [*inputs.training(AC="sel"), "--allow-fresh-projector"]
    assert start(STAGE_2, words, DRY_RUN="1").returncode == 0


def test_a_login_of_wandb_counts_where_a_name_is_given(inputs: Inputs):
    netrc = inputs.folder / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    asked = {"DRY_RUN": "1", "NETRC": str(netrc)}
    made = start(STAGE_1, inputs.training(AC="sel"), WANDB_PROJECT="p", **asked)
    assert made.returncode == 0 and "--wandb-project\np\n" in made.stdout and "secret" not in made.stdout
    assert "--wandb-project" not in start(STAGE_1, inputs.training(AC="sel"), **asked).stdout
    netrc.write_text("machine example.org login user password secret\n")
    assert start(STAGE_1, inputs.training(AC="sel"), WANDB_PROJECT="p", **asked).returncode == 2


@pytest.mark.parametrize(
    ("script", "words"),
    [(STAGE_1, ["--config", "none.json"]), (STAGE_1, ["dsw"]), (CONVERTER, ["7B"]), (SERVE, ["none"])],
)
def test_a_wrong_call_is_refused_before_anything_slow_is_imported(script, words: list[str], tmp_path):
    """The standard library takes 0.1 s, what others wrote takes seconds (torch alone 2), another process likewise."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -X importtime "$@"\n')
    python.chmod(0o755)
    done = start(script, words, PYTHON=str(python))
    assert done.returncode == 2
    imported = set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", done.stderr, re.M))
    assert "megatron_patch.launch" in imported
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names | {"megatron_patch"}
    assert not imported & {"subprocess", "multiprocessing", "asyncio"}


def test_model_sizes_are_those_of_the_converter():
    for script in (STAGE_1, STAGE_2, CONVERTER):
        rule = next(row.rule for row in rows_of_help(script).arguments if row.name == "MODEL_SIZE")
        assert rule.removeprefix("one of ").split() == list(MODEL_SIZES)


def test_a_preset_fills_in_what_is_left_open_and_loses_against_what_is_said(inputs: Inputs):
    changes = {"GLOBAL_BATCH_SIZE": "-", "LR": "-", "MIN_LR": "-", "TRAIN_ITERS": "1000", "LR_WARMUP_ITERS": "-"}
    options = {"PRESET": "llava-1.5", "DATA_ORDER": "cyclic", "DRY_RUN": "1"}
    words = start(STAGE_2, inputs.training(**changes), **options).stdout.split("\n")
    for name, value in {
        "--global-batch-size": "128",
        "--lr": "2e-5",
        "--min-lr": "0",
        "--train-iters": "1000",
        "--lr-warmup-iters": "156",
        "--adam-beta2": "0.999",
        "--image-aspect-ratio": "pad",
        "--data-order": "cyclic",
    }.items():
        assert words[words.index(name) + 1] == value


def test_defaults_are_those_of_the_parser() -> None:
    """Options that a launcher hands on to our own flags.  Stage 2: stage 1 has a template of its own."""
    parser = add_arguments(argparse.ArgumentParser())
    required = ["--init-from", "a", "--train-dataset-path", "b", "--valid-dataset-path", "c"]
    flags = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}
    compared = {}
    for option in rows_of_help(STAGE_2).options:
        flag = {"MAX_SKIPPED": "--max-skipped-share"}.get(option.name, "--" + option.name.lower().replace("_", "-"))
        if flag in flags and option.default and not option.default.startswith("("):
            compared[option.name] = [*required, flag, option.default]
    assert {"MEGA_BATCH_MULT", "MAX_SKIPPED", "DATA_ORDER", "IMAGE_TILES", "EMA_DECAY", "KEEP_LAST"} <= compared.keys()
    for name, words in compared.items():
        assert parser.parse_args(words) == parser.parse_args(required), name
