"""LORA_RANK: the base of a run of adapters, read at every start, and adapters of peft to begin with."""

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_patch.checkpoint_files import checkpoint_format, fingerprint, newest_iteration
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.lora import PARTS, PEFT_CONFIG, PEFT_WEIGHTS, LoraConfig, LoraRecord, hub_path, weight_name
from megatron_patch.weight_names import check_nothing_differs, differences

if TYPE_CHECKING:
    import torch

    from megatron_patch.model.llava import LlavaModel

# Fields of peft's configuration whose adapters compute something else.
NOT_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "trainable_token_indices")


def lora_of(arguments: argparse.Namespace) -> LoraConfig | None:
    """The adapters that our own arguments ask for; None: none."""
    return LoraConfig.asked(
        arguments.lora_rank,
        arguments.lora_alpha,
        arguments.lora_dropout,
        arguments.lora_targets,
        arguments.lora_parts,
        arguments.lora_rslora,
    )


def read_record(arguments: argparse.Namespace, folder: LlavaFolder, resumed: bool) -> LoraRecord | None:
    """What this run's checkpoints will say of their adapters; None: it trains whole weights.

    Args:
        arguments: of config.parse_own_arguments().
        folder: the llava/ folder of the checkpoint that is resumed or started from.

    Raises:
        UserError: the base is no checkpoint of whole weights, or a resumed run was started with other adapters or on
            another base.
    """
    lora = lora_of(arguments)
    saved = folder.lora if resumed else None
    if lora is None:
        if saved is not None:
            raise UserError(
                f"{arguments.load} holds adapters, and LORA_RANK is 0; set LORA_RANK={saved.config.rank} to go on with "
                "them, or name a new OUTPUT_BASEPATH"
            )
        return None
    if resumed and saved is None:
        raise UserError(
            f"{arguments.load} holds whole weights, and LORA_RANK is {lora.rank}; set LORA_RANK=0 to go on with them, "
            "or name a new OUTPUT_BASEPATH"
        )
    if arguments.load is None:
        raise UserError("LORA_RANK needs --load: with a checkpoint's folder the base is read")
    if saved is not None:
        told = "; ".join(
            f"LORA_{field.name.upper()} is {lora.spelled(field.name)}, wanted {saved.config.spelled(field.name)}"
            for field in dataclasses.fields(LoraConfig)
            if getattr(lora, field.name) != getattr(saved.config, field.name)
        )
        if told:
            raise UserError(
                f"{arguments.load}: the run cannot be resumed with other adapters than it was started with ({told}); "
                "set what is wanted, or name a new OUTPUT_BASEPATH"
            )
    trained = tuple(part for part in PARTS if part not in lora.parts and not getattr(arguments, f"freeze_{part}"))
    if saved is not None and saved.trained != trained:
        raise UserError(
            f"{arguments.load}: beside adapters it holds the weights of {' '.join(saved.trained) or 'no part'}, and "
            f"this run trains those of {' '.join(trained) or 'no part'}; set FREEZE_ as it was, or name a new "
            "OUTPUT_BASEPATH"
        )
    base = Path(arguments.init_from)
    iteration = base / saved.iteration if saved else newest_iteration(base)
    if checkpoint_format(iteration) is None:
        raise UserError(f"PRETRAIN_CHECKPOINT_PATH {base}: has no {iteration.name}, the base of {arguments.load}")
    # seconds of reading for a large model: rank 0 alone looks, and ends the run for all
    looks = os.environ.get("RANK", "0") == "0"
    sha256 = fingerprint(iteration) if looks else saved.sha256 if saved else ""
    if saved is not None and sha256 != saved.sha256:
        raise UserError(
            f"PRETRAIN_CHECKPOINT_PATH {base}: its {iteration.name} is not the base that the adapters in "
            f"{arguments.load} were trained on, which was {saved.iteration} of {saved.base} (SHA-256 "
            f"{saved.sha256[:12]}..., this one {sha256[:12]}...); pass that one"
        )
    return LoraRecord(lora, trained, str(base.absolute()), iteration.name, sha256)


# ---------------------------------------------------------------- weights


def load_whole(model: list["LlavaModel"], iteration: Path) -> str:
    """Read all weights but adapters from an iteration's folder into the parts of a model.

    Returns:
        One line: how many weights came from where.
    Raises:
        UserError: on every rank alike: weights are missing, unknown or of another shape.
    """
    from megatron.core import dist_checkpointing

    from megatron_patch.training.strict_load import check_checkpoint, content_metadata, read_rank_weights

    told = check_checkpoint(model, iteration.parent, iteration.name, base=True)
    if checkpoint_format(iteration) == "torch":
        (part,) = model  # check_checkpoint refuses an interleaved pipeline
        part.load_state_dict(read_rank_weights(iteration))
        return told
    metadata = content_metadata(iteration)
    for part in model:
        wanted = {"model": part.base_sharded_state_dict(metadata)}
        part.load_state_dict(dist_checkpointing.load(wanted, str(iteration))["model"])
    return told


def load_adapters(model: "LlavaModel", checkpoint: Path) -> None:
    """Read what a checkpoint of adapters holds, those and other trained weights, from its newest iteration.

    Raises:
        UserError: as load_whole().
    """
    from megatron.core import dist_checkpointing

    from megatron_patch.training.strict_load import check_checkpoint, content_metadata

    check_checkpoint([model], checkpoint)
    iteration = newest_iteration(checkpoint)
    wanted = {"model": model.sharded_state_dict(metadata=content_metadata(iteration))}
    model.load_state_dict(dist_checkpointing.load(wanted, str(iteration))["model"])


def with_base(base: Path, peft: Path | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap Megatron's load_checkpoint(model, optimizer, scheduler, ...): the base first, then what is resumed.

    Args:
        base: folder of its iteration.
        peft: folder of the adapters to begin with; None: they are new.
    """

    def wrap(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def load(ddp_model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            from megatron.core.utils import unwrap_model
            from megatron.training import get_args
            from megatron.training.utils import print_rank_0

            model = unwrap_model(ddp_model)
            print_rank_0(load_whole(model, base))
            result = load_checkpoint(ddp_model, optimizer, *args, **kwargs)
            if result[0] > 0:
                return result
            if peft is not None:
                for part in model:
                    load_peft(part, peft)
            settings = get_args()
            if optimizer is not None and (settings.fp16 or settings.bf16):
                optimizer.reload_model_params()  # the copies in 32 bits of what has just been read
            print_rank_0(f"adapters: {f'from {peft}' if peft else 'new, and add nothing yet'}")
            return result

        return load

    return wrap


# ---------------------------------------------------------------- peft's folder


def check_peft(folder: Path, lora: LoraConfig, geometry: LlavaGeometry) -> None:
    """Refuse a folder of peft whose adapters are not those that the run asks for.  Raises UserError."""
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"LORA_ADAPTER {folder}: it has no {name}; wanted a folder that peft has saved")
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        found = {"rank": config["r"], "alpha": config["lora_alpha"], "rslora": bool(config.get("use_rslora"))}
        strange = [name for name in NOT_PLAIN if config.get(name)]
        if config["peft_type"] != "LORA" or config.get("bias", "none") != "none":
            strange.append(f"peft_type {config['peft_type']}, bias {config.get('bias')}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"LORA_ADAPTER {folder}: its {PEFT_CONFIG} cannot be read ({error!r}); save it again") from None
    if strange:
        raise UserError(f"LORA_ADAPTER {folder}: it has {', '.join(strange)}; wanted plain LoRA without biases")
    for name, got in found.items():
        if getattr(lora, name) != got:
            told = f"{got:g}" if not isinstance(got, bool) else str(got).lower()
            raise UserError(
                f"LORA_ADAPTER {folder}: its {name} is {told}, the run's {lora.spelled(name)}; "
                f"set LORA_{name.upper()}={told}"
            )
    given = {name: value.shape for name, value in read_peft(folder, geometry).items() if ".lora_" in name}
    check_nothing_differs(
        f"LORA_ADAPTER {folder} does not hold the adapters that the run asks for; set LORA_TARGETS and LORA_PARTS to "
        "what it holds",
        differences(given, lora.shapes(geometry), "the run asks for"),
    )


def read_peft(folder: Path, geometry: LlavaGeometry) -> dict[str, "torch.Tensor"]:
    """Name in LlavaModel -> whole tensor of a folder that peft has saved; tensors that fit nothing keep theirs.

    peft's names begin as the model around the layers is called, which differs from version to version of transformers.
    """
    from safetensors.torch import load_file

    everything = LoraConfig(1, 1.0, parts=tuple(PARTS))
    places = {
        (part == "vision_tower", hub_path(geometry, part, layer, one)): (part, layer, one)
        for part, layer, one in everything.places(geometry)
    }
    found = {}
    for name, value in load_file(folder / PEFT_WEIGHTS).items():
        ours = name
        if match := re.search(r"((?:layers\.\d+|multi_modal_projector)\..+)\.lora_([AB])\.weight$", name):
            place = places.get(("vision_tower" in name, match[1]))
            ours = weight_name(*place, match[2]) if place else name
        elif match := re.search(r"multi_modal_projector\.linear_([12])\.(weight|bias)$", name):
            ours = f"{PARTS['projector']}.encoder.linear_fc{match[1]}.{match[2]}"
        found[ours] = value
    return found


def load_peft(part: "LlavaModel", folder: Path) -> None:
    """Copy this rank's part of peft's matrices, and of a projector that was saved with them, into the model."""
    import torch

    from megatron_patch.model.fully_sharded import local_part, piece_of

    rank = part.pg_collection.tp.rank()
    given = read_peft(folder, part.geometry)
    with torch.no_grad():
        for name, weight in part.named_parameters():
            if name not in given:
                continue
            value = given[name]
            for axis, own in enumerate(weight.shape):
                if value.shape[axis] != own:
                    value = value.narrow(axis, rank * own, own)
            local_part(weight).copy_(piece_of(weight, value))
