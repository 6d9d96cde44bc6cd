"""Steps that must not be trained on: a loss or gradient that is not finite, a loss spike, iterations to leave out.

Losses are looked at after forward and backward and before the optimizer: every process then knows whether anywhere a
micro-batch was bad, for one sum of four numbers over all of them, and all decide alike.  Of the gradients the optimizer
takes the norm over all processes anyway; that one is looked at, before it clips.  Megatron's own check (rerun state
machine) ends with exit codes 16 and 17 after saving, or trains on; it is switched off (config.py).
"""

import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_patch import device
from megatron_patch.atomic_files import write_text
from megatron_patch.launch.processes import ROLL_BACK

MEDIAN_OF = 50  # losses of steps before this one
FEWEST_LOSSES = 10  # before anything is called a spike
MOST_SKIPPED = 10  # bad steps in a row: then it is the weights, not the data
WINDOWS = "iterations_to_skip.json"

_noted: list[tuple[Sequence[str], Tensor]] = []  # record ids and [sum of losses, labels] of the step's micro-batches


def note(record_ids: Sequence[str], sums: Tensor) -> None:
    """Remember a micro-batch on the last stage: its records (where they are known) and [sum of losses, labels]."""
    _noted.append((record_ids, sums))


@dataclass(frozen=True)
class BadMicroBatch:
    """What is written down."""

    iteration: int
    reason: str
    rank: int
    micro_batch: int
    loss: float
    record_ids: list[str]

    def line(self) -> str:
        """JSON; a loss that is none of JSON's numbers becomes text."""
        loss = self.loss if math.isfinite(self.loss) else str(self.loss)
        return json.dumps({**self.__dict__, "loss": loss})


class LossHistory:
    """Mean losses of the steps trained on lately."""

    def __init__(self, factor: float) -> None:
        """factor: a loss above so many times the median is a spike; 0: nothing is."""
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=MEDIAN_OF)

    @property
    def highest(self) -> float:
        """A loss above it is a spike, infinite while there is nothing to compare with."""
        if self.factor == 0 or len(self.losses) < FEWEST_LOSSES:
            return math.inf
        return self.factor * statistics.median(self.losses)


def read_windows(save: str | None) -> set[int]:
    """Iterations that an earlier start of this run rolled back from."""
    where = Path(save or ".") / WINDOWS
    return set(json.loads(where.read_text())) if save and where.is_file() else set()


class GradientNotFinite(Exception):
    """The norm of all gradients is none of the numbers; raised on every process before anything is changed."""


def checked(get_grad_norm: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's get_grad_norm_fp32, whose result is the same on every process that shares the step."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        norm = get_grad_norm(*args, **kwargs)
        # under fp16 the loss scaler meets infinite gradients as a matter of course
        if not get_args().fp16 and not math.isfinite(float(norm)):
            raise GradientNotFinite
        return norm

    return wrapped


class _Optimizer:
    """Megatron's optimizer as train_step sees it; steps only when `judge` lets it."""

    def __init__(self, optimizer: Any, judge: Callable[[Callable[[], tuple]], tuple]) -> None:
        self.optimizer, self.judge = optimizer, judge

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self) -> tuple[bool, float | None, int | None]:
        """As Megatron's: (updated, gradient norm, zeros); without an update it leaves the schedule alone too."""
        return self.judge(self.optimizer.step)


class Guard:
    """Judges every step of a run."""

    def __init__(self, policy: str, factor: float, left_out: Iterable[int], written_down: Path | None) -> None:
        """
        Args:
            policy: stop, skip or rollback.
            factor: see LossHistory.
            left_out: iterations whose micro-batches are drawn and thrown away.
            written_down: file for bad micro-batches, or None.
        """
        self.policy, self.written_down = policy, written_down
        self.left_out = set(left_out)
        self.history = LossHistory(factor)
        self.skipped = 0  # bad steps in a row

    def guard(self, train_step: Callable[..., tuple]) -> Callable[..., tuple]:
        """Wrap Megatron's train_step."""

        def wrapped(
            forward: Callable,
            data: Any,
            model: list,
            optimizer: Any,
            scheduler: Any,
            config: Any,
            forward_backward: Callable,
            iteration: int,
            **kwargs: Any,
        ) -> tuple:
            number = iteration + 1  # Megatron counts from 0 here and from 1 in its log
            if number in self.left_out:
                _draw(data)
                print_rank_0(f" iteration {number} is left out, as asked: its micro-batches are drawn, nothing changes")
                return {}, 1, False, False, 0, None, None, 0
            watched = _Optimizer(optimizer, lambda step: self._judge(number, step))

            def noted(*args: Any, **named: Any) -> Any:
                _noted.clear()
                return forward_backward(*args, **named)

            return train_step(forward, data, model, watched, scheduler, config, noted, iteration=iteration, **kwargs)

        return wrapped

    def _judge(self, iteration: int, step: Callable[[], tuple]) -> tuple:
        """The optimizer's step, or none.  Ends the process when the policy says so."""
        sums = _sums_of_step()
        speaks = _speaks_for_losses()
        losses = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        highest = self.history.highest
        not_finite = [not math.isfinite(loss) for loss in losses]
        spikes = [loss > highest for loss in losses]
        own = [0.0] * 4
        if speaks:
            own[:2] = sum(not_finite), sum(spikes)
            if not own[0]:
                own[2:] = sums.sum(dim=0).tolist()
        total = torch.tensor(own, dtype=torch.float64, device=device.current_device())
        torch.distributed.all_reduce(total)
        any_not_finite, any_spike, loss_sum, labels = total.tolist()
        if any_not_finite:
            reason, bad = "the loss is not finite", not_finite
        elif any_spike:
            reason = f"the loss is above {highest:.4g}, {self.history.factor:g} times the median of the last steps"
            bad = spikes
        else:
            try:
                result = step()
            except GradientNotFinite:
                reason, bad = "the gradient is not finite", [True] * len(losses)  # it may come from any of them
            else:
                self.skipped = 0
                self.history.losses.append(loss_sum / max(labels, 1))
                return result
        found = [
            BadMicroBatch(iteration, reason, torch.distributed.get_rank(), number, losses[number], list(ids))
            for number, (ids, _) in enumerate(_noted)
            if speaks and bad[number]
        ]
        self._write_down(iteration, reason, found if mpu.get_context_parallel_rank() == 0 else [])
        self._follow_policy(iteration, reason)
        return False, None, None

    def _write_down(self, iteration: int, reason: str, found: list[BadMicroBatch]) -> None:
        """Rank 0 writes and says what all processes found."""
        gathered: list[list[BadMicroBatch]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, found)
        if torch.distributed.get_rank() == 0:
            every = [bad for some in gathered for bad in some]
            for bad in every:
                print(
                    f" iteration {iteration}: {reason}; rank {bad.rank}, micro-batch {bad.micro_batch}, "
                    f"loss {bad.loss:.4g}, records {', '.join(bad.record_ids)}",
                    flush=True,
                )
            if self.written_down is not None:
                with self.written_down.open("a") as stream:
                    stream.writelines(bad.line() + "\n" for bad in every)
        torch.distributed.barrier()  # nobody ends before it is written

    def _follow_policy(self, iteration: int, reason: str) -> None:
        where = f"; its records are in {self.written_down}" if self.written_down else ""
        what = f"iteration {iteration}: {reason}{where}"
        if self.policy == "rollback":
            save = get_args().save
            if torch.distributed.get_rank() == 0 and save:
                windows = sorted(read_windows(save) | {iteration})
                write_text(Path(save) / WINDOWS, json.dumps(windows) + "\n")
            torch.distributed.barrier()
            _end(f"{what}; going back to the last checkpoint, to leave this iteration out", ROLL_BACK)
        self.skipped += 1
        if self.policy == "stop":
            remedy = "take these records out of the data, or set ON_BAD_LOSS=skip or rollback"
            _end(f"error: {what}; nothing was saved since; {remedy}", 1)
        if self.skipped > MOST_SKIPPED:
            remedy = "lower LR, or start from an older checkpoint"
            _end(f"error: {what}; so were the {MOST_SKIPPED} before, so the weights may be bad; {remedy}", 1)
        print_rank_0(f" iteration {iteration} is dropped: weights and learning-rate schedule stay as they were")


def _end(sentence: str, code: int) -> None:
    if torch.distributed.get_rank() == 0:
        print(sentence, file=sys.stderr, flush=True)
    sys.exit(code)


def _speaks_for_losses() -> bool:
    """One process of every tensor-parallel group on the last stage; context-parallel ones have parts of the sums."""
    return mpu.is_pipeline_last_stage(ignore_virtual=True) and mpu.get_tensor_model_parallel_rank() == 0


def _sums_of_step() -> Tensor:
    """[micro-batches, 2] sum of losses and labels, of all context-parallel ranks; [0, 2] before the last stage."""
    if not _noted:
        return torch.zeros(0, 2, dtype=torch.float64)
    sums = torch.stack([sums for _, sums in _noted]).double()
    if mpu.get_context_parallel_world_size() > 1:
        torch.distributed.all_reduce(sums, group=mpu.get_context_parallel_group())
    return sums.cpu()


def _draw(data: Any) -> None:
    """Take a step's micro-batches from every loader of this process, for nothing."""
    for iterator in data if isinstance(data, list) else [data]:
        if iterator is not None:
            for _ in range(get_num_microbatches()):
                next(iterator)
