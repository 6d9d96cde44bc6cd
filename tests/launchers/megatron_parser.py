"""Feeds launcher words to Megatron's own parser and checks, as rank 0 of WORLD_SIZE GPUs that are not there.

Reads JSON from stdin: a list of {"world_size": int, "words": [str, ...]}.  Writes JSON to stdout: for each case the
parsed values that the tests look at, or {"error": text}.  A program of its own, because Megatron's checks read
environment variables and torch.cuda, which other tests must find untouched.
"""

import ast
import functools
import inspect
import json
import os
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import torch

from megatron_patch.arguments import add_arguments

# What pretrain_llava.py adds by itself: geometry of Mistral-7B, and no fusion that Transformer Engine would have to do.
GEOMETRY = [
    *("--num-layers", "32", "--hidden-size", "4096", "--ffn-hidden-size", "14336", "--num-attention-heads", "32"),
    *("--group-query-attention", "--num-query-groups", "8", "--max-position-embeddings", "32768"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--tokenizer-type", "NullTokenizer", "--vocab-size", "32001"),
    "--no-rope-fusion",
]
CHECKED = (
    *("world_size", "data_parallel_size", "micro_batch_size", "global_batch_size", "lr", "min_lr", "lr_decay_style"),
    *("lr_warmup_iters", "train_iters", "lr_decay_iters", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad"),
    *("seq_length", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("sequence_parallel", "calculate_per_token_loss", "save", "load", "save_interval", "ckpt_format", "bf16", "fp16"),
    *("fp8", "fp8_recipe", "recompute_granularity", "recompute_method", "recompute_num_layers"),
    *("fine_grained_activation_offloading", "offload_modules", "use_distributed_optimizer", "tensorboard_dir"),
    *("distrib_optim_fully_reshardable_mem_efficient", "ckpt_fully_parallel_load", "no_save_optim"),
    *("dist_ckpt_optim_fully_reshardable", "attention_dropout", "hidden_dropout", "num_workers", "seed"),
    *(
        "log_interval",
        "eval_interval",
        "eval_iters",
        "exit_signal_handler",
        "override_opt_param_scheduler",
        "distributed_timeout_minutes",
    ),
    *("train_dataset_path", "valid_dataset_path", "init_from", "model_size", "image_tokens", "image_aspect_ratio"),
    *("conversation_template", "optimizer_offload_policy", "tokenizer_path"),
    *("freeze_language_model", "freeze_vision_tower", "freeze_projector"),
    *("fp8_margin", "fp8_amax_history_len", "vision_tower_recompute", "async_save", "async_strategy", "packing"),
    "balance_cost",
    *("use_persistent_ckpt_worker", "virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers"),
    *("profile", "profile_step_start", "profile_step_end", "profile_ranks", "use_pytorch_profiler", "nvtx_ranges"),
    *("trace_iterations", "trace_ranks", "sample_answers", "wandb_project", "wandb_exp_name"),
    *("image_conv_front", "projector_lr", "padding_free"),
    *("on_bad_loss", "spike_factor", "keep_last", "keep_best", "stop_at", "deterministic_mode", "bad_batches_file"),
    *("skip_train_iteration_range", "accumulate_allreduce_grads_in_fp32"),
)


def check(world_size: int, words: list[str]) -> dict[str, object]:
    """Parsed and validated values of one command line; {"error": text} when Megatron refuses it."""
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    os.environ.update(WORLD_SIZE=str(world_size), RANK="0", LOCAL_RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    sys.argv = ["pretrain_llava.py", *words, *GEOMETRY]
    try:
        with redirect_stdout(sys.stderr):
            args = parse_args(add_arguments)
            validate_args(args)
            args.padded_vocab_size = 32128
            config = core_transformer_config_from_args(args)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found = {name: getattr(args, name, None) for name in CHECKED}
    return found | {"attention_backend": config.attention_backend.name}


def main() -> None:
    """Answers all cases of stdin."""
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    # Megatron builds its parser anew for each case, from the source text of its dataclasses: two thirds of the time.
    inspect.getsource, ast.parse = functools.cache(inspect.getsource), functools.cache(ast.parse)
    cases = json.load(sys.stdin)
    json.dump([check(case["world_size"], case["words"]) for case in cases], sys.stdout, default=str)


if __name__ == "__main__":
    main()
