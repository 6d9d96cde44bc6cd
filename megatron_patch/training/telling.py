"""All that a run tells beside Megatron's own lines, put together: log, summary, sample answers, traces."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from megatron_patch.data.loaders import TrainLoader
from megatron_patch.errors import UserError
from megatron_patch.model.llava import Frozen
from megatron_patch.training.answers import SampleAnswers
from megatron_patch.training.logging import RunLog
from megatron_patch.training.profiling import Tracer
from megatron_patch.training.words import RunSettings


@contextlib.contextmanager
def telling(
    training: ModuleType,
    settings: RunSettings,
    args: argparse.Namespace,
    frozen: Frozen,
    loader: Callable[[], TrainLoader | None],
) -> Iterator[dict[str, Any]]:
    """Listen to megatron.training.training while a run lasts, then sum it up.

    Args:
        args: Megatron's, with ours among them.
        loader: this process's training loader, None where there is none.

    Yields:
        Further arguments for pretrain().
    Raises:
        UserError: the validation set cannot be read, or traces have no place.
    """
    if args.trace_iterations and args.output_path is None:
        raise UserError("--trace-iterations needs --output-path, below which traces are written")
    log = RunLog(settings.geometry, frozen, loader, args.output_path)
    log.listen(training)
    tracer = None
    if args.trace_iterations and args.rank in args.trace_ranks:
        tracer = Tracer(*args.trace_iterations, args.rank, args.output_path / "profile")
        training.train_step = tracer.around(training.train_step)
    hooks = {}
    if args.sample_answers and settings.valid_dataset_path:
        answers = SampleAnswers(
            settings.valid_dataset_path,
            settings.data,
            args.sample_answers,
            args.tensor_model_parallel_size,
            args.output_path,
        )
        hooks = {"non_loss_data_func": answers.generate, "process_non_loss_data_func": answers.tell}
    try:
        yield hooks
    except SystemExit as leaving:  # how Megatron ends a run early: 0 after a signal or a limit that it kept
        if not leaving.code:
            log.finish("stopped before the end")
        raise
    else:
        log.finish("complete")
    finally:
        if tracer is not None:
            tracer.finish()
