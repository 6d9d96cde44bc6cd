"""Puts the callbacks of a run around Megatron's loop: loss spikes, graceful stop, checkpoint retention; log, summary,
sample answers, traces.
"""

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.training import training
from torch.utils.tensorboard import SummaryWriter

from megatron_patch.data.loading.loader import TrainLoader
from megatron_patch.errors import UserError
from megatron_patch.patches.touch_points import LOOP, OPTIMIZER, wrap
from megatron_patch.step_flop import Frozen
from megatron_patch.training import checkpoint_retention, graceful_stop, loss_spikes
from megatron_patch.training.benchmark_scores import BenchmarkScores
from megatron_patch.training.config import RunConfig
from megatron_patch.training.logging import RunLog
from megatron_patch.training.profiling import Tracer
from megatron_patch.training.sample_generation import SampleGeneration


def _with_history(
    load_checkpoint: Callable[..., Any], guard: loss_spikes.Guard, folder: str | None
) -> Callable[..., Any]:
    """Wrap Megatron's load_checkpoint -> (iteration, ...): a resumed run judges losses like one never stopped."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = load_checkpoint(*args, **kwargs)
        if folder and result[0] > 0:
            guard.history.losses.extend(checkpoint_retention.read_notes(Path(folder), result[0]).get("losses", []))
        return result

    return wrapped


def install_safeguards(args: argparse.Namespace, benchmark: BenchmarkScores | None) -> Callable[[], None]:
    """Wrap the functions that Megatron's training loop calls; removes what a killed save left.

    Args:
        args: Megatron's, with ours among them.
        benchmark: that validations ask; with --best-by score it says which checkpoint is the best.

    Returns what to call when the run is over.
    """
    asked = {number for numbers in args.skip_train_iteration_range for number in numbers}
    guard = loss_spikes.Guard(
        args.on_bad_loss, args.spike_factor, asked | loss_spikes.read_windows(args.save), args.bad_batches_file
    )
    wrap(LOOP, "train_step", "training.loss_spikes", guard.guard)
    wrap(OPTIMIZER, "get_grad_norm_fp32", "training.loss_spikes", loss_spikes.checked)
    wrap(LOOP, "load_checkpoint", "training.callbacks", lambda load: _with_history(load, guard, args.load))
    limit = graceful_stop.TimeLimit(args.stop_at)

    def stop_in_time(wants_save: Callable[[int], bool]) -> None:
        # the save with the layers that are around it by then
        keywords = {"save": training.save_checkpoint_and_time, "wants_save": wants_save, "limit": limit}
        stopping = functools.partial(graceful_stop.stop_in_time, **keywords)
        wrap(LOOP, "checkpoint_and_decide_exit", "training.graceful_stop", stopping)

    if not args.save:
        stop_in_time(lambda _: False)
        return lambda: None
    folder = Path(args.save)
    if os.environ.get("RANK", "0") == "0" and (broken := checkpoint_retention.tidy(folder)):
        print(f"removed {', '.join(broken)} from {folder}: a save that was cut off", flush=True)
    keeper = checkpoint_retention.Keeper(
        folder,
        args.keep_last,
        args.keep_best,
        lambda: {"losses": [*guard.history.losses]},
        (lambda: benchmark.score) if benchmark and args.best_by == "score" else None,
    )
    wrap(LOOP, "evaluate", "training.checkpoint_retention", keeper.watch_evaluation)
    wrap(LOOP, "evaluate_and_print_results", "training.checkpoint_retention", keeper.number_evaluation)
    wrap(LOOP, "save_checkpoint_and_time", "training.checkpoint_retention", keeper.save)
    measured = functools.partial(graceful_stop.measure_saves, limit=limit)
    wrap(LOOP, "save_checkpoint_and_time", "training.graceful_stop", measured)
    stop_in_time(keeper.wants_save)
    return keeper.settle


@contextlib.contextmanager
def reporting(
    settings: RunConfig,
    args: argparse.Namespace,
    frozen: Frozen,
    loader: Callable[[], TrainLoader | None],
    benchmark: BenchmarkScores | None,
) -> Iterator[dict[str, Any]]:
    """Listen to Megatron's training loop while a run lasts, then sum it up.

    Args:
        args: Megatron's, with ours among them.
        loader: this process's training loader, None where there is none.
        benchmark: that validations ask.

    Yields:
        Further arguments for pretrain().
    Raises:
        UserError: the validation set cannot be read, or traces have no place.
    """
    if args.trace_iterations and args.output_path is None:
        raise UserError("--trace-iterations needs --output-path, below which traces are written")
    log = RunLog(settings.geometry, frozen, loader, args.output_path)
    log.listen()
    tracer = None
    if args.trace_iterations and args.rank in args.trace_ranks:
        tracer = Tracer(*args.trace_iterations, args.rank, args.output_path / "profile")
        wrap(LOOP, "train_step", "training.profiling", tracer.around)
    asked: list[SampleGeneration | BenchmarkScores] = [] if benchmark is None else [benchmark]
    if args.sample_answers and settings.valid_dataset_path:
        path, count = settings.valid_dataset_path, args.sample_answers
        asked.append(SampleGeneration(path, settings.data, count, args.output_path))

    def generate(model: list[torch.nn.Module]) -> list[list[str]]:
        return [part.generate(model) for part in asked]

    def tell(answers: list[list[str]], iteration: int, writer: SummaryWriter) -> None:
        for part, of_part in zip(asked, answers, strict=True):
            part.tell(of_part, iteration, writer)

    try:
        yield {"non_loss_data_func": generate, "process_non_loss_data_func": tell} if asked else {}
    except SystemExit as leaving:  # how Megatron ends a run early: 0 after a signal or a limit that it kept
        if not leaving.code:
            log.finish("stopped before the end")
        raise
    else:
        log.finish("complete")
    finally:
        if tracer is not None:
            tracer.finish()
