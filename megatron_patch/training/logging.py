"""What a run says of itself, around Megatron's own log: throughput, memory, time left, the record counters, a
summary at the end; and losses that a resumed run prints like one never stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import is_last_rank, print_rank_last

from megatron_patch.data.loading.loader import TrainLoader
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.patches.touch_points import LOOP, wrap
from megatron_patch.step_flop import Frozen, Work, step_flop
from megatron_patch.training import record_counters, summary
from megatron_patch.training.forward_step import LOSS
from megatron_patch.training.progress import ProgressBar
from megatron_patch.training.throughput import Throughput
from megatron_patch.training.timer import Timer, as_clock


def record_scalars(scalars: dict[str, float], iteration: int) -> None:
    """Write them to TensorBoard and W&B, of which the last rank alone has writers."""
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(scalars, iteration)


class RunLog:
    """Listens to the hooks of Megatron's loop in this process.

    Args:
        loader: this process's training loader, None where there is none; asked once the loop runs.
        output: the run's own folder.
    """

    def __init__(
        self, geometry: LlavaGeometry, frozen: Frozen, loader: Callable[[], TrainLoader | None], output: Path | None
    ) -> None:
        self._geometry, self._frozen, self._loader, self._output = geometry, frozen, loader, output
        self._watch = Timer()
        self._bar: ProgressBar | None = None
        self._first: tuple[int, Work, float] | None = None  # iteration, work, training seconds once warmed up
        self._since: tuple[int, Work, float] | None = None  # the same at the last line of the log
        self._totals: record_counters.Totals | None = None
        self._totals_since: record_counters.Totals | None = None  # those at the last line of the log
        self._iteration = 0
        self._loss: torch.Tensor | None = None
        self._validation_loss: float | None = None

    def listen(self) -> None:
        """Wrap the functions of Megatron's training loop."""
        for symbol, wrapper in (
            ("training_log", self._around_log),
            ("evaluate", self._around_evaluate),
            ("evaluate_and_print_results", self._aside("evaluating")),
            ("save_checkpoint", self._aside("saving")),
            ("train", self._around_train),
            ("checkpoint_and_decide_exit", self._around_exit),
        ):
            wrap(LOOP, symbol, "training.logging", wrapper)

    def _aside(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with self._watch.side_job(name):
                    return function(*args, **kwargs)

            return wrapped

        return around

    def _around_train(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """The whole loop."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._watch.training_begins()
            return train(*args, **kwargs)

        return wrapped

    def _around_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        """training_log(loss_dict, total_loss_dict, learning_rate, iteration, ...)"""

        def wrapped(
            loss_dict: dict, total_loss_dict: dict, learning_rate: float, iteration: int, *args: Any, **kwargs: Any
        ) -> Any:
            settings = get_args()
            # Megatron logs the first iteration after a start without resetting its sums.  Where that iteration ends an
            # interval of its own, the next line would show an average over two intervals.
            ends_interval = iteration % settings.log_interval == 0
            if ends_interval:
                kwargs["is_first_iteration"] = False
            result = training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
            self._iteration, self._loss = iteration, loss_dict.get(LOSS, self._loss)
            self._watch.step_done()
            if ends_interval or self._first is None:
                self._totals = record_counters.totals(self._loader())
            if ends_interval:
                self._tell(iteration, settings.train_iters, settings.world_size, settings.num_workers)
            if self._first is None:
                self._bar = ProgressBar(settings.train_iters, settings.rank)
                self._first = self._now()
            if self._since is None or ends_interval:
                self._since, self._totals_since = self._now(), self._totals
            self._bar.show(iteration)
            return result

        return wrapped

    def _around_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """evaluate(...) -> (losses by name, ..., ...)"""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            if result[0] and LOSS in result[0]:
                self._validation_loss = float(result[0][LOSS])
            return result

        return wrapped

    def _around_exit(self, decide: Callable[..., bool]) -> Callable[..., bool]:
        """checkpoint_and_decide_exit(model, optimizer, opt_param_scheduler, iteration, ...)"""

        def wrapped(model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any, **kwargs: Any) -> bool:
            leaving = decide(model, optimizer, scheduler, iteration, *args, **kwargs)
            if leaving or iteration == get_args().train_iters:
                self._totals = record_counters.totals(self._loader())  # here all ranks are together for the last time
            return leaving

        return wrapped

    def _now(self) -> tuple[int, Work, float]:
        return self._iteration, self._totals.work, self._watch.training()

    def _rates(self, since: tuple[int, Work, float], world_size: int) -> Throughput | None:
        """Of the iterations from `since` to the last totals."""
        iteration, work, seconds = self._now()
        if iteration <= since[0]:
            return None
        done = work - since[1]
        return Throughput.of(done, step_flop(self._geometry, self._frozen, done), seconds - since[2], world_size)

    def _tell(self, iteration: int, train_iters: int, world_size: int, num_workers: int) -> None:
        """The lines behind Megatron's own, and the same figures as scalars."""
        found = self._totals
        scalars = {
            f"records/{name}": count
            for name, count in found.records.items()
            if count or name in ("kept", "truncated", "skipped")
        }
        scalars["memory/peak GiB"] = found.memory_bytes / 2**30
        if self._since is not None and (rates := self._rates(self._since, world_size)):
            left = self._watch.seconds_left(train_iters - iteration)
            parts = [rates.sentence(), f"{found.memory_bytes / 2**30:.2f} GiB at most", f"{as_clock(left)} left"]
            print_rank_last(f" {' | '.join(parts)}")
            scalars |= {f"throughput/{name}": value for name, value in rates.scalars().items()}
            share = record_counters.waiting_share(found, self._totals_since, self._watch.training() - self._since[2])
            scalars["data/waiting share"] = share
            if told := record_counters.waiting_sentence(share, num_workers):
                print_rank_last(told)
        print_rank_last(record_counters.sentence(found.records))
        record_scalars(scalars, iteration)

    def finish(self, ending: str) -> None:
        """Say and write what the run came to; on the last rank, which has the losses.  Calls nobody else."""
        if self._bar is not None:
            self._bar.close()
        if self._totals is None or not is_last_rank():
            return
        settings = get_args()
        told = summary.Summary.of(
            ending=ending,
            iteration=self._iteration,
            train_iters=settings.train_iters,
            totals=self._totals,
            watch=self._watch,
            rates=self._rates(self._first, settings.world_size),
            loss=None if self._loss is None else float(self._loss),
            validation_loss=self._validation_loss,
            save=settings.save,
            stage_1=not self._frozen.learns("language_model"),
            model_size=settings.model_size,
            precision="fp16" if settings.fp16 else "bf16" if settings.bf16 else "fp32",
            output=self._output,
        )
        print(told.text(), flush=True)
        if self._output is not None:
            told.write(self._output / summary.FILE)
