"""Megatron's own parser and checks accept what the launchers write, and read from it what was meant."""

import itertools
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launchers.launching import ROOT, STAGE_1, STAGE_2, Inputs, start
from tests.warm import interpreter

PRECISIONS = ("fp16", "bf16", "fp8", "fp32")
ACTIVATIONS = ("sel", "full", "offload", "false", "true")
BOTH = ("true", "false")
OFFLOADS = ("false", "static", "auto")


def megatron_reads(commands: list[list[str]], world_size: int) -> list[dict]:
    """What Megatron's parser makes of each command, all in one process."""
    cases = []
    for words in commands:
        first = next(index for index, word in enumerate(words) if word.endswith("pretrain_llava.py"))
        cases.append({"world_size": world_size, "words": words[first + 1 :]})
    result = subprocess.run(
        [interpreter.python(), str(ROOT / "tests/launchers/megatron_parser.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=os.environ | interpreter.ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    return json.loads(result.stdout)


def commands_of(script, all_words: list[list[str]]) -> list[list[str]]:
    def command(words: list[str]) -> list[str]:
        result = start(script, words, DRY_RUN="1", ACCELERATOR="cuda", NPROC_PER_NODE="8")
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(command, all_words))


@pytest.mark.parametrize(
    "chosen", [pytest.param(slice(None), marks=pytest.mark.slow, id="all"), pytest.param(slice(2, None, 7), id="pairs")]
)
def test_every_precision_and_memory_saving_together(chosen: slice, inputs: Inputs):
    """All combinations, or so few of them that each value still meets each other one."""
    cases = [
        dict(PR=precision, AC=activations, DO=shared, FL=flash, OPTIMIZER_OFFLOAD=offload)
        for precision, activations, shared, flash, offload in itertools.product(
            PRECISIONS, ACTIVATIONS, BOTH, BOTH, OFFLOADS
        )
        if shared == "true" or offload == "false"  # the others are refused
    ]
    assert len(cases) == 160
    cases = cases[chosen]
    pairs = {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
    assert len(pairs) == 20 + 8 + 8 + 12 + 10 + 10 + 15 + 4 + 4 + 6
    found = megatron_reads(commands_of(STAGE_1, [inputs.training(**case) for case in cases]), 8)
    recompute = {"sel": ("selective", None, None), "true": ("selective", None, None), "full": ("full", "uniform", 1)}
    for case, args in zip(cases, found, strict=True):
        assert "error" not in args, (case, args)
        assert (args["fp16"], args["bf16"]) == (case["PR"] == "fp16", case["PR"] in ("bf16", "fp8"))
        # by default Megatron sums gradients in 32 bits for bf16 alone
        assert args["accumulate_allreduce_grads_in_fp32"] == (case["PR"] != "fp32")
        assert args["fp8"] == ("hybrid" if case["PR"] == "fp8" else None)
        granularity = (args["recompute_granularity"], args["recompute_method"], args["recompute_num_layers"])
        assert granularity == recompute.get(case["AC"], (None, None, None))
        assert args["fine_grained_activation_offloading"] == (case["AC"] == "offload")
        shared = (args["use_distributed_optimizer"], args["dist_ckpt_optim_fully_reshardable"])
        assert shared == ((True, True) if case["DO"] == "true" else (False, False))
        cudnn_only = case["FL"] == "false" and case["PR"] != "fp32"
        assert args["attention_backend"] == ("fused" if cudnn_only else "auto")
        assert args["optimizer_offload_policy"] == case["OPTIMIZER_OFFLOAD"]


def test_every_layout_and_number_arrives(inputs: Inputs):
    parallelisms = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2), (8, 1, 1), (4, 2, 1)]
    # Both stages, in one process of Megatron's.
    lists = [
        inputs.training(TP=str(tp), PP=str(pp), CP=str(cp), BATCH_SIZE="2", LR="2e-3", MIN_LR="0", AC="false")
        for tp, pp, cp in parallelisms
    ]
    found = megatron_reads(commands_of(STAGE_1, lists) + commands_of(STAGE_2, lists), 8)
    cases = [(True, *parallelism) for parallelism in parallelisms] + [
        (False, *parallelism) for parallelism in parallelisms
    ]
    for (frozen_llm, tp, pp, cp), args in zip(cases, found, strict=True):
        assert "error" not in args, args
        sizes = [args[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context", "data")]
        assert sizes == [tp, pp, cp, 8 // (tp * pp * cp)]
        assert args["sequence_parallel"] == (tp > 1)
        assert (args["micro_batch_size"], args["global_batch_size"], args["seq_length"]) == (2, 256, 1024)
        assert (args["lr"], args["min_lr"], args["lr_decay_style"]) == (2e-3, 0.0, "cosine")
        assert (args["lr_warmup_iters"], args["train_iters"], args["lr_decay_iters"]) == (200, 20000, 20000)
        assert (args["adam_beta1"], args["adam_beta2"], args["weight_decay"], args["clip_grad"]) == (
            0.9,
            0.95,
            0.0,
            1.0,
        )
        assert (args["attention_dropout"], args["hidden_dropout"]) == (0.0, 0.0)
        assert args["calculate_per_token_loss"] and not args["exit_signal_handler"]  # ours knows SIGUSR1 too
        assert (args["save"], args["load"]) == (f"{inputs.output}/checkpoint",) * 2
        assert (args["save_interval"], args["ckpt_format"]) == (100000, "torch_dist")
        assert (args["image_tokens"], args["model_size"]) == (576, "7B")
        frozen = (args["freeze_language_model"], args["freeze_vision_tower"], args["freeze_projector"])
        assert frozen == (frozen_llm, True, False)


def test_words_of_options_pass_the_parser(inputs: Inputs):
    """Precision, recompute, saving and pipelines beyond the 23 arguments: {what: (arguments, options, expected)}."""
    cases = {
        f"fp8 {form} {recipe}": (
            {"PR": "fp8"},
            {"FP8_FORMAT": form, "FP8_RECIPE": recipe, "FP8_MARGIN": "2", "FP8_AMAX_HISTORY": "16"},
            {"fp8": form, "fp8_recipe": recipe, "bf16": True}
            | ({"fp8_margin": 2, "fp8_amax_history_len": 16} if recipe == "delayed" else {}),
        )
        for form, recipe in itertools.product(("hybrid", "e4m3"), ("delayed", "tensorwise"))
    } | {
        "the first layers": (
            {"AC": "full"},
            {"RECOMPUTE_METHOD": "block", "RECOMPUTE_LAYERS": "5", "TOWER_AC": "false"},
            {"recompute_method": "block", "recompute_num_layers": 5, "vision_tower_recompute": "false"},
        ),
        "asynchronous": (
            {},
            {"ASYNC_SAVE": "true"},
            {"async_save": True, "async_strategy": "mcore", "use_persistent_ckpt_worker": True},
        ),
        "interleaved": ({"TP": "2", "PP": "4"}, {"VIRTUAL_STAGES": "2"}, {"virtual_pipeline_model_parallel_size": 2}),
        "uneven": ({"PP": "2"}, {"FIRST_STAGE_LAYERS": "12"}, {"decoder_first_pipeline_num_layers": 12}),
        "packed": ({}, {"PACKING": "true", "IMAGE_CONV_FRONT": "true"}, {"packing": True, "image_conv_front": True}),
        "of equal work": ({}, {"BALANCE_COST": "true"}, {"balance_cost": True, "packing": False}),
        "torch's profiler": (
            {},
            {"PROFILE": "10-12", "PROFILE_RANKS": "0,7", "SAMPLE_ANSWERS": "4"},
            {"trace_iterations": [10, 12], "trace_ranks": [0, 7], "profile": False, "sample_answers": 4},
        ),
        "Nsight, which Megatron starts before the iteration behind its first number": (
            {},
            {"PROFILE": "10-12", "PROFILE_RANKS": "0,7", "PROFILER": "nsys"},
            {"profile": True, "profile_step_start": 9, "profile_step_end": 12, "profile_ranks": [0, 7]}
            | {"nvtx_ranges": True, "use_pytorch_profiler": False, "trace_iterations": None},
        ),
        "W&B": (
            {},
            {"WANDB_MODE": "offline", "WANDB_NAME": "first try"},
            {"wandb_project": "llava", "wandb_exp_name": "first try"},
        ),
        "rates": ({}, {"PROJECTOR_LR": "1e-3", "VISION_TOWER_WEIGHT_DECAY": "0.1"}, {"projector_lr": 1e-3}),
    }
    machine = {"DRY_RUN": "1", "ACCELERATOR": "cuda", "NPROC_PER_NODE": "8"}
    commands = []
    for arguments, options, _ in cases.values():
        done = start(STAGE_1, inputs.training(**arguments), **machine, **options)
        assert done.returncode == 0, done.stderr
        commands.append(done.stdout.splitlines())
    for (name, (_, _, expected)), args in zip(cases.items(), megatron_reads(commands, 8), strict=True):
        assert "error" not in args, f"{name}: {args}"
        assert {key: args[key] for key in expected} == expected, name


def test_guards_and_deterministic_mode_arrive(inputs: Inputs):
    options = {"ON_BAD_LOSS": "rollback", "MAX_ROLLBACKS": "2", "SPIKE_FACTOR": "3", "TIME_LIMIT": "60"}
    options |= {"KEEP_LAST": "2", "KEEP_BEST": "true", "DETERMINISTIC": "true"}
    words = [*inputs.training(TP="1", AC="sel"), "--skip-train-iteration-range", "100-110", "300"]
    before = time.time()
    result = start(STAGE_1, words, DRY_RUN="1", ACCELERATOR="cuda", NPROC_PER_NODE="8", **options)
    lines = result.stdout.splitlines()
    assert {"NCCL_ALGO=Ring", "CUBLAS_WORKSPACE_CONFIG=:4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"} <= set(lines)
    assert lines[lines.index("--max-rollbacks") + 1] == "2"
    (args,) = megatron_reads([lines], 8)
    assert "error" not in args, args
    values = {"on_bad_loss": "rollback", "spike_factor": 3.0, "keep_last": 2, "keep_best": True}
    assert {name: args[name] for name in values} == values
    assert args["skip_train_iteration_range"] == ["range(100, 111)", "range(300, 301)"]
    assert 0 <= args["stop_at"] - before - 3600 + 1 < 60 and args["deterministic_mode"]
    assert args["bad_batches_file"].endswith("/bad_batches.jsonl")
