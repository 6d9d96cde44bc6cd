"""Every symbol of Megatron that this toolkit replaces or wraps: one list, and the one place that assigns to it.

A new version of Megatron needs a look at TOUCH_POINTS: does the symbol still mean the same, is the reason still there?
Several layers may lie around one symbol; they are listed from the innermost to the outermost, and `wrap` keeps to it.
"""

import functools
import importlib
import importlib.util
import symtable
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import UserError

MEGATRON_CORE_VERSION = "0.19.2"  # for which the list is written


@dataclass(frozen=True)
class Layer:
    """What one file of this toolkit puts around a symbol."""

    place: str  # module below megatron_patch with the wrapper
    reason: str  # why, for the list's readers and for the refusal
    remove_when: str
    backend: str | None = None  # the only backend that needs it, "cpu" or "cuda"; None: all


@dataclass(frozen=True)
class TouchPoint:
    """A symbol of Megatron."""

    module: str
    symbol: str  # name in the module, or dotted: Class.method
    layers: tuple[Layer, ...]  # innermost first
    read_only: bool = False  # a layer of another symbol decides by it; nothing is assigned

    def __str__(self) -> str:
        return f"{self.module}.{self.symbol}"


LOOP = "megatron.training.training"
CHECKPOINTING = "megatron.training.checkpointing"
OPTIMIZER = "megatron.core.optimizer.optimizer"
DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"

ADAM_STEP = Layer(
    "patches.distributed_optimizer_state",
    "torch's own Adam keeps its step with each parameter, and a resume goes on with a wrong one",
    "test_kill_and_resume passes without it for the distributed optimizer",
)
SHIFTED_STATE = Layer(
    "patches.shifted_optimizer_state",
    "optimizer state that Megatron saved shifted, behind a padded bucket, is loaded as another weight's",
    "checkpoints of megatron-core up to 0.19.2 are of no use any more",
)
OWN_STATE = Layer(
    "patches.own_optimizer_state",
    "one rank gathers and saves the distributed optimizer's state of all, and shifts it behind a padded bucket",
    "benchmark_checkpoint.py --processes 2 is as fast and test_any_resolution's resumes from PP2 pass without it",
)
IN_PLACE = Layer(
    "patches.exchanged_in_place",
    "gloo exchanges the distributed optimizer's gradients and weights in copies as large as the model",
    "test_gradients_and_weights_are_exchanged_without_copies passes without it",
    backend="cpu",
)
WITHOUT_ZEROS = Layer(
    "patches.gradients_without_zeros",
    "the buffer of gradients is filled with zeros first, and the first gradient of a step is added to them",
    "the step of benchmark_training.py's 135M shape in bf16 takes as long without it",
    backend="cpu",
)
ONE_PASS = Layer(
    "patches.adamw_in_one_pass",
    "clipping, AdamW's step and rounding its weights to 16 bits each go through memory as large as the model",
    "the step of benchmark_training.py's 135M shape in bf16 takes as long without it",
    backend="cpu",
)
COPIES = Layer(
    "patches.async_save_copies",
    "an asynchronous save on a CPU writes the very tensors that training goes on with",
    "test_kill_and_resume passes without it for asynchronous saves",
    backend="cpu",
)
FORKED_WRITER = Layer(
    "patches.forked_writer",
    "the process that writes asynchronous saves takes seconds to import everything again while the trainer starts",
    "a run with ASYNC_SAVE=true reaches its first iteration as fast without it",
    backend="cpu",
)
LOADED_IN_PLACE = Layer(
    "patches.loaded_in_place",
    "a load reads every tensor into memory of its own, copies it, and joins the halves of gated MLPs in a third",
    "test_tensors_are_loaded_without_copies passes without it",
    backend="cpu",
)
GROUP_KEYS = Layer(
    "patches.parameter_group_keys",
    "saved parameter groups are found by their learning rates, so no run resumes with another one",
    "test_parameter_groups' resume with another learning rate passes without it",
)
FSDP2 = Layer(
    "patches.torch_fsdp2",
    "weights that torch's FSDP2 shares out: gradients of a loss per token, checkpoints, resume",
    "test_parallelism's rows with FSDP, SGD among them, and test_resume's pass without it",
)
EMA = Layer(
    "training.ema",
    "the moving average of the weights is loaded, updated and saved with them",
    "Megatron's loop can average weights and saves the average beside the checkpoint",
)
LOG = Layer(
    "training.logging",
    "throughput, time left and the summary leave out evaluating, saving and starting",
    "the loop has callbacks around log, evaluation, save and exit",
)
RETENTION = Layer(
    "training.checkpoint_retention",
    "the best checkpoints by validation loss and the last N are retained, and a full disk is one sentence",
    "Megatron retains checkpoints by validation loss and the last N of them",
)
STOP = Layer(
    "training.graceful_stop",
    "SIGTERM, SIGUSR1 and the time limit end a run with a checkpoint and exit code 0",
    "Megatron knows more than one signal, and its exit by duration leaves room for the save",
)
SPIKES = Layer(
    "training.loss_spikes",
    "bad losses and gradients are found before the optimizer's step, and iterations can be left out",
    "Megatron's rerun state machine can drop a step and go on",
)

TOUCH_POINTS = (
    # --- mistakes of Megatron, or what it takes for granted: patches/
    TouchPoint(
        LOOP,
        "initialize_megatron",
        (
            Layer(
                "patches.allow_cpu_initialization",
                "it asserts CUDA, and pretrain() has no argument to say otherwise",
                "pretrain() takes allow_no_cuda",
                backend="cpu",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        (
            Layer(
                "patches.cpu_rng_state",
                "the random state is set when CUDA starts, which it never does on a CPU",
                "test_rng_tracker_restores_the_state passes without it",
                backend="cpu",
            ),
        ),
    ),
    TouchPoint("megatron.core.distributed.torch_fully_sharded_data_parallel", "fully_shard", (FSDP2,)),
    TouchPoint(
        "megatron.core.distributed.torch_fully_sharded_data_parallel",
        "TorchFullyShardedDataParallel.__init__",
        (FSDP2,),
    ),
    TouchPoint(
        "megatron.core.distributed.torch_fully_sharded_data_parallel",
        "TorchFullyShardedDataParallel.load_state_dict",
        (FSDP2,),
    ),
    TouchPoint("megatron.core.distributed.data_parallel_base", "_BaseDataParallel.scale_gradients", (FSDP2,)),
    TouchPoint("megatron.core.dist_checkpointing.optimizer", "to_local_if_dtensor", (FSDP2,)),
    TouchPoint("megatron.core.optimizer.clip_grads", "get_data_parallel_group_if_dtensor", (FSDP2,)),
    TouchPoint(OPTIMIZER, "FP32Optimizer.load_state_dict", (FSDP2,)),
    TouchPoint(OPTIMIZER, "Float16OptimizerWithFloat16Params.load_state_dict", (FSDP2,)),
    TouchPoint(DISTRIBUTED_OPTIMIZER, "HAVE_APEX_OR_TE", (ADAM_STEP,), read_only=True),
    TouchPoint(DISTRIBUTED_OPTIMIZER, "DistributedOptimizer.state_dict", (ADAM_STEP,)),
    TouchPoint(DISTRIBUTED_OPTIMIZER, "DistributedOptimizer.load_state_dict", (ADAM_STEP,)),
    TouchPoint(
        DISTRIBUTED_OPTIMIZER,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        (ADAM_STEP, SHIFTED_STATE),
    ),
    TouchPoint(DISTRIBUTED_OPTIMIZER, "DistributedOptimizer.sharded_param_state_fully_reshardable", (OWN_STATE,)),
    TouchPoint(DISTRIBUTED_OPTIMIZER, "DistributedOptimizer.load_parameter_state_from_fully_reshardable", (OWN_STATE,)),
    TouchPoint("megatron.core.fp8_utils", "HAVE_TE", (WITHOUT_ZEROS,), read_only=True),
    TouchPoint("megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBuffer.reset", (WITHOUT_ZEROS,)),
    TouchPoint(
        "megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBucketGroup.start_grad_sync", (WITHOUT_ZEROS,)
    ),
    TouchPoint("megatron.core.distributed.param_and_grad_buffer", "dist_reduce_scatter_func", (IN_PLACE,)),
    TouchPoint("megatron.core.distributed.param_and_grad_buffer", "dist_all_gather_func", (IN_PLACE,)),
    TouchPoint(
        CHECKPOINTING,
        "maybe_save_dataloader_state",
        (
            Layer(
                "patches.interleaved_loader_state",
                "it knows one iterator, and an interleaved pipeline has a list of them",
                "test_parallelism's interleaved run saves without it",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.torch", "TorchDistSaveShardedStrategy.async_save", (COPIES,)
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.schedule_async_call",
        (COPIES,),
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.is_current_async_call_done",
        (
            Layer(
                "patches.ended_writer",
                "a run whose process for asynchronous saves was killed goes on unsaved, and hangs at its end",
                "test_a_killed_writer_ends_the_run passes without it",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller._get_process",
        (FORKED_WRITER,),
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.async_loop",
        (FORKED_WRITER,),
    ),
    TouchPoint(
        "megatron.core.tensor_parallel.layers",
        "VocabParallelEmbedding.forward",
        (
            Layer(
                "patches.embedding_gradient",
                "the gradient of a few tokens is a tensor as large as the embedding, added to a buffer as large",
                "test_an_embeddings_gradient_is_that_of_its_rows passes without it",
                backend="cpu",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_write_item",
        (
            Layer(
                "patches.written_in_pieces",
                "large writes take large pages, for which a virtual machine waits ten times as long",
                "benchmark_checkpoint.py saves as fast without it, in a virtual machine with Linux 6.18",
                backend="cpu",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.torch",
        "MCoreSavePlanner.transform_object",
        (
            Layer(
                "patches.parts_saved_in_place",
                "a save copies every tensor that is a part of another, and holds the copies until all is written",
                "test_parts_of_tensors_are_saved_without_copies passes without it",
                backend="cpu",
            ),
        ),
    ),
    TouchPoint("megatron.core.dist_checkpointing.strategies.torch", "_get_filesystem_reader", (LOADED_IN_PLACE,)),
    TouchPoint("megatron.core.transformer.mlp", "cat_with_oom_fallback", (LOADED_IN_PLACE,)),
    TouchPoint(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        (
            Layer(
                "patches.synchronous_save_queue",
                "the first synchronous save spawns a process that imports everything again, for a queue",
                "TorchDistSaveShardedStrategy.save starts no process",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.dist_checkpointing",
        "load",
        (
            Layer(
                "patches.missing_extra_states",
                "layers of Transformer Engine ask for extra states that the local layers never wrote",
                "test_extra_states_that_nobody_wrote_are_not_asked_for passes without it",
            ),
        ),
    ),
    TouchPoint(
        OPTIMIZER,
        "MegatronOptimizer.__init__",
        (
            Layer(
                "patches.adam_of_another_kind",
                "torch's Adam and Transformer Engine's FusedAdam cannot go on with each other's state",
                "test_a_run_of_local_layers_goes_on_with_these_and_back passes without it",
            ),
        ),
    ),
    TouchPoint(OPTIMIZER, "param_group_identifier_keys", (GROUP_KEYS,)),
    TouchPoint(DISTRIBUTED_OPTIMIZER, "param_group_identifier_keys", (GROUP_KEYS,)),
    TouchPoint(
        LOOP,
        "get_megatron_optimizer",
        (
            Layer(
                "patches.fused_adamw",
                "torch's AdamW without `fused` holds temporaries as large as the weights, and takes longer",
                "Megatron builds torch's AdamW with fused=True",
            ),
            ONE_PASS,
        ),
    ),
    TouchPoint(
        "megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel.scale_gradients", (ONE_PASS,)
    ),
    TouchPoint(OPTIMIZER, "clip_grad_by_total_norm_fp32", (ONE_PASS,)),
    TouchPoint(OPTIMIZER, "Float16OptimizerWithFloat16Params._copy_main_params_to_model_params", (ONE_PASS,)),
    TouchPoint(
        "megatron.core.tensor_parallel.layers",
        "ColumnParallelLinear.__init__",
        (
            Layer(
                "patches.unfused_weight_gradients",
                "among Transformer Engine's layers the output layer refuses to be built without Apex's extension",
                "the layer drops gradient_accumulation_fusion by itself where the extension does not import",
                backend="cuda",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.transformer.attention",
        "apply_rotary_pos_emb",
        (
            Layer(
                "patches.rotary_in_one_pass",
                "without Transformer Engine's kernel it copies queries and keys ten times, in every layer anew",
                "benchmark_training.py is not slower without it",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel._make_backward_post_hook",
        (
            Layer(
                "patches.hooks_without_gradients",
                "no parameter says whether its gradient may go to the buffer without passing through torch",
                "patches.embedding_gradient and model.linear no longer ask for `hook_needs_no_gradient`",
                backend="cpu",
            ),
            Layer(
                "patches.gradients_in_parts",
                "on a CPU torch adds a 16-bit gradient to a buffer of 32 bits by way of a whole copy",
                "torch adds two dtypes on a CPU without a copy",
                backend="cpu",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.optimizer.clip_grads",
        "l2_norm_impl",
        (
            Layer(
                "patches.gradient_norm",
                "without Transformer Engine and Apex it sums the squares of a whole gradient in 32 bits, which loses "
                "some on a CPU",
                "torch.norm of 28 million numbers on a CPU is exact to 1e-5",
                backend="cpu",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.optimizer.clip_grads",
        "multi_tensor_scale_impl",
        (
            Layer(
                "patches.scale_in_place",
                "without Transformer Engine and Apex it clips gradients through a copy of each",
                "local_multi_tensor_scale scales in place",
            ),
        ),
    ),
    TouchPoint(
        "megatron.core.datasets.utils",
        "compile_helpers",
        (
            Layer(
                "patches.skip_compile_helpers",
                "it runs `make` in a folder that the wheel ships without a Makefile",
                "the wheel ships the Makefile, or the function looks for the compiled file first",
            ),
        ),
    ),
    TouchPoint(
        CHECKPOINTING,
        "maybe_msc.open",
        (
            Layer(
                "patches.whole_tracker",
                "the tracker file is emptied before it is written, and a kill in between leaves it empty",
                "save_checkpoint writes it beside and renames it",
            ),
        ),
    ),
    # --- what the training loop has no callbacks for: training/
    TouchPoint(
        LOOP,
        "get_standard_config_overrides",
        (
            Layer(
                "training.parameter_groups",
                "each module has a learning rate and weight decay of its own",
                "pretrain() takes overrides of parameter groups",
            ),
        ),
    ),
    TouchPoint(
        LOOP,
        "load_checkpoint",
        (
            FSDP2,
            Layer(
                "training.strict_load",
                "a missing or unknown weight is one sentence before anything is read",
                "--dist-ckpt-strictness works with torch 2.15, and a strict load is never repeated as a lenient one",
            ),
            Layer(
                "training.adapters",
                "a run of adapters reads the base's weights at every start, then its own checkpoint",
                "Megatron loads --pretrained-checkpoint on a resume too, without its own checkpoint's frozen weights",
            ),
            Layer(
                "training.parameter_groups",
                "the typed learning rates and weight decays hold on a resume, not the saved ones",
                "--override-opt-param-scheduler covers the overrides of parameter groups",
            ),
            Layer(
                "training.fresh_optimizer",
                "a run goes on from a checkpoint without optimizer state, with the learning rate where it was",
                "load_checkpoint looks for a saved optimizer, and loads the schedule without it",
            ),
            EMA,
            Layer(
                "training.callbacks",
                "a resumed run compares its losses with those before the save",
                "the same as for training.loss_spikes around train_step",
            ),
        ),
    ),
    TouchPoint(
        LOOP,
        "train_step",
        (
            EMA,  # inside, so that a step that was left out is not averaged
            SPIKES,
            Layer(
                "training.profiling",
                "traces begin and end at iterations as the log counts them",
                "--use-pytorch-profiler counts as the log does, and writes when a run ends early",
            ),
        ),
    ),
    TouchPoint(OPTIMIZER, "get_grad_norm_fp32", (ONE_PASS, SPIKES)),
    TouchPoint(
        LOOP,
        "save_checkpoint_and_time",
        (
            EMA,  # inside, so that an iteration that is there already is not averaged again
            RETENTION,
            STOP,  # measures what a save and everything around it takes
        ),
    ),
    TouchPoint(LOOP, "checkpoint_and_decide_exit", (STOP, LOG)),
    TouchPoint(LOOP, "evaluate", (RETENTION, LOG)),
    TouchPoint(LOOP, "evaluate_and_print_results", (RETENTION, LOG)),
    TouchPoint(LOOP, "training_log", (LOG,)),
    TouchPoint(LOOP, "save_checkpoint", (LOG,)),
    TouchPoint(LOOP, "train", (LOG,)),
)

_BY_SYMBOL = {(point.module, point.symbol): point for point in TOUCH_POINTS}
_wrapped: dict[TouchPoint, list[str]] = {}  # places of the layers that are there, innermost first


def wrap(module: str, symbol: str, place: str, wrapper: Callable[[Any], Any]) -> Any:
    """Put one listed layer around a symbol of Megatron; nothing else in this toolkit assigns to Megatron.

    Args:
        module, symbol: as in TOUCH_POINTS.
        place: of the layer, as listed.
        wrapper: gets what stands there now (Megatron's own, or the layer further inside), returns what shall stand
            there.  A function is told what it wraps: `__wrapped__`, name and docstring.

    Returns:
        What stands there now.
    Raises:
        LookupError: this layer is not listed.
        RuntimeError: a layer that belongs around this one is there already, or this very layer.
        UserError: Megatron has no such symbol.
    """
    point = _BY_SYMBOL.get((module, symbol))
    places = [layer.place for layer in point.layers] if point and not point.read_only else []
    if place not in places:
        raise LookupError(f"{place} must not wrap {module}.{symbol}: TOUCH_POINTS in {__name__} does not list it")
    present = _wrapped.setdefault(point, [])
    if present and places.index(present[-1]) >= places.index(place):
        raise RuntimeError(f"{point}: {place} comes too late, {present[-1]} is there; listed: {', '.join(places)}")
    *path, name = symbol.split(".")
    try:
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        original = getattr(owner, name)
    except (ImportError, AttributeError):
        raise _missing(point, point.layers[places.index(place)]) from None
    substitute = wrapper(original)
    if callable(original):
        functools.update_wrapper(substitute, original)
    setattr(owner, name, substitute)
    present.append(place)
    return substitute


def replace(module: str, symbol: str, place: str, substitute: Any) -> None:
    """wrap() for what never calls the original."""
    wrap(module, symbol, place, lambda _: substitute)


def check(backend: str, points: Iterable[TouchPoint] = TOUCH_POINTS) -> None:
    """Look for every symbol that this backend needs, in Megatron's files: importing it would take many seconds.

    Raises:
        UserError: one is not there; the message says what for.
    """
    for point in points:
        for layer in point.layers:
            if layer.backend in (None, backend) and not _exists(point):
                raise _missing(point, layer)


def _missing(point: TouchPoint, layer: Layer) -> UserError:
    return UserError(
        f"{point} does not exist in the installed Megatron, and megatron_patch.{layer.place} needs it: {layer.reason}; "
        f"run `pip install --force-reinstall megatron-core=={MEGATRON_CORE_VERSION}`, or adapt TOUCH_POINTS"
    )


@functools.cache
def _file(module: str) -> Path | None:
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)  # the package alone: for what lies below it, find_spec would import
    for folder in (spec and spec.submodule_search_locations) or ():
        below = Path(folder, *parts)
        for file in (below.with_name(f"{below.name}.py"), below / "__init__.py"):
            if file.is_file():
                return file
    return None


@functools.cache
def _names(file: Path) -> symtable.SymbolTable:
    return symtable.symtable(file.read_text(), str(file), "exec")


def _exists(point: TouchPoint) -> bool:
    """Does the module's file bind the symbol?  Of an object, the file tells its name and not its attributes."""
    file = _file(point.module)
    if file is None:
        return False
    table = _names(file)
    for name in point.symbol.split("."):
        try:
            found = table.lookup(name)
        except KeyError:
            return False
        if not (found.is_assigned() or found.is_imported()):
            return False
        classes = [inner for inner in found.get_namespaces() if inner.get_type() == "class"]
        if not classes:
            return True
        table = classes[0]
    return True
