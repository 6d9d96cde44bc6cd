"""The rules that hold between the arguments of a training run, and between them and its checkpoint.

Each is written once, over values by name as they are typed.  The launchers look at them before anything is started,
and the run itself looks again (training/config.py), whoever started it: words behind the arguments may have changed
what is meant.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.launch import run_file
from megatron_patch.launch.machine import Job, choose_job
from megatron_patch.launch.rows import Call
from megatron_patch.launch.rules import (
    ITERATIONS,
    MODEL_PARTS,
    NAMES,
    TRACKER,
    existing_part,
    grid,
    newest_iteration,
)
from megatron_patch.launch.stored_data import data_problems, splits_in
from megatron_patch.llava_folder import ANY_RESOLUTION, LlavaFolder
from megatron_patch.lora import LoraConfig
from megatron_patch.memory import Sizes, checkpoint_bytes, rank_memory
from megatron_patch.model_sizes import check_model_size
from megatron_patch.step_flop import Frozen
from megatron_patch.tile_plan import TilePlan, fixed_tiles, whole_image

Values = Mapping[str, str]
Findings = Iterator[tuple[str, str]]  # name of the argument that is wrong, and what it must be
Rule = Callable[[Values], Findings]

RULES: list[tuple[tuple[str, ...], Rule]] = []  # names that must be right by themselves, and the rule
MODEL_RULES: list[tuple[tuple[str, ...], Callable[[Values, LlavaFolder, LlavaGeometry], Findings]]] = []


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.append((names, rule))
        return rule

    return add


def _model_rule(*names: str) -> Callable:
    def add(rule: Callable) -> Callable:
        MODEL_RULES.append((names, rule))
        return rule

    return add


def violations(values: Values, wrong: Callable[[str], bool] = lambda name: False) -> Findings:
    """What breaks a rule.

    Args:
        values: as they are typed; rules about others are passed over.
        wrong: is a value wrong by itself?  Then rules about it say nothing.
    """
    for names, rule in RULES:
        if all(name in values and not wrong(name) for name in names):
            yield from rule(values)


def model_violations(
    values: Values, folder: LlavaFolder, wrong: Callable[[str], bool] = lambda name: False
) -> Findings:
    """What does not fit the model whose llava/ folder this is.  Raises UserError: its configuration cannot be read."""
    geometry = folder.geometry()
    for names, rule in MODEL_RULES:
        if all(values.get(name) and not wrong(name) for name in names):
            yield from rule(values, folder, geometry)


# ---------------------------------------------------------------- between arguments


@_rule("LR", "MIN_LR")
def _lowest_rate(values: Values) -> Findings:
    if float(values["MIN_LR"]) > float(values["LR"]):
        yield "MIN_LR", f"must be at most LR={values['LR']}"


NOT_WITH_FSDP = (
    ("PP", "1", "a pipeline's stages are not shared out; use TP or CP beside it"),
    ("DO", "false", "the weights' pieces have their optimizer state with them already"),
    ("OPTIMIZER_OFFLOAD", "false", "that is the distributed optimizer's"),
    ("EMA_DECAY", "0", "the average is of whole weights"),
    ("SAMPLE_ANSWERS", "0", "the weights are together within a step alone"),
    ("EVAL_BENCHMARK", "", "the weights are together within a step alone"),
    ("ASYNC_SAVE", "false", "it has not been tried"),
    ("SAVE_OPTIM", "true", "it has not been tried"),
    ("LOAD_OPTIM", "true", "it has not been tried"),
    ("FEATURE_CACHE", "", "ranks with images and ranks without would ask for the tower's weights in different steps"),
)


@_rule("FSDP")
def _fsdp(values: Values) -> Findings:
    """Not beside what Megatron's own parser refuses with it, and what would look at weights outside of a step."""
    if values["FSDP"] == "false":
        return
    for name, right, why in NOT_WITH_FSDP:
        if values.get(name, right) != right:
            yield name, f"must be {right or 'unset'} with FSDP={values['FSDP']}: {why}"


LORA_DEFAULTS = {"LORA_ALPHA": "", "LORA_DROPOUT": "0", "LORA_TARGETS": "all", "LORA_PARTS": "language_model"}
LORA_DEFAULTS |= {"LORA_RSLORA": "false", "LORA_ADAPTER": ""}


@_rule("LORA_RANK", *LORA_DEFAULTS)
def _adapters(values: Values) -> Findings:
    if values["LORA_RANK"] == "0":
        for name, default in LORA_DEFAULTS.items():
            if values[name] != default:
                yield name, "needs LORA_RANK above 0, the rank of the adapters"


@_rule("LORA_RANK", "PRETRAIN_CHECKPOINT_PATH")
def _base(values: Values) -> Findings:
    if values["LORA_RANK"] != "0" and values["PRETRAIN_CHECKPOINT_PATH"] == "none":
        yield "LORA_RANK", "needs a checkpoint as PRETRAIN_CHECKPOINT_PATH: adapters stand beside its weights"


@_rule("LORA_RANK", "LORA_PARTS", "FEATURE_CACHE")
def _adapted_tower(values: Values) -> Findings:
    if values["LORA_RANK"] != "0" and values["FEATURE_CACHE"] and "vision_tower" in values["LORA_PARTS"]:
        yield "FEATURE_CACHE", "is not for LORA_PARTS with vision_tower: its adapters change the features at every step"


@_rule("FSDP", "PR", "AC")
def _fsdp_in_memory(values: Values) -> Findings:
    if values["FSDP"] != "false":
        if values["PR"] in ("fp16", "fp8"):
            yield "PR", f"must be bf16 or fp32 with FSDP={values['FSDP']}: nothing else has been tried with it"
        if values["AC"] == "offload":
            yield "AC", f"must not be offload with FSDP={values['FSDP']}: it has not been tried"


@_rule("PACKING", "DATA_ORDER", "BALANCE_COST")
def _packed_rows(values: Values) -> Findings:
    if values["PACKING"] == "true":
        why = "is not for PACKING=true: packed rows are all of one length"
        if values["DATA_ORDER"] in ("modality", "modality_window"):
            yield "DATA_ORDER", why
        if values["BALANCE_COST"] == "true":
            yield "BALANCE_COST", why


@_rule("TRAIN_ITERS", "LR_WARMUP_ITERS")
def _warm_up(values: Values) -> Findings:
    if int(values["LR_WARMUP_ITERS"]) >= int(values["TRAIN_ITERS"]):
        yield "LR_WARMUP_ITERS", f"must be less than TRAIN_ITERS={values['TRAIN_ITERS']}"


@_rule("PRETRAIN_CHECKPOINT_PATH", "TOKENIZER_PATH")
def _tokenizer(values: Values) -> Findings:
    from_nothing = values["PRETRAIN_CHECKPOINT_PATH"] == "none"
    if from_nothing and not values["TOKENIZER_PATH"]:
        yield (
            "PRETRAIN_CHECKPOINT_PATH",
            "needs TOKENIZER_PATH in the environment: a folder with LLaVA configuration and tokenizer",
        )
    elif values["TOKENIZER_PATH"] and not from_nothing:
        yield "TOKENIZER_PATH", "is only for PRETRAIN_CHECKPOINT_PATH=none: a checkpoint brings its own tokenizer"


@_rule("DO", "OPTIMIZER_OFFLOAD")
def _offload(values: Values) -> Findings:
    if values["OPTIMIZER_OFFLOAD"] != "false" and values["DO"] != "true":
        yield "OPTIMIZER_OFFLOAD", "needs DO=true: only the distributed optimizer can keep its state in host memory"


@_rule("PP", "FIRST_STAGE_LAYERS", "VIRTUAL_STAGES")
def _stages(values: Values) -> Findings:
    if values["PP"] == "1":
        if values["FIRST_STAGE_LAYERS"]:
            yield "FIRST_STAGE_LAYERS", "needs PP above 1"
        if values["VIRTUAL_STAGES"] != "1":
            yield "VIRTUAL_STAGES", "needs PP above 1"


@_rule("KEEP_BEST", "EVAL_ITERS")
def _best(values: Values) -> Findings:
    if values["KEEP_BEST"] == "true" and values["EVAL_ITERS"] == "0":
        yield "KEEP_BEST", "needs EVAL_ITERS above 0: without validation none is the best"


@_rule("SPIKE_FACTOR")
def _spikes(values: Values) -> Findings:
    if 0 < float(values["SPIKE_FACTOR"]) <= 1:
        yield "SPIKE_FACTOR", "must be 0 or above 1: at 1 half of all losses would be bad"


@_rule("SAVE_OPTIM", "LOAD_OPTIM", "ON_BAD_LOSS", "MAX_RESTARTS")
def _whole_restarts(values: Values) -> Findings:
    again = [name for name, ends in (("ON_BAD_LOSS", "stop skip"), ("MAX_RESTARTS", "0")) if values[name] not in ends]
    for name in ("SAVE_OPTIM", "LOAD_OPTIM"):
        if again and values[name] == "false":
            told = " and ".join(f"{one}={values[one]}" for one in again)
            yield (
                name,
                f"must be true with {told}: a run that starts again by itself would lose Adam's moments each time",
            )


@_rule("ENV", "MAX_RESTARTS")
def _restarts(values: Values) -> Findings:
    if values["MAX_RESTARTS"] != "0" and values["ENV"] in ("dlc", "multinode"):
        yield (
            "MAX_RESTARTS",
            f"is not for ENV={values['ENV']}: what started the nodes starts them again (restartPolicy of Kubernetes, "
            "or you, with the same command on all), and the run goes on from its last checkpoint",
        )


@_rule("SAMPLE_ANSWERS", "EVAL_ITERS")
def _answers(values: Values) -> Findings:
    if values["SAMPLE_ANSWERS"] != "0" and values["EVAL_ITERS"] == "0":
        yield "SAMPLE_ANSWERS", "needs EVAL_ITERS above 0: the model answers at validations"


@_rule("EVAL_BENCHMARK", "EVAL_BENCHMARK_DATA", "EVAL_ITERS", "BEST_BY")
def _benchmark(values: Values) -> Findings:
    if values["EVAL_BENCHMARK"]:
        if not values["EVAL_BENCHMARK_DATA"]:
            yield "EVAL_BENCHMARK", "needs EVAL_BENCHMARK_DATA, its files"
        if values["EVAL_ITERS"] == "0":
            yield "EVAL_BENCHMARK", "needs EVAL_ITERS above 0: it is asked at validations"
        return
    if values["EVAL_BENCHMARK_DATA"]:
        yield "EVAL_BENCHMARK_DATA", "needs EVAL_BENCHMARK, its name"
    if values["BEST_BY"] == "score":
        yield "BEST_BY", "needs EVAL_BENCHMARK, which gives the score"


@_rule("PROFILE", "TRAIN_ITERS")
def _profile(values: Values) -> Findings:
    if values["PROFILE"] and ITERATIONS.parse(values["PROFILE"])[1] > int(values["TRAIN_ITERS"]):
        yield "PROFILE", f"must end by TRAIN_ITERS={values['TRAIN_ITERS']}"


@_rule("TP", "CP", "DECODER_SEQ_LEN")
def _slices(values: Values) -> Findings:
    tensor, context = int(values["TP"]), int(values["CP"])
    # context parallelism gives every rank two slices, sequence parallelism cuts them
    slices = tensor * context * (2 if context > 1 and tensor % 2 else 1)
    if int(values["DECODER_SEQ_LEN"]) % slices:
        yield "DECODER_SEQ_LEN", f"must be divisible by {slices}: TP={tensor} and CP={context} cut the sequence"


@_rule("SEQ_LEN", "DECODER_SEQ_LEN", "IMAGE_TILES", "PRETRAIN_CHECKPOINT_PATH")
def _room_for_text(values: Values) -> Findings:
    image, what = int(values["SEQ_LEN"]), f"SEQ_LEN={values['SEQ_LEN']}"
    columns, rows = grid(values["IMAGE_TILES"]) or _tiles_of(values["PRETRAIN_CHECKPOINT_PATH"])
    if columns * rows > 1:
        image *= columns * rows + 1
        what = f"{image}, SEQ_LEN={values['SEQ_LEN']} for each of {columns * rows} tiles and the thumbnail"
    if int(values["DECODER_SEQ_LEN"]) <= image:
        yield "DECODER_SEQ_LEN", f"must be more than {what}: it counts the image tokens and the text"


def _tiles_of(checkpoint: str) -> tuple[int, int]:
    """With which a checkpoint was trained."""
    try:
        settings = LlavaFolder.of(checkpoint).training_settings if checkpoint != "none" else None
    except UserError:
        settings = None  # which the rules about the model say
    return settings.image_tiles if settings else (1, 1)


@_rule("DATASET_PATH", "VALID_DATASET_PATH", "EVAL_ITERS")
def _splits(values: Values) -> Findings:
    for name, (path, split) in _wanted_splits(values).items():
        found = splits_of(path)
        if found is not None and split not in found:
            yield name, f"must have the split {split} (its .nv-meta/split.yaml has {', '.join(found) or 'none'})"


def _wanted_splits(values: Values) -> dict[str, tuple[str, str]]:
    """{argument: (dataset, split)} of what is read."""
    wanted = {"DATASET_PATH": "train"} | ({"VALID_DATASET_PATH": "val"} if values["EVAL_ITERS"] != "0" else {})
    return {name: (values[name], split) for name, split in wanted.items()}


def splits_of(dataset: str) -> list[str] | None:
    """Splits with shards of an energon folder, as its split.yaml names them; None: they cannot be told from it."""
    try:
        return splits_in(Path(dataset, ".nv-meta", "split.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None  # in object storage, too: that is looked at once, in check_training


# ---------------------------------------------------------------- between arguments and the model


@_model_rule("MODEL_SIZE")
def _model_size(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    try:
        check_model_size(values["MODEL_SIZE"], geometry.language.parameters)
    except UserError as error:
        yield "MODEL_SIZE", f"must be that of the checkpoint: {error}"


@_model_rule("SEQ_LEN")
def _image_tokens(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    tower = geometry.tower
    if int(values["SEQ_LEN"]) != tower.image_tokens:
        yield (
            "SEQ_LEN",
            f"must be {tower.image_tokens}: so many tokens the checkpoint's vision tower makes of an image "
            f"({tower.side_px} px in patches of {tower.patch_px})",
        )


def _sees_any_resolution(values: Values, folder: LlavaFolder) -> bool:
    aspect = values["IMAGE_ASPECT_RATIO"]
    return (folder.settings.image_aspect_ratio if aspect == "auto" else aspect) == ANY_RESOLUTION


@_model_rule("IMAGE_ASPECT_RATIO", "IMAGE_TILES")
def _any_resolution(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    if not _sees_any_resolution(values, folder):
        return
    if geometry.any_resolution is None:
        yield (
            "IMAGE_ASPECT_RATIO",
            f"must be crop, pad or stretch: a {geometry.model_type} model has no rule for images of any resolution; "
            "convert one with MODEL_KIND=llava_next",
        )
    elif (grid(values["IMAGE_TILES"]) or (1, 1)) != (1, 1):
        yield "IMAGE_TILES", f"must be 1x1 with IMAGE_ASPECT_RATIO={ANY_RESOLUTION}, which cuts tiles of its own"


@_model_rule("IMAGE_ASPECT_RATIO", "FEATURE_CACHE")
def _no_cache_of_tiles(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    if _sees_any_resolution(values, folder):
        yield "FEATURE_CACHE", f"is not for IMAGE_ASPECT_RATIO={ANY_RESOLUTION}: its files hold one tile of an image"


@_model_rule("TP", "PP")
def _parallel(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    pipeline = int(values["PP"])
    several = pipeline > 1  # else the options of pipelines are refused by themselves
    first = int(values.get("FIRST_STAGE_LAYERS") or 0) if several else 0
    virtual = int(values.get("VIRTUAL_STAGES") or 1) if several else 1
    yield from geometry.uncut(int(values["TP"]), pipeline, first or None, virtual)


@_model_rule("PRETRAIN_CHECKPOINT_PATH")
def _whole_weights(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    if folder.lora is not None:
        yield (
            "PRETRAIN_CHECKPOINT_PATH",
            "must hold whole weights, and it holds adapters: export it (EXPORT_LAYOUT=hub merges them) and convert "
            "that; or go on with it by the OUTPUT_BASEPATH of its run",
        )


@_model_rule("FSDP")
def _untied(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    if values["FSDP"] != "false" and geometry.language.tied_embeddings:
        yield "FSDP", "is not for this model, whose head is its embedding: use DO=true, TP or PP"


@_model_rule("LORA_RANK", "LORA_TARGETS", "LORA_PARTS")
def _adapter_targets(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    lora = lora_of(values)
    if lora is not None and (problem := lora.problem(geometry)):
        yield f"LORA_{problem[0].upper()}", problem[1]


@_model_rule("DECODER_SEQ_LEN")
def _positions(values: Values, folder: LlavaFolder, geometry: LlavaGeometry) -> Findings:
    if text := geometry.language.too_long(int(values["DECODER_SEQ_LEN"])):
        yield "DECODER_SEQ_LEN", text


# ---------------------------------------------------------------- a call of the launchers


def check_training(call: Call, is_stage_2: bool) -> Job | None:
    """Complain of all that does not fit together; the job, when it can be told."""

    def wrong(name: str) -> bool:
        return not call.right(name)

    for name, text in violations(call, wrong):
        call.refuse(name, text)
    _check_model(call, wrong, is_stage_2)
    _check_output(call)
    if call.right("DATASET_PATH", "VALID_DATASET_PATH", "EVAL_ITERS"):
        for name, text in data_problems(_wanted_splits(call)):
            call.refuse(name, text)
    named = call["WANDB_PROJECT"] or call["WANDB_NAME"]
    if named and call.environment.get("WANDB_MODE") != "disabled" and not wandb_wanted(call.environment):
        call.complain(
            "environment WANDB_PROJECT or WANDB_NAME",
            "needs WANDB_API_KEY in the environment, a key from `wandb login`, or WANDB_MODE=offline",
        )
    if not call.right("TP", "PP", "CP"):
        return None
    model_parallel = call.int("TP") * call.int("PP") * call.int("CP")
    job = choose_job(call, model_parallel)
    if job is not None:
        _check_device(call, job)
        _check_sizes(call, job, model_parallel)
        # what a checkpoint takes follows from the rest; a dry run may be for another machine
        if call["DRY_RUN"] == "0" and call.is_right:
            _check_disk(call, job)
            _tell_memory(call, job)
        if call.is_right:
            _tell_photo(call)
    return job


def wandb_wanted(environment: Mapping[str, str]) -> bool:
    """Is there a key for W&B, which is never passed on as an argument, or is it to write files only?

    A key that `wandb login` left in the netrc file counts where a project or name is given: W&B is not told unasked.
    """
    mode = environment.get("WANDB_MODE")
    if mode == "disabled":
        return False
    named = environment.get("WANDB_PROJECT") or environment.get("WANDB_NAME")
    return bool(environment.get("WANDB_API_KEY") or mode == "offline" or (named and _has_login(environment)))


def _has_login(environment: Mapping[str, str]) -> bool:
    service = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0]
    file = environment.get("NETRC") or os.path.join(environment.get("HOME", "/"), ".netrc")
    try:
        words = Path(file).read_text(errors="replace").split()
    except OSError:
        return False
    return any(pair == ("machine", service) for pair in itertools.pairwise(words))


def _check_model(call: Call, wrong: Callable[[str], bool], is_stage_2: bool) -> None:
    """The arguments against the llava/ folder that the run begins with."""
    if wrong("PRETRAIN_CHECKPOINT_PATH") or wrong("TOKENIZER_PATH"):
        return
    start, folder = call["PRETRAIN_CHECKPOINT_PATH"], _folder_of(call)
    origin = "TOKENIZER_PATH" if start == "none" else "PRETRAIN_CHECKPOINT_PATH"
    try:
        size = folder.provenance.get("arguments", {}).get("model_size")
        if size and not wrong("MODEL_SIZE") and size != call["MODEL_SIZE"]:
            call.refuse("MODEL_SIZE", f"must be {size}: with that {origin} was converted")
        for name, text in model_violations(call, folder, wrong):
            call.refuse(name, text)
    except (UserError, json.JSONDecodeError) as error:
        call.refuse(origin, f"holds a model that cannot be read: {error}")
        return
    if is_stage_2 and not _resumes(call) and "--allow-fresh-projector" not in call.rest and projector_is_fresh(start):
        call.refuse("PRETRAIN_CHECKPOINT_PATH", FRESH_PROJECTOR)


FRESH_PROJECTOR = (
    "has a new projector, which no stage 1 has trained; start from the checkpoint of stage 1, or pass "
    "--allow-fresh-projector after the 23rd argument"
)


def projector_is_fresh(checkpoint: str) -> bool:
    """Is this the converter's output with a projector that no training has seen?"""
    if checkpoint == "none" or newest_iteration(checkpoint) != "release":
        return False
    return LlavaFolder.of(checkpoint).provenance.get("projector", {}).get("origin") == "new"


def _resumes(call: Call) -> bool:
    """Is there a checkpoint in the output folder, with which the run goes on?"""
    return call.right("OUTPUT_BASEPATH") and os.path.isfile(
        os.path.join(call["OUTPUT_BASEPATH"], "checkpoint", TRACKER)
    )


def _check_output(call: Call) -> None:
    """A run is resumed from its own folder alone: another stage's or another model's is not continued silently."""
    before = run_file.read_run(call["OUTPUT_BASEPATH"]) if _resumes(call) else None
    if before is None:
        return
    now = {
        run_file.LAUNCHER: os.path.basename(call.program),
        "MODEL_SIZE": call["MODEL_SIZE"],
        "PRETRAIN_CHECKPOINT_PATH": call.absolute("PRETRAIN_CHECKPOINT_PATH"),
    }
    for name, value in now.items():
        was = before.get(name)
        moved = name == "PRETRAIN_CHECKPOINT_PATH" and was != "none" and not os.path.exists(str(was))
        if was is not None and was != value and not moved:
            call.refuse(
                "OUTPUT_BASEPATH",
                f"holds another run, with {name}={was}; name a new folder, or set what that run had (its "
                f"{run_file.FILE}) to go on with it",
            )
            return


def _check_disk(call: Call, job: Job) -> None:
    """Room for two checkpoints, as a new one is whole before the old one goes; a run that goes on has one already."""
    count, what = (1, "a checkpoint") if _resumes(call) else (2, "two checkpoints")
    wanted = count * checkpoint_bytes(*model_of(call), call["PR"], call["SAVE_OPTIM"] == "true")
    place = existing_part(call["OUTPUT_BASEPATH"])
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    if free < wanted:
        call.refuse(
            "OUTPUT_BASEPATH",
            f"must have room for {what}, {wanted / 1e9:.1f} GB ({place} has {free / 1e9:.1f} GB); "
            "name a folder on another disk",
        )


def _tell_memory(call: Call, job: Job) -> None:
    """Warn where the weights, their gradients and Adam's state alone do not fit; activations come to these."""
    memory = job.device.memory_here(job.processes)
    if memory is None:
        return
    sizes = Sizes(
        call.int("TP"),
        call.int("PP"),
        call.int("CP"),
        job.world // (call.int("TP") * call.int("PP") * call.int("CP")),
        precision=call["PR"],
        distributed_optimizer=call["DO"] == "true",
        fully_sharded=fsdp_ranks(call, job.world, job.processes),
    )
    geometry, frozen = model_of(call)
    stages = sorted({0, sizes.pipeline - 1})
    least = max(rank_memory(geometry, frozen, sizes, stage).state for stage in stages)
    if call["OPTIMIZER_OFFLOAD"] == "false" and least > memory:
        call.notes.append(
            f"note: weights, gradients and Adam's state are {least / 1e9:.1f} GB per process, and there are "
            f"{memory / 1e9:.1f} GB: the run will not fit; bash examples/llava_mcore/plan_llava.sh proposes what does"
        )


PHOTO = (480, 640)  # height, width in pixels: what an image is taken for where nothing is known of the data


def image_plan_of(values: Values, size: tuple[int, int]) -> TilePlan:
    """An image of this size (height, width), alone in its record, as a run shows it.

    Raises UserError: the model's configuration cannot be read.
    """
    folder = _folder_of(values)
    geometry = folder.geometry()
    if _sees_any_resolution(values, folder):
        return geometry.any_resolution.plan(size)
    tiles = grid(values["IMAGE_TILES"]) or _tiles_of(values["PRETRAIN_CHECKPOINT_PATH"])
    return whole_image(geometry.tower.image_tokens, fixed_tiles(*tiles))


def _tell_photo(call: Call) -> None:
    """Warn where a photograph does not fit into a record, however little text there is."""
    tokens = image_plan_of(call, PHOTO).tokens
    if tokens >= call.int("DECODER_SEQ_LEN"):
        call.notes.append(
            f"note: an image of {PHOTO[0]} x {PHOTO[1]} pixels takes {tokens} tokens, and DECODER_SEQ_LEN is "
            f"{call['DECODER_SEQ_LEN']}: records with images so large are left out; inspect_dataset.py shows the data's"
        )


def fsdp_ranks(values: Values, world: int, of_node: int) -> int:
    """Ranks over which FSDP shares the weights out; 1 without it."""
    tensor = int(values["TP"])
    ranks = {"false": 1, "hybrid": max(1, min(world, of_node) // tensor)}.get(values["FSDP"], world // tensor)
    return max(1, ranks)


def _folder_of(values: Values) -> LlavaFolder:
    """The llava/ folder that a run begins with."""
    start = values["PRETRAIN_CHECKPOINT_PATH"]
    return LlavaFolder(Path(values["TOKENIZER_PATH"])) if start == "none" else LlavaFolder.of(start)


def model_of(values: Values) -> tuple[LlavaGeometry, Frozen]:
    """The model that a run trains, and what of it is kept.  Raises UserError: its configuration cannot be read."""
    parts = ("LANGUAGE_MODEL", "VISION_TOWER", "PROJECTOR")
    kept = Frozen(*(values[f"FREEZE_{part}"] == "true" for part in parts))
    return _folder_of(values).geometry(), kept.with_adapters(lora_of(values))


def lora_of(values: Values) -> LoraConfig | None:
    """The adapters that the values ask for; None: none."""
    return LoraConfig.asked(
        int(values["LORA_RANK"]),
        float(values["LORA_ALPHA"]) if values["LORA_ALPHA"] else None,
        float(values["LORA_DROPOUT"]),
        NAMES.parse(values["LORA_TARGETS"]),
        MODEL_PARTS.parse(values["LORA_PARTS"]),
        values["LORA_RSLORA"] == "true",
    )


def _check_device(call: Call, job: Job) -> None:
    """Values that this kind of device cannot have, and what to know of others."""
    for value, why in job.device.REFUSED.items():
        name, _, refused = value.partition("=")
        if call[name] == refused and (name != "PROFILER" or call["PROFILE"]):
            call.refuse(name, why)
    for value, what in job.device.notes().items():
        name, _, told = value.partition("=")
        if call[name] == told:
            call.notes.append(f"note: {value}: {what}")


def _check_sizes(call: Call, job: Job, model_parallel: int) -> None:
    """Processes, batches and what the devices share out."""
    layout = f"x PP={call['PP']} x CP={call['CP']} = {model_parallel}"
    if job.world % model_parallel:
        call.refuse("TP", f"{layout} must divide the {job.world} processes ({job.nodes} nodes x {job.processes})")
        return
    if call.right("PROFILE_RANKS"):
        for rank in call["PROFILE_RANKS"].split(","):
            if int(rank) >= job.world:
                call.refuse("PROFILE_RANKS", f"must be less than {job.world}, the number of processes")
    data_parallel = job.world // model_parallel
    if not call.right("BATCH_SIZE", "GLOBAL_BATCH_SIZE", "VIRTUAL_STAGES"):
        return
    size, batch = call.int("GLOBAL_BATCH_SIZE"), call.int("BATCH_SIZE") * data_parallel
    if size % batch:
        call.refuse(
            "GLOBAL_BATCH_SIZE",
            f"must be divisible by {batch}: BATCH_SIZE={call['BATCH_SIZE']} x data-parallel size {data_parallel}",
        )
    group = batch * call.int("PP")
    if call["VIRTUAL_STAGES"] != "1" and size % group:
        call.refuse(
            "GLOBAL_BATCH_SIZE",
            f"must be divisible by {group}: with VIRTUAL_STAGES the micro-batches of a step come in groups of "
            f"PP={call['PP']}",
        )
