"""Puts guards.py, stopping.py and retention.py around Megatron's loop."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_patch.training import guards, retention, stopping


def _with_history(load_checkpoint: Callable[..., Any], guard: guards.Guard, folder: str | None) -> Callable[..., Any]:
    """Wrap Megatron's load_checkpoint -> (iteration, ...): a resumed run judges losses like one never stopped."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = load_checkpoint(*args, **kwargs)
        if folder and result[0] > 0:
            guard.history.losses.extend(retention.read_notes(Path(folder), result[0]).get("losses", []))
        return result

    return wrapped


def make_careful(training: ModuleType, args: argparse.Namespace) -> Callable[[], None]:
    """Wrap the functions of megatron.training.training that its loop calls; removes what a killed save left.

    Returns what to call when the run is over.
    """
    asked = {number for numbers in args.skip_train_iteration_range for number in numbers}
    guard = guards.Guard(
        args.on_bad_loss, args.spike_factor, asked | guards.read_windows(args.save), args.bad_batches_file
    )
    training.train_step = guard.guard(training.train_step)
    training.load_checkpoint = _with_history(training.load_checkpoint, guard, args.load)
    limit = stopping.TimeLimit(args.stop_at)
    save, decide = training.save_checkpoint_and_time, training.checkpoint_and_decide_exit
    if not args.save:
        training.checkpoint_and_decide_exit = stopping.stop_in_time(decide, save, lambda _: False, limit)
        return lambda: None
    folder = Path(args.save)
    if os.environ.get("RANK", "0") == "0" and (broken := retention.tidy(folder)):
        print(f"removed {', '.join(broken)} from {folder}: a save that was cut off", flush=True)
    keeper = retention.Keeper(folder, args.keep_last, args.keep_best, lambda: {"losses": [*guard.history.losses]})
    training.evaluate = keeper.watch_evaluation(training.evaluate)
    training.evaluate_and_print_results = keeper.number_evaluation(training.evaluate_and_print_results)
    save = stopping.measure_saves(keeper.save(save), limit)
    training.save_checkpoint_and_time = save
    training.checkpoint_and_decide_exit = stopping.stop_in_time(decide, save, keeper.wants_save, limit)
    return keeper.settle
