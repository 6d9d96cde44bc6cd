"""What a run needs to know before Megatron starts: our arguments, the `llava/` folder, arguments derived from both."""

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from megatron_patch import device
from megatron_patch.arguments import add_arguments, auto_template
from megatron_patch.checkpoint_files import TRACKER, newest_iteration
from megatron_patch.data.loading.blend import read_parts
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.errors import UserError
from megatron_patch.geometry import LanguageGeometry, LlavaGeometry
from megatron_patch.launch.rows import Option
from megatron_patch.launch.rules import BOOLEAN
from megatron_patch.launch.training import ARGUMENTS, options
from megatron_patch.launch.training_rules import FRESH_PROJECTOR, model_violations, projector_is_fresh, violations
from megatron_patch.llava_folder import IMAGE_SETTINGS, LlavaFolder, TrainingSettings
from megatron_patch.lora import LoraRecord
from megatron_patch.object_storage import is_url
from megatron_patch.step_balance import RecordCost
from megatron_patch.step_flop import Frozen, Work, step_flop
from megatron_patch.training.adapters import check_peft, lora_of, read_record
from megatron_patch.training.benchmark import Benchmark, read_benchmark
from megatron_patch.training.feature_cache import check_feature_cache
from megatron_patch.training.offload import offload_arguments

# Tokens.  AC=offload holds pinned host memory for every shape that has occurred and never frees it, so lengths are
# multiples of this: at most DECODER_SEQ_LEN / 256 + 1 of them.
OFFLOADED_LENGTHS = 256
# Module -> package that Megatron's activation offload imports at its start, to bind processes to their GPU's cores.
OFFLOAD_PACKAGES = {"pynvml": "nvidia-ml-py", "cuda": "cuda-python"}
_FSDP2 = ("--use-torch-fsdp2", "--no-gradient-accumulation-fusion")
FSDP_ARGUMENTS = {
    "false": (),
    "full": _FSDP2,
    "hybrid": _FSDP2,
    "grad": (*_FSDP2, "--torch-fsdp2-no-reshard-after-forward"),
}
ROWS = (*ARGUMENTS, *options(stage=2))
FP8_ROWS = 16  # what the rows of a product must be a multiple of, on every rank: B x S / (TP x CP)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Read once, checked once."""

    geometry: LlavaGeometry
    llava_folder: LlavaFolder  # what this run uses, and saves with its checkpoints
    trained_with: TrainingSettings  # saved there
    warning: str | None  # about them
    train_dataset_path: str
    valid_dataset_path: str | None  # None: nothing is evaluated
    data: DataConfig
    pixel_std: tuple[float, float, float]
    benchmark: Benchmark | None  # asked at validations
    lora: LoraRecord | None  # saved there too; None: whole weights are trained
    megatron_arguments: tuple[str, ...]  # for Megatron's parser, derived ones first so that the user's win


def parse_own_arguments(argv: list[str]) -> argparse.Namespace:
    """Our own arguments, and those of Megatron's that settings follow from; the rest is passed over."""
    parser = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    # Megatron's arguments that decide where things lie and how batches look; its own parser sees them again later
    for row in ROWS:
        if row.megatron and row.rule is BOOLEAN:
            parser.add_argument(row.megatron, action="store_true")
        elif row.megatron:
            parser.add_argument(row.megatron, type=row.rule.parse)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--rampup-batch-size", nargs=3)
    parser.add_argument("--step-batch-size-schedule")
    parser.add_argument("--num-virtual-stages-per-pipeline-rank", type=int)
    parser.add_argument("--fp8-format")
    for switch in (
        *("sequence-parallel", "bf16", "fp16"),
        *("use-distributed-optimizer", "use-torch-fsdp2", "use-megatron-fsdp"),
    ):
        parser.add_argument(f"--{switch}", action="store_true")
    parser.add_argument("--wandb-project")
    parser.add_argument("--fine-grained-activation-offloading", action="store_true")
    # a start by hand may leave these out
    parser.set_defaults(micro_batch_size=1, global_batch_size=1, seed=1234, num_workers=2, eval_iters=0)
    parser.set_defaults(**{f"{kind}_parallel_size": 1 for kind in ("tensor_model", "pipeline_model", "context")})
    return parser.parse_known_args(argv)[0]


def typed(arguments: argparse.Namespace) -> dict[str, str]:
    """Values by the launchers' names, as they are typed there; those that are not handed on are left out."""
    found = {"VIRTUAL_STAGES": str(arguments.num_virtual_stages_per_pipeline_rank or 1)}
    for row in ROWS:
        if not (flag := row.own or row.megatron):
            continue
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
        if isinstance(value, bool):
            found[row.name] = str(value).lower()
        elif isinstance(value, tuple):
            found[row.name] = ("," if isinstance(value[0], str) else "x").join(map(str, value))
        elif value is not None:
            found[row.name] = f"{value:g}" if isinstance(value, float) else str(value)
        elif isinstance(row, Option):
            found[row.name] = row.initial
    return found


def _check_rules(arguments: argparse.Namespace, folder: LlavaFolder) -> None:
    """The launchers' rules, whoever started this.  Raises UserError, with all that breaks one."""
    values = typed(arguments)
    if has_checkpoint(arguments.load):
        values["TOKENIZER_PATH"] = ""  # configs and tokenizer are the resumed run's
        values.pop("PRETRAIN_CHECKPOINT_PATH")
    found = [*violations(values), *model_violations(values, folder)]
    if found:
        raise UserError("; ".join(f"{name}={values[name]} {text}" for name, text in found))


def has_checkpoint(folder: Path | None) -> bool:
    """True when `folder` holds a finished checkpoint: the tracker file is written last."""
    return folder is not None and (folder / TRACKER).is_file()


def _llava_folder(arguments: argparse.Namespace) -> LlavaFolder:
    """Where configs and tokenizer come from: the checkpoint resumed, else the one started from."""
    if has_checkpoint(arguments.load):
        return LlavaFolder.of(arguments.load)
    if arguments.init_from != "none":
        start = Path(arguments.init_from)
        if not has_checkpoint(start):
            raise UserError(
                f"PRETRAIN_CHECKPOINT_PATH {start}: no {TRACKER} in it, so no finished checkpoint; "
                "convert one with hf2mcore_convertor_llava.sh, or pass `none` to start from random weights"
            )
        return LlavaFolder.of(start)
    if not arguments.tokenizer_path:
        raise UserError("; ".join(f"{name} {text}" for name, text in violations(typed(arguments))))
    return LlavaFolder(Path(arguments.tokenizer_path))


def weights_folder(arguments: argparse.Namespace) -> Path | None:
    """Folder of the iteration whose weights the run begins with, of adapters their base's; None: drawn at random."""
    if has_checkpoint(arguments.load) and not arguments.lora_rank:
        step = arguments.ckpt_step
        return newest_iteration(arguments.load) if step is None else arguments.load / f"iter_{step:07}"
    return None if arguments.init_from == "none" else newest_iteration(Path(arguments.init_from))


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainingSettings that the command line names."""
    values = {
        "conversation_template": arguments.conversation_template,
        "image_aspect_ratio": arguments.image_aspect_ratio,
        "image_tiles": arguments.image_tiles,
        "exif_orientation": arguments.exif_orientation,
        "image_start_end": arguments.image_start_end,
        "image_conv_front": arguments.image_conv_front,
    }
    return {name: value for name, value in values.items() if value not in (None, "auto")}


def training_settings(arguments: argparse.Namespace, folder: LlavaFolder) -> tuple[TrainingSettings, str | None]:
    """Settings of images and prompts: what is given, else as the checkpoint was trained, else the shipped defaults.

    Returns:
        The settings, and a sentence where a run that starts sees images in another way than its checkpoint did.
    Raises:
        UserError: a resumed run was started with others.
    """
    given = _given(arguments)
    resumed = has_checkpoint(arguments.load) and newest_iteration(arguments.load).name != "release"
    # of a folder given with `none` configs and tokenizer are taken: these weights know no images yet
    saved = folder.training_settings if resumed or arguments.init_from != "none" else None
    if resumed and saved is not None:
        wanted = dataclasses.replace(saved, **given)
        if wrong := wanted.differences(saved):
            told = "; ".join(
                f"{name.upper()} is {wanted.spelled(name)}, wanted {saved.spelled(name)}" for name in wrong
            )
            raise UserError(
                f"{arguments.load}: the run cannot be resumed with other images or prompts than it was started with "
                f"({told}); set what is wanted, or pass this checkpoint as PRETRAIN_CHECKPOINT_PATH of a new "
                "OUTPUT_BASEPATH"
            )
        return saved, None
    given.setdefault("conversation_template", auto_template(folder, for_next_stage=True))
    settings = dataclasses.replace(saved or folder.untrained_settings, **given)
    changed = [name for name in settings.differences(saved) if name in IMAGE_SETTINGS] if saved else []
    if not changed:
        return settings, None
    told = ", ".join(f"{name.upper()} is {settings.spelled(name)} and was {saved.spelled(name)}" for name in changed)
    return settings, f"warning: {arguments.init_from} was trained with other images: {told}; its projector has to adapt"


def _check_transformer_engine(arguments: argparse.Namespace) -> None:
    """What the parser accepts without Transformer Engine and Megatron then quietly leaves out, or fails on late."""
    if device.have_transformer_engine():
        return
    for given, what in ((arguments.fp8_format, "PR=fp8"), (arguments.fine_grained_activation_offloading, "AC=offload")):
        if given:
            raise UserError(
                f"{what} needs Transformer Engine, which does not import here; install it for this machine's CUDA "
                "(bash examples/setup_environment.sh says how), or choose another value"
            )


def _check_offload(arguments: argparse.Namespace) -> None:
    """What AC=offload needs beside Transformer Engine; Megatron would say it with a traceback of every process."""
    if not arguments.fine_grained_activation_offloading:
        return
    if not (arguments.bf16 or arguments.fp16):
        raise UserError(
            "AC=offload needs Transformer Engine's layers, and PR=fp32 runs on Megatron's own; choose another AC or PR"
        )
    for module, package in OFFLOAD_PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"AC=offload needs the package {package}, which is not installed; run `pip install {package}`, or "
                "choose another AC"
            )


def decoder_arguments(language: LanguageGeometry, decoder_seq_len: int) -> list[str]:
    """The decoder's numbers as arguments for Megatron's parser.

    Raises:
        UserError: `decoder_seq_len` (tokens) exceeds the positions or the attention window the model was trained with.
    """
    if text := language.too_long(decoder_seq_len):
        raise UserError(f"DECODER_SEQ_LEN={decoder_seq_len} {text}")
    arguments = [
        *("--num-layers", language.layers, "--hidden-size", language.hidden),
        *("--ffn-hidden-size", language.ffn_hidden, "--num-attention-heads", language.heads),
        *("--kv-channels", language.head_dim, "--max-position-embeddings", language.max_positions),
        *("--normalization", "RMSNorm", "--norm-epsilon", language.norm_epsilon),
        *("--position-embedding-type", "rope", "--rotary-base", int(language.rope_base)),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", language.vocabulary),
        *("--swiglu", "--disable-bias-linear"),
    ]
    if language.groups != language.heads:
        arguments += ["--group-query-attention", "--num-query-groups", language.groups]
    if language.qkv_bias:
        arguments.append("--add-qkv-bias")
    if language.qk_norm:
        arguments.append("--qk-layernorm")
    if language.rope_factor is not None:
        arguments += ["--use-rope-scaling", "--rope-scaling-factor", language.rope_factor]
    if not language.tied_embeddings:
        arguments.append("--untie-embeddings-and-output-weights")
    return [str(argument) for argument in arguments]


def read_config(argv: list[str]) -> RunConfig:
    """Settings of a run from its command line (without the program's name).

    Raises:
        UserError: something is missing or does not fit; nothing has been created yet.
    """
    arguments = parse_own_arguments(argv)
    folder = _llava_folder(arguments)
    geometry = folder.geometry()
    _check_rules(arguments, folder)
    starting = arguments.init_from != "none" and not has_checkpoint(arguments.load)
    if starting and not arguments.allow_fresh_projector and projector_is_fresh(arguments.init_from):
        raise UserError(f"PRETRAIN_CHECKPOINT_PATH {arguments.init_from} {FRESH_PROJECTOR}")
    _check_transformer_engine(arguments)
    _check_offload(arguments)
    if arguments.use_torch_fsdp2:
        raise UserError("--use-torch-fsdp2 is not taken by itself: set FSDP to full, grad or hybrid (--fsdp)")
    if arguments.use_megatron_fsdp:
        raise UserError(
            "--use-megatron-fsdp is not offered: with megatron-core 0.19.2 it cannot save a LLaVA; use FSDP=full"
        )
    for folder_name in filter(None, (arguments.save, arguments.load)):
        if is_url(re.sub(":/+", "://", str(folder_name), count=1)):  # Path makes one of two slashes
            raise UserError(
                f"--save or --load {folder_name}: checkpoints are not kept in object storage; megatron-core 0.19.2 "
                "writes the data position to a disk whatever --enable-msc says; name a folder"
            )
    if arguments.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "W&B was asked for (WANDB_API_KEY or WANDB_MODE=offline), but the package wandb is not installed; "
            "run `pip install wandb`, or set WANDB_MODE=disabled"
        )
    tower = geometry.tower
    for name, path, split in (
        ("DATASET_PATH", arguments.train_dataset_path, "train"),
        ("VALID_DATASET_PATH", arguments.valid_dataset_path, "val"),
    ):
        if split == "val" and not arguments.eval_iters:
            continue
        for part in read_parts(path, split):
            if not is_url(part.path) and not (Path(part.path) / ".nv-meta").is_dir():
                raise UserError(
                    f"{name} {part.path}: no .nv-meta folder in it, so not an energon folder; write one with a "
                    "converter of toolkits/multimodal_data_preprocessing"
                )
    of_device = device.megatron_arguments(arguments.bf16 or arguments.fp16)
    if arguments.padding_free is None:
        # rows of several records have not run with Transformer Engine's attention
        arguments.padding_free = "local" in of_device and not arguments.fine_grained_activation_offloading
    in_parts = device.backend().READS_IN_PARTS and arguments.use_distributed_optimizer
    derived = [
        *of_device,
        *(["--ckpt-fully-parallel-load"] if in_parts else []),
        "--padding-free" if arguments.padding_free else "--no-padding-free",
        *decoder_arguments(geometry.language, arguments.seq_length),
        *offload_arguments(
            arguments.optimizer_offload_policy,
            geometry.language,
            arguments.tensor_model_parallel_size,
            arguments.pipeline_model_parallel_size,
            int(os.environ.get("WORLD_SIZE", "1")),
            arguments.context_parallel_size,
        ),
        *FSDP_ARGUMENTS[arguments.fsdp],
        *("--dataloader-type", "external"),
        # loss_spikes.py looks at losses and gradients; the state machine would rerun the step and end with 16 or 17
        *("--no-check-for-nan-in-loss-and-grad", "--rerun-mode", "disabled"),
    ]
    lora = read_record(arguments, folder, resumed=has_checkpoint(arguments.load))
    if lora is not None and arguments.lora_adapter is not None:
        check_peft(arguments.lora_adapter, lora.config, geometry)
    if arguments.init_from != "none" and lora is None:  # else adapters.py reads it at every start
        derived += ["--pretrained-checkpoint", arguments.init_from]
    images = folder.image_processing(tower.side_px)
    pixel_std = images.pop("image_std")
    trained_with, warning = training_settings(arguments, folder)
    data = _data_settings(arguments, geometry, folder, trained_with, images)
    if arguments.feature_cache is not None:
        check_feature_cache(arguments, weights_folder(arguments), data, pixel_std, geometry.tower)
    return RunConfig(
        geometry,
        folder,
        trained_with,
        warning,
        arguments.train_dataset_path,
        arguments.valid_dataset_path if arguments.eval_iters else None,
        data,
        pixel_std,
        read_benchmark(arguments, folder, trained_with),
        lora,
        megatron_arguments=(*derived, *argv),
    )


def _data_settings(
    arguments: argparse.Namespace,
    geometry: LlavaGeometry,
    folder: LlavaFolder,
    trained_with: TrainingSettings,
    images: dict[str, Any],
) -> DataConfig:
    """What the data room needs to know; `images`: image_mean, center_crop and resample."""
    # sequence parallelism cuts the sequence by TP, context parallelism into 2 * CP chunks
    sequence = arguments.tensor_model_parallel_size if arguments.sequence_parallel else 1
    context = 2 * arguments.context_parallel_size if arguments.context_parallel_size > 1 else 1
    positions = FP8_ROWS * arguments.context_parallel_size if arguments.fp8_format else context
    return DataConfig(
        tokenizer_path=str(folder.tokenizer),
        template=trained_with.conversation_template,
        image_token_id=geometry.image_token_id,
        video_token_id=geometry.video_token_id,
        image_tokens=geometry.tower.image_tokens,
        any_resolution=geometry.any_resolution,
        side_px=geometry.tower.side_px,
        decoder_seq_len=arguments.seq_length,
        micro_batch_size=arguments.micro_batch_size,
        length_multiple=sequence * positions,
        length_step=OFFLOADED_LENGTHS if arguments.fine_grained_activation_offloading else 1,
        record_multiple=context,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
        max_skipped_share=arguments.max_skipped_share,
        order=arguments.data_order,
        step_records=arguments.global_batch_size,
        mega_batch_mult=arguments.mega_batch_mult,
        packing=arguments.packing,
        padding_free=arguments.padding_free,
        # with cached features too at the tower's cost: the records are dealt as without
        balance_cost=_record_cost(arguments, geometry) if arguments.balance_cost else None,
        feature_cache=None if arguments.feature_cache is None else str(arguments.feature_cache),
        **trained_with.for_data(),
        **images,
    )


def frozen_parts(arguments: argparse.Namespace) -> Frozen:
    """What the run keeps as it is, from our own arguments."""
    kept = Frozen(arguments.freeze_language_model, arguments.freeze_vision_tower, arguments.freeze_projector)
    return kept.with_adapters(lora_of(arguments))


def _record_cost(arguments: argparse.Namespace, geometry: LlavaGeometry) -> RecordCost:
    """What a token, a pair of tokens and an image cost in this run.  Raises UserError: steps of changing size."""
    schedules = {
        "--rampup-batch-size": arguments.rampup_batch_size,
        "--step-batch-size-schedule": arguments.step_batch_size_schedule,
    }
    changing = [option for option, given in schedules.items() if given]
    if changing:
        raise UserError(
            f"BALANCE_COST=true needs steps of one size, and {changing[0]} changes it; leave one of them out"
        )
    frozen = frozen_parts(arguments)
    units = Work(tokens=1), Work(pairs=1), Work(images=1)
    return RecordCost(*(step_flop(geometry, frozen, unit) for unit in units))


def refuse(error: UserError) -> None:
    """Print the one sentence and exit with code 2; rank 0 alone speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
