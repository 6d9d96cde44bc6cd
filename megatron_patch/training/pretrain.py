"""A run from its command line to Megatron's pretrain()."""

import gc
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_patch import device, patches
from megatron_patch.arguments import add_arguments
from megatron_patch.atomic_files import atomic_folder, write_text
from megatron_patch.errors import UserError
from megatron_patch.launch import processes, run_file
from megatron_patch.llava_folder import TEMPLATE, TRAINING, LlavaFolder
from megatron_patch.object_storage import StorageError
from megatron_patch.patches.touch_points import LOOP, wrap
from megatron_patch.step_flop import Frozen
from megatron_patch.training.adapters import with_base
from megatron_patch.training.config import RunConfig, frozen_parts, has_checkpoint, read_config, refuse
from megatron_patch.training.loader_state import DATA_FOLDER

if TYPE_CHECKING:
    from megatron_patch.model.llava import LlavaModel

# Of a LLaVA folder given with `none` only configs and tokenizer are taken; untrained_tower.safetensors is no match.
WEIGHT_FILES = ("model*.safetensors", "*.index.json", "*.bin", "*.pt")


def _silence_known_warnings() -> None:
    # Each says that Apex or Transformer Engine is absent, which the device room has decided already.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer-engine).*")
    warnings.filterwarnings("ignore", message=".*It is recommended to use a ModelConfig.*")


def _save_llava_folder(settings: RunConfig, save: str | None) -> None:
    """Configs, tokenizer and what is trained with beside the checkpoints to come, whole or not at all."""
    if save is None:
        return
    source, target = settings.llava_folder.path, LlavaFolder.of(save).path
    if target.resolve() == source.resolve() or (target.exists() and has_checkpoint(Path(save))):
        LlavaFolder(target).write_training_settings(settings.trained_with)  # a run of before they were saved has none
        return
    shutil.rmtree(target, ignore_errors=True)  # of a start that saved no checkpoint
    with atomic_folder(target) as folder:
        left_out = shutil.ignore_patterns(*WEIGHT_FILES, TRAINING, f"{TEMPLATE}.*")
        shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)
        LlavaFolder(folder).write_training_settings(settings.trained_with)
        if settings.lora is not None:
            LlavaFolder(folder).write_lora(settings.lora)


def _save_run_file(output: Path | None) -> None:
    """The launcher's values, from which the run can be started again."""
    if output is not None and (text := os.environ.get(run_file.VARIABLE)):
        write_text(output / run_file.FILE, json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n")


def model_builder(settings: RunConfig, frozen: Frozen) -> Callable[..., "LlavaModel"]:
    """What Megatron calls for each (virtual) stage of this rank, once its parser has run."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.global_vars import get_args

    from megatron_patch.model.llava import LlavaModel

    def build_llava(
        pre_process: bool, post_process: bool, vp_stage=None, config=None, pg_collection=None
    ) -> LlavaModel:
        args = get_args()
        config = config or core_transformer_config_from_args(args)
        config.variable_seq_lengths = True  # batches are as long as their longest record
        return LlavaModel(
            config,
            settings.geometry,
            args.padded_vocab_size,
            settings.data.image_mean,
            settings.pixel_std,
            frozen,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            tower_recompute=args.vision_tower_recompute,
            seed=args.seed,
            tower_for_text=args.fsdp != "false",
        )

    return build_llava


def train_llava() -> None:
    """Train as sys.argv says.  Exits with code 2 and one sentence when the arguments do not fit."""
    try:
        settings = read_config(sys.argv[1:])
        patches.check(device.backend().NAME)
    except UserError as error:
        refuse(error)
    if settings.warning and os.environ.get("RANK", "0") == "0":
        print(settings.warning, file=sys.stderr, flush=True)
    sys.argv[1:] = settings.megatron_arguments
    _silence_known_warnings()
    patches.apply_all(device.backend().NAME)

    import torch
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import get_args

    from megatron_patch.data.loading.loader import TrainLoader
    from megatron_patch.patches.ended_writer import WriterEndedError
    from megatron_patch.training.benchmark_scores import BenchmarkScores
    from megatron_patch.training.callbacks import install_safeguards, reporting
    from megatron_patch.training.data_provider import build_loaders
    from megatron_patch.training.ema import track_ema
    from megatron_patch.training.forward_step import forward_step
    from megatron_patch.training.fresh_optimizer import keep_schedule
    from megatron_patch.training.parameter_groups import keep_typed, read_overrides, with_modules
    from megatron_patch.training.strict_load import strict

    loaders = []  # this process's training iterator, once Megatron has asked for it

    def train_loader() -> TrainLoader | None:
        return loaders[0].loader if loaders and loaders[0] else None

    def provide_loaders(_: list[int], vp_stage: int | None = None) -> tuple:
        if torch.distributed.get_rank() == 0:
            _save_llava_folder(settings, get_args().save)
            _save_run_file(get_args().output_path)
        train, valid, test = build_loaders(settings, vp_stage)
        loaders.append(train)
        return train, valid, test

    processes.wait_for_check()  # what takes long is imported by now, and nothing is created yet
    gc.freeze()  # nor will imports ever be garbage
    gc.enable()
    torch.serialization.set_crc32_options(False)  # no reader of a checkpoint looks at it, and it is a sixth of a save
    args = parse_and_validate_args(add_arguments)
    benchmark = settings.benchmark and BenchmarkScores(settings.benchmark, args.output_path)
    frozen = frozen_parts(args)
    if args.save:
        args.dataloader_save = str(
            Path(args.save) / DATA_FOLDER
        )  # Megatron saves the loaders' state with each checkpoint
    # The order of these lines is that of the layers, as TOUCH_POINTS lists them: innermost first.
    wrap(LOOP, "load_checkpoint", "training.strict_load", strict)
    if settings.lora is not None:
        base = Path(args.init_from) / settings.lora.iteration
        wrap(LOOP, "load_checkpoint", "training.adapters", with_base(base, args.lora_adapter))
    wrap(LOOP, "load_checkpoint", "training.parameter_groups", keep_typed)
    wrap(LOOP, "load_checkpoint", "training.fresh_optimizer", keep_schedule)
    wrap(
        LOOP,
        "get_standard_config_overrides",
        "training.parameter_groups",
        lambda standard: with_modules(standard, lambda: read_overrides(get_args())),
    )
    track_ema(args)
    settle = install_safeguards(args, benchmark)
    try:
        with reporting(settings, args, frozen, train_loader, benchmark) as hooks:
            training.pretrain(
                pretrain_cfg_container_from_args(args),
                provide_loaders,
                ModelType.encoder_or_decoder,
                forward_step,
                model_provider=model_builder(settings, frozen),
                **hooks,
            )
    except UserError as error:  # another model's checkpoint; a resume on other data, too many unusable records
        refuse(error)
    except (StorageError, WriterEndedError) as error:  # after all patience; every rank speaks, others may do well
        sys.exit(f"error: rank {args.rank}: {error}; the same command goes on from the last checkpoint")
    finally:
        settle()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
