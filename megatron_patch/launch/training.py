"""Both stages of LLaVA training: their rows, and the words that a call of them becomes."""

import os
import re
import sys
import time

from megatron_patch.launch import machine, run_file
from megatron_patch.launch.machine import CLUSTERS, DSW, Job
from megatron_patch.launch.presets import PRESETS, presets_of
from megatron_patch.launch.rows import COMMON_OPTIONS, Argument, Call, Command, Option, Program, option, quoted
from megatron_patch.launch.rules import (
    ABOVE_0,
    ACCELERATOR,
    AUTO_BOOLEAN,
    BENCHMARK,
    BOOLEAN,
    CHECKPOINT_OR_NONE,
    COUNT,
    COUNT_OR_ZERO,
    DATASET,
    DECAY,
    FEATURES,
    FILE_OR_FOLDER,
    FOLDER,
    FROM_0,
    GPU_IDS,
    GRID,
    ITERATIONS,
    LLAVA_FOLDER,
    MODEL_PARTS,
    MODEL_SIZE,
    NAMES,
    OUTPUT,
    PARALLEL,
    PEFT_FOLDER,
    PORT,
    RANKS,
    REPOSITORY,
    TEMPLATE,
    TEXT,
    one_of,
    whole,
)
from megatron_patch.launch.tables import table
from megatron_patch.launch.training_rules import check_training, wandb_wanted
from megatron_patch.llava_folder import IMAGE_ASPECT_RATIOS

ENTRY = f"{REPOSITORY}/examples/llava_mcore/pretrain_llava.py"

ARGUMENTS = (
    Argument(
        "ENV",
        one_of(DSW, *CLUSTERS),
        "dsw: all processes on this machine; "
        + "; ".join(f"{name}: {one.meaning}" for name, one in CLUSTERS.items())
        + " (variables below)",
    ),
    Argument(
        "MODEL_SIZE",
        MODEL_SIZE,
        "size of the language model; must be the one the checkpoint was converted with",
        own="--model-size",
    ),
    Argument(
        "BATCH_SIZE",
        COUNT,
        "samples per data-parallel rank and forward pass (micro-batch)",
        megatron="--micro-batch-size",
    ),
    Argument(
        "GLOBAL_BATCH_SIZE",
        COUNT,
        "samples per optimizer step; a multiple of BATCH_SIZE x data-parallel size",
        megatron="--global-batch-size",
    ),
    Argument("LR", ABOVE_0, "highest learning rate", megatron="--lr"),
    Argument("MIN_LR", FROM_0, "learning rate at the end of the cosine; at most LR", megatron="--min-lr"),
    Argument("SEQ_LEN", COUNT, "image tokens of one image (576 for CLIP-L/14 at 336 pixels)", own="--image-tokens"),
    Argument(
        "DECODER_SEQ_LEN",
        COUNT,
        "image and text tokens of one sample; more than SEQ_LEN",
        megatron="--seq-length",
    ),
    Argument(
        "PR",
        one_of("fp16", "bf16", "fp8", "fp32"),
        "precision; bf16 on a CPU wants one with bf16 instructions; fp8 (the decoder's layers, bf16 around them) "
        "needs a "
        "GPU and Transformer Engine",
    ),
    Argument(
        "TP",
        PARALLEL,
        "tensor-parallel size; above 1 with sequence parallelism",
        megatron="--tensor-model-parallel-size",
    ),
    Argument("PP", PARALLEL, "pipeline-parallel size", megatron="--pipeline-model-parallel-size"),
    Argument("CP", PARALLEL, "context-parallel size", megatron="--context-parallel-size"),
    Argument("DO", BOOLEAN, "distributed optimizer: its state is shared out over the data-parallel ranks"),
    Argument("FL", BOOLEAN, "true: the fastest attention there is (flash-attn or cuDNN); false: on a GPU cuDNN only"),
    Argument(
        "AC",
        one_of("sel", "full", "offload", "false", "true"),
        "activations: recompute attention (sel; true means sel) or whole layers, move them to the host, keep them",
    ),
    Argument(
        "OPTIMIZER_OFFLOAD",
        one_of("false", "static", "auto"),
        "optimizer state in host memory; needs DO=true and a GPU",
        own="--optimizer-offload-policy",
    ),
    Argument("SAVE_INTERVAL", COUNT, "iterations from one checkpoint to the next", megatron="--save-interval"),
    Argument("DATASET_PATH", DATASET, "training data", own="--train-dataset-path"),
    Argument(
        "VALID_DATASET_PATH",
        DATASET,
        "validation data; may be the training data's",
        own="--valid-dataset-path",
    ),
    Argument(
        "PRETRAIN_CHECKPOINT_PATH",
        CHECKPOINT_OR_NONE,
        "weights to start from, configuration and tokenizer; none: start from nothing",
        own="--init-from",
    ),
    Argument("TRAIN_ITERS", COUNT, "iterations, warm-up included", megatron="--train-iters"),
    Argument(
        "LR_WARMUP_ITERS",
        COUNT_OR_ZERO,
        "iterations of linear warm-up; fewer than TRAIN_ITERS",
        megatron="--lr-warmup-iters",
    ),
    Argument(
        "OUTPUT_BASEPATH",
        OUTPUT,
        "checkpoint/, tensorboard/ and log/ below it; the same folder again resumes",
        own="--output-path",
    ),
)


def options(stage: int) -> tuple[Option, ...]:
    """Rows, with the defaults in which the stages differ."""
    frozen, template = {1: ("true", "plain"), 2: ("false", "auto")}[stage]
    trained = "auto: as the checkpoint was trained"
    return (
        option(
            "PRESET",
            "(none)",
            TEXT,
            "a published recipe; it fills in arguments given as - and defaults of options (table below)",
        ),
        option(
            "FREEZE_LANGUAGE_MODEL",
            frozen,
            BOOLEAN,
            "keep the language model as it is",
            own="--freeze-language-model",
        ),
        option("FREEZE_VISION_TOWER", "true", BOOLEAN, "keep the vision tower as it is", own="--freeze-vision-tower"),
        option("FREEZE_PROJECTOR", "false", BOOLEAN, "keep the projector as it is", own="--freeze-projector"),
        option(
            "LORA_RANK",
            "0",
            COUNT_OR_ZERO,
            "rank of low-rank adapters (LoRA), which are trained in place of the weights of LORA_PARTS; checkpoints "
            "then hold adapters, other trained weights and the optimizer alone; 0: none",
            own="--lora-rank",
        ),
        option(
            "LORA_ALPHA",
            "(2 x LORA_RANK)",
            ABOVE_0,
            "what the adapters add is scaled by LORA_ALPHA / LORA_RANK",
            own="--lora-alpha",
        ),
        option("LORA_DROPOUT", "0", DECAY, "share of an adapter's inputs that is dropped", own="--lora-dropout"),
        option(
            "LORA_TARGETS",
            "all",
            NAMES,
            "linear layers with adapters, by their names in the Hugging Face model",
            own="--lora-targets",
        ),
        option(
            "LORA_PARTS",
            "language_model",
            MODEL_PARTS,
            "parts of the model with adapters; their own weights are frozen whatever FREEZE_ says",
            own="--lora-parts",
        ),
        option(
            "LORA_RSLORA",
            "false",
            BOOLEAN,
            "scale by LORA_ALPHA / sqrt(LORA_RANK) (rank-stabilised LoRA)",
            own="--lora-rslora",
        ),
        option(
            "LORA_ADAPTER",
            "(new ones)",
            PEFT_FOLDER,
            "adapters to begin with, a folder that peft or an export has saved",
            own="--lora-adapter",
        ),
        option(
            "FEATURE_CACHE",
            "(none)",
            FEATURES,
            "features of the training images, read in place of decoding them and running the frozen vision tower",
            own="--feature-cache",
        ),
        option(
            "CONVERSATION_TEMPLATE",
            template,
            TEMPLATE,
            "how turns become text; auto: the one the checkpoint was trained with in stage 2, else the one that fits "
            "the "
            "language model; built in: megatron_patch/data/conversation_templates",
            own="--conversation-template",
        ),
        option(
            "IMAGE_CONV_FRONT",
            "auto",
            AUTO_BOOLEAN,
            f"images stand before the conversation; {trained}, else false",
            own="--image-conv-front",
        ),
        option(
            "IMAGE_START_END",
            "auto",
            AUTO_BOOLEAN,
            f"each image stands between <im_start> and <im_end>, which the tokenizer must know; {trained}, else false",
            own="--image-start-end",
        ),
        option(
            "IMAGE_ASPECT_RATIO",
            "auto",
            one_of("auto", *IMAGE_ASPECT_RATIOS),
            "how an image becomes square; anyres: tiles near its own resolution, of a model that has a rule for it; "
            f"{trained}, else anyres of such a model and crop of others",
            own="--image-aspect-ratio",
        ),
        option(
            "IMAGE_TILES",
            "auto",
            GRID,
            "each image becomes that many tiles and a thumbnail, of SEQ_LEN tokens each; 1x1: only the image; "
            f"{trained}, else 1x1",
            own="--image-tiles",
        ),
        option(
            "EXIF_ORIENTATION",
            "auto",
            AUTO_BOOLEAN,
            f"turn images as their EXIF tag says; false: as LLaVA's original code; {trained}, else true",
            own="--exif-orientation",
        ),
        option(
            "DATA_ORDER",
            "cyclic",
            one_of("cyclic", "single", "modality", "modality_window"),
            "cyclic: shuffled each epoch; single: as stored; modality: text and images in steps of their own, of like "
            "length; modality_window: the same within windows of records, for very many of them",
            own="--data-order",
        ),
        option(
            "MEGA_BATCH_MULT",
            "50",
            COUNT,
            "with DATA_ORDER=modality or modality_window: steps that are sorted by length together",
            own="--mega-batch-mult",
        ),
        option(
            "PADDING_FREE",
            "auto",
            AUTO_BOOLEAN,
            "records of a micro-batch stand in one row where they would be padded to the longest; same result, less "
            "work; auto: without Transformer Engine",
            own="--padding-free",
        ),
        option(
            "BALANCE_COST",
            "false",
            BOOLEAN,
            "the records of a step are dealt to ranks and micro-batches so that all ranks have as much to do, by "
            "tokens, "
            "pairs of tokens and images",
            own="--balance-cost",
        ),
        option(
            "PACKING",
            "false",
            BOOLEAN,
            "several records fill a row of DECODER_SEQ_LEN tokens and do not see each other; BATCH_SIZE then counts "
            "rows",
            own="--packing",
        ),
        option(
            "MAX_SKIPPED",
            "0.01",
            FROM_0,
            "share of the records that may be unusable before the run stops",
            own="--max-skipped-share",
        ),
        option(
            "TOKENIZER_PATH",
            "(the checkpoint's)",
            LLAVA_FOLDER,
            "only with PRETRAIN_CHECKPOINT_PATH=none, and then required (llava/ of a checkpoint is one)",
            own="--tokenizer-path",
        ),
        option(
            "FSDP",
            "false",
            one_of("false", "full", "hybrid", "grad"),
            "weights, gradients and optimizer state are shared out over the data-parallel ranks (torch FSDP2): full: "
            "weights are gathered for forward and again for backward; grad: once for both; hybrid: as full, over the "
            "ranks of a node, each node has them; PR bf16 or fp32, without PP and DO",
            own="--fsdp",
        ),
        option(
            "FIRST_STAGE_LAYERS",
            "(layers / PP)",
            COUNT,
            "decoder layers of the first pipeline stage, which holds the vision tower too; the others share the rest",
            megatron="--decoder-first-pipeline-num-layers",
        ),
        option(
            "VIRTUAL_STAGES",
            "1",
            whole(1, 999),
            "virtual pipeline stages on each pipeline rank (interleaved schedule); above 1 needs PP above 1",
        ),
        option(
            "RECOMPUTE_METHOD",
            "uniform",
            one_of("uniform", "block"),
            "with AC=full: every RECOMPUTE_LAYERS layers as one piece, or only the first RECOMPUTE_LAYERS of a stage",
        ),
        option("RECOMPUTE_LAYERS", "1", COUNT, "with AC=full: see RECOMPUTE_METHOD"),
        option(
            "TOWER_AC",
            "(AC)",
            one_of("sel", "full", "false"),
            "what of the vision tower is recomputed, where it is trained",
            own="--vision-tower-recompute",
        ),
        option("FP8_FORMAT", "hybrid", one_of("hybrid", "e4m3"), "with PR=fp8: e5m2 for gradients, or e4m3 for all"),
        option(
            "FP8_RECIPE",
            "tensorwise",
            one_of("tensorwise", "delayed"),
            "with PR=fp8: scales of the present tensor (current scaling), or from the amax history",
        ),
        option(
            "FP8_MARGIN", "0", whole(0, 99), "with FP8_RECIPE=delayed: powers of two that scales stay below the largest"
        ),
        option("FP8_AMAX_HISTORY", "1024", COUNT, "with FP8_RECIPE=delayed: length of the amax history"),
        option(
            "FP8_AMAX_ALGORITHM",
            "max",
            one_of("max", "most_recent"),
            "with FP8_RECIPE=delayed: which of the history counts",
        ),
        option(
            "ON_BAD_LOSS",
            "stop",
            one_of("stop", "skip", "rollback"),
            "a loss or gradient that is not finite, or a loss spike: end; drop this step; start again from the last "
            "checkpoint and leave it out",
            own="--on-bad-loss",
        ),
        option(
            "SPIKE_FACTOR",
            "0",
            FROM_0,
            "a loss above so many times the median of the last 50 is bad too; 0: none is",
            own="--spike-factor",
        ),
        option("MAX_ROLLBACKS", "3", whole(0, 99), "with ON_BAD_LOSS=rollback: after so many the run ends"),
        option(
            "MAX_RESTARTS",
            "0",
            whole(0, 99),
            "with ENV=dsw: a run in which a process dies starts again from the last checkpoint, so many times, if it "
            "saved one since its start; not after a wrong call or a bad loss; ENV=slurm: read by train_llava.sbatch",
        ),
        option(
            "TIME_LIMIT",
            "(none)",
            COUNT,
            "minutes from the start, before whose end the run saves and ends with exit code 0",
        ),
        option(
            "KEEP_LAST",
            "0",
            COUNT_OR_ZERO,
            "checkpoints that are retained, older ones are deleted; 0: all",
            own="--keep-last",
        ),
        option(
            "KEEP_BEST",
            "false",
            BOOLEAN,
            "retain the best validation as checkpoint/best, saving it where none was due",
            own="--keep-best",
        ),
        option(
            "BEST_BY",
            "loss",
            one_of("loss", "score"),
            "what KEEP_BEST goes by: the lowest validation loss, or the highest score of EVAL_BENCHMARK",
            own="--best-by",
        ),
        option(
            "DETERMINISTIC",
            "false",
            BOOLEAN,
            "only operations that give the same bits again; slower",
            megatron="--deterministic-mode",
        ),
        option(
            "ASYNC_SAVE",
            "false",
            BOOLEAN,
            "checkpoints are written by a process of their own while training goes on",
            megatron="--async-save",
        ),
        option(
            "SAVE_OPTIM",
            "true",
            BOOLEAN,
            "checkpoints hold the optimizer's state; false: they are smaller, and a run that goes on from one says so: "
            "Adam's moments begin at zero",
        ),
        option("LOAD_OPTIM", "true", BOOLEAN, "a run that goes on takes the optimizer's state up where it is stored"),
        option(
            "DEBUG",
            "false",
            BOOLEAN,
            "each process tells more in its log: torch.distributed's and NCCL's checks and messages, C++ stacks, the "
            "Python stacks of a crash; slower",
        ),
        option(
            "ACCELERATOR",
            "auto",
            ACCELERATOR,
            "auto: GPUs where there are any, else cpu; accelerators: megatron_patch/device",
        ),
        option(
            "GPUS",
            "(all that are visible)",
            GPU_IDS,
            "GPUs of this node for this job, by the numbers of the driver's own list; one process each",
        ),
        option(
            "NPROC_PER_NODE",
            "(see meaning)",
            whole(1, 4096),
            "processes on this node: all visible GPUs, on CPU TP x PP x CP, in a cluster what the job says",
        ),
        option("MASTER_PORT", "(a free one)", PORT, "port where the processes meet"),
        option(
            "NUM_WORKERS",
            "2",
            whole(0, 999),
            "loader processes per rank; may change on resuming",
            megatron="--num-workers",
        ),
        option("SEED", "1234", COUNT, "seed of weights, order of the data and dropout", megatron="--seed"),
        option(
            "LOG_INTERVAL",
            "1",
            COUNT,
            "iterations from one line of the log to the next",
            megatron="--log-interval",
        ),
        option(
            "EVAL_INTERVAL",
            "1000",
            COUNT,
            "iterations from one validation to the next",
            megatron="--eval-interval",
        ),
        option("EVAL_ITERS", "10", COUNT_OR_ZERO, "batches per validation; 0: none", megatron="--eval-iters"),
        option(
            "SAMPLE_ANSWERS",
            "0",
            whole(0, 99),
            "questions of the validation data that the model answers at each validation, for TensorBoard and answers/ "
            "(4 "
            "is a good number)",
            own="--sample-answers",
        ),
        option(
            "EVAL_BENCHMARK",
            "(none)",
            BENCHMARK,
            "benchmark that the model answers at each validation: its score as a curve, benchmark/ with answers and a "
            "sheet of them over time",
            own="--eval-benchmark",
        ),
        option(
            "EVAL_BENCHMARK_DATA",
            "(none)",
            FILE_OR_FOLDER,
            "the files of EVAL_BENCHMARK, as evaluate_llava.sh --data",
            own="--eval-benchmark-data",
        ),
        option(
            "EVAL_BENCHMARK_IMAGES",
            "(none)",
            FOLDER,
            "its images, where they do not lie beside its files",
            own="--eval-benchmark-images",
        ),
        option(
            "EVAL_BENCHMARK_QUESTIONS",
            "64",
            COUNT,
            "so many of its questions, evenly chosen",
            own="--eval-benchmark-questions",
        ),
        option("PROFILE", "(none)", ITERATIONS, "iterations to trace"),
        option(
            "PROFILER",
            "torch",
            one_of("torch", "nsys"),
            "torch: traces below profile/; nsys: start the launcher under nsys profile -c cudaProfilerApi, on GPUs",
        ),
        option("PROFILE_RANKS", "0", RANKS, "processes to trace"),
        option(
            "WANDB_PROJECT",
            "(see meaning)",
            TEXT,
            "llava; W&B is told all that TensorBoard is when WANDB_API_KEY is in the environment, or "
            "WANDB_MODE=offline",
        ),
        option("WANDB_NAME", "(last folder of OUTPUT_BASEPATH)", TEXT, "name of the run at W&B"),
        option(
            "CHECK",
            "true",
            BOOLEAN,
            "look at tokenizer, template, data and the run to resume before anything is created",
        ),
        option("WEIGHT_DECAY", "0", FROM_0, "weight decay of AdamW", megatron="--weight-decay"),
        option(
            "VISION_TOWER_LR",
            "(LR)",
            ABOVE_0,
            "highest learning rate of the vision tower; its lowest keeps the ratio of MIN_LR to LR",
            own="--vision-tower-lr",
        ),
        option("PROJECTOR_LR", "(LR)", ABOVE_0, "the same of the projector", own="--projector-lr"),
        option(
            "VISION_TOWER_WEIGHT_DECAY",
            "(WEIGHT_DECAY)",
            FROM_0,
            "weight decay of the vision tower",
            own="--vision-tower-weight-decay",
        ),
        option(
            "PROJECTOR_WEIGHT_DECAY",
            "(WEIGHT_DECAY)",
            FROM_0,
            "weight decay of the projector",
            own="--projector-weight-decay",
        ),
        option(
            "EMA_DECAY",
            "0",
            DECAY,
            "decay of a moving average of the trained weights, saved in checkpoint/average beside each checkpoint; 0: "
            "none",
            own="--ema-decay",
        ),
        option("ADAM_BETA2", "0.95", DECAY, "second beta of AdamW; the first is 0.9", megatron="--adam-beta2"),
        option("CLIP_GRAD", "1.0", FROM_0, "largest gradient norm; 0: not limited", megatron="--clip-grad"),
        *COMMON_OPTIONS,
    )


# Values that are paths, which become absolute.
PATHS = (
    *("DATASET_PATH", "VALID_DATASET_PATH", "PRETRAIN_CHECKPOINT_PATH", "OUTPUT_BASEPATH", "TOKENIZER_PATH"),
    *("FEATURE_CACHE", "LORA_ADAPTER", "EVAL_BENCHMARK_DATA", "EVAL_BENCHMARK_IMAGES"),
)


# ---------------------------------------------------------------- words


def _words(call: Call, job: Job) -> list[str]:
    """The arguments for Megatron's parser and our own.

    Those of geometry, tokenizer and device are not among them: pretrain_llava.py takes those from the checkpoint and
    the machine.
    """
    output = call.absolute("OUTPUT_BASEPATH")
    words = []
    for row in (*call.command.arguments, *call.command.options):
        words += row.words(call.absolute(row.name) if row.name in PATHS or _is_file(row, call) else call[row.name])
    return [
        *words,
        *("--lr-decay-style", "cosine", "--lr-decay-iters", call["TRAIN_ITERS"]),  # the warm-up is inside
        *("--adam-beta1", "0.9", "--attention-dropout", "0", "--hidden-dropout", "0"),
        # Ranks see different numbers of labels: without it their mean is of means, 5.6e-2 off under CP.
        "--calculate-per-token-loss",
        *("--save", f"{output}/checkpoint", "--load", f"{output}/checkpoint", "--ckpt-format", "torch_dist"),
        "--override-opt-param-scheduler",  # resumed with another LR or TRAIN_ITERS: what is typed now holds
        *("--tensorboard-dir", f"{output}/tensorboard"),
        *("--log-timers-to-tensorboard", "--log-validation-ppl-to-tensorboard", "--distributed-timeout-minutes", "60"),
        *("--bad-batches-file", f"{output}/bad_batches.jsonl"),
        *(["--sequence-parallel"] if call.int("TP") > 1 else []),
        *_virtual_stages(call),
        *_precision(call, job),
        *_memory(call),
        *_reports(call, output),
        *_time_limit(call),
    ]


def _is_file(row: Argument, call: Call) -> bool:
    return row.rule is TEMPLATE and os.path.isfile(call[row.name])


def _virtual_stages(call: Call) -> list[str]:
    stages = call["VIRTUAL_STAGES"]
    return [] if stages == "1" else ["--num-virtual-stages-per-pipeline-rank", stages]


def _precision(call: Call, job: Job) -> list[str]:
    words = {
        # the gradient of a loss summed over all labels overflows 16 bits, and with a first scale of 2^32 at every step
        "fp16": ["--fp16", "--initial-loss-scale", "65536", "--accumulate-allreduce-grads-in-fp32"],
        "bf16": ["--bf16"],
        "fp8": ["--bf16", "--fp8-format", call["FP8_FORMAT"], "--fp8-recipe", call["FP8_RECIPE"]],
        "fp32": [],
    }[call["PR"]]
    if call["PR"] == "fp8" and call["FP8_RECIPE"] == "delayed":
        call.notes.append(
            "FP8_RECIPE=delayed: Transformer Engine from 2.17.1 on refuses the amax history of a checkpoint, so no run "
            "can resume or start from those of this one"
        )
        words += [
            *("--fp8-margin", call["FP8_MARGIN"], "--fp8-amax-history-len", call["FP8_AMAX_HISTORY"]),
            *("--fp8-amax-compute-algo", call["FP8_AMAX_ALGORITHM"]),
        ]
    # Transformer Engine's flash-attn and cuDNN attention are for 16 bits; the choice of FL=true falls back for fp32.
    if job.device.ATTENTION_BACKENDS is not None:
        fastest, other = job.device.ATTENTION_BACKENDS
        words += ["--attention-backend", fastest if call["FL"] == "true" or call["PR"] == "fp32" else other]
    return words


def _memory(call: Call) -> list[str]:
    selective = ["--recompute-granularity", "selective"]
    if call["AC"] == "true":
        call.notes.append("AC=true means AC=sel: attention is recomputed in the backward pass")
    words = {
        "true": selective,
        "sel": selective,
        "full": [
            *("--recompute-granularity", "full", "--recompute-method", call["RECOMPUTE_METHOD"]),
            *("--recompute-num-layers", call["RECOMPUTE_LAYERS"]),
        ],
        "offload": [
            "--fine-grained-activation-offloading",
            *("--offload-modules", "qkv_linear", "core_attn", "attn_proj"),
        ],
        "false": [],
    }[call["AC"]]
    if call["ASYNC_SAVE"] == "true":
        # Megatron's own writer; without the persistent worker it would quietly save as before.
        words += ["--async-strategy", "mcore", "--use-persistent-ckpt-worker"]
    words += ["--no-save-optim"] if call["SAVE_OPTIM"] == "false" else []
    words += ["--no-load-optim"] if call["LOAD_OPTIM"] == "false" else []
    if call["DO"] == "true":
        words += ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
    return words


def _reports(call: Call, output: str) -> list[str]:
    words = []
    if call["PROFILE"]:
        first, last = ITERATIONS.parse(call["PROFILE"])
        ranks = call["PROFILE_RANKS"].split(",")
        if call["PROFILER"] == "torch":
            words += ["--trace-iterations", str(first), str(last), "--trace-ranks", *ranks]
        else:  # Megatron begins before the iteration that follows the first number
            words += ["--profile", "--profile-step-start", str(first - 1), "--profile-step-end", str(last)]
            words += ["--profile-ranks", *ranks, "--nvtx-ranges"]
    if wandb_wanted(call.environment):
        name = call["WANDB_NAME"] or os.path.basename(output.rstrip("/"))
        words += ["--wandb-project", call["WANDB_PROJECT"] or "llava", "--wandb-exp-name", name]
        words += ["--wandb-save-dir", output]
    return words


def _time_limit(call: Call) -> list[str]:
    return ["--stop-at", str(int(time.time()) + 60 * call.int("TIME_LIMIT"))] if call["TIME_LIMIT"] else []


DETERMINISTIC = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
DEBUG = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "NCCL_DEBUG": "INFO", "TORCH_SHOW_CPP_STACKTRACES": "1"}
DEBUG |= {"PYTHONFAULTHANDLER": "1"}  # the stacks of all threads at a crash in C


def _environment(call: Call, job: Job) -> dict[str, str]:
    variables = machine.process_environment(call, job)
    variables[run_file.VARIABLE] = run_file.resolved(call)
    if call["FSDP"] != "false":
        # weights come and go all the time: host memory that is kept for the next would pile up
        variables = {name: value for name, value in variables.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        variables["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    if call["AC"] == "offload":
        variables["NVTE_CPU_OFFLOAD_V1"] = "1"  # Transformer Engine 2.10 and newer would move the weights too
    # Libraries read these at first use, which may be before Megatron's parser would set them.
    asked = (DETERMINISTIC if call["DETERMINISTIC"] == "true" else {}) | (DEBUG if call["DEBUG"] == "true" else {})
    for name, value in asked.items():
        variables[name] = call.environment.get(name) or value
    if sys.stderr.isatty():
        # processes.py passes lines on, so no process sees the terminal: progress.py opens it by its name.
        variables["LLAVA_TERMINAL"] = os.ttyname(sys.stderr.fileno())
    return variables


# ---------------------------------------------------------------- the command


# Words that Megatron's parser takes and that do nothing.
WITHOUT_EFFECT = {
    "--fp8-interval": "must be left out: Transformer Engine has ignored it since 1.8; scales are computed at every step"
}
HOW = """Arguments after the 23rd go to Megatron as they are; the first of them begins with --.
In place of the 23: --config FILE (.yaml, .json or .toml with NAME: value), or --from OUTPUT_BASEPATH, which starts a
run as it was started; behind either NAME=VALUE, which wins, and then Megatron's."""


def stage(number: int) -> Command:
    """A launcher of one stage."""
    title = {
        1: "Stage 1: trains the projector; language model and vision tower are frozen.",
        2: "Stage 2: trains language model and projector; the vision tower is frozen.",
    }[number]

    def check(call: Call) -> Job | None:
        if call["ENV"] in CLUSTERS:
            call.require(CLUSTERS[call["ENV"]].variables)
        if call.rest and not re.match("--.", call.rest[0]):
            call.complain(
                f"argument {len(ARGUMENTS) + 1} {quoted(call.rest[0])}",
                f"must begin with -- (after the {len(ARGUMENTS)} come Megatron's own); quote values that hold spaces",
            )
        for place, word in enumerate(call.rest, len(ARGUMENTS) + 1):
            if (name := word.partition("=")[0]) in WITHOUT_EFFECT:
                call.complain(f"argument {place} {quoted(word)}", WITHOUT_EFFECT[name])
        if call.environment.get("FP8_INTERVAL"):
            call.complain("environment FP8_INTERVAL", WITHOUT_EFFECT["--fp8-interval"])
        return check_training(call, is_stage_2=number == 2)

    return Command(
        f"{title}\n{HOW}",
        ARGUMENTS,
        options(number),
        check,
        lambda call, job: _start(number, call, job),
        paths=PATHS,
        rest="MEGATRON ARGUMENTS",
        more_help=_more_help,
        presets=presets_of(number),
    )


def _start(number: int, call: Call, job: Job) -> Program:
    output, stamp = call.absolute("OUTPUT_BASEPATH"), time.strftime("%Y%m%d-%H%M%S")
    words = machine.process_words(call, job, output, stamp)
    if call["DEBUG"] == "true":
        logs = f"{output}/log/{stamp}-node{job.node_rank}/attempt_0"
        call.notes.append(f"DEBUG=true: what each process says is in {logs}/PROCESS/stdout.log and stderr.log")
    # Stage 1 is where a new projector is trained; in stage 2 it is an error.
    fresh = ["--allow-fresh-projector"] if number == 1 else []
    return Program([*words, ENTRY, *_words(call, job), *fresh, *call.rest], _environment(call, job))


def _more_help() -> str:
    presets = "\n".join(
        f"  {f'{preset.name}, stage {preset.stage}':<30}  {preset.source}\n      {spelled(preset.values)}"
        for preset in PRESETS
    )
    clusters = "\n".join(
        table(f"Required in the environment when ENV={name}", cluster.variables) for name, cluster in CLUSTERS.items()
    )
    return f"\nPresets: name and stage, source, values\n{presets}\n{clusters}"


def spelled(values: dict[str, str]) -> str:
    """NAME=VALUE of a preset."""
    return " ".join(f"{name}={value}" for name, value in values.items())
