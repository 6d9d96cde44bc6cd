"""When a run must end early: a signal (SIGTERM, or SIGUSR1 as SLURM warns), or its time limit.

The iteration under way is finished, a checkpoint saved, and the exit code is 0; the same command goes on from there.
Megatron knows one signal only, and its --exit-duration-in-mins leaves no room for the save.

Nothing heavy is imported above: `listen()` is called before torch is, so that a signal in the first seconds counts too.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
UNKNOWN_SAVE = 0.1  # of the time limit: left for the first save, before one has been measured
SPARE_ITERATIONS = 2

_received: list[int] = []


def listen() -> None:
    """From now on SIGTERM and SIGUSR1 are remembered instead of ending this process; loader workers ignore them.

    Schedulers signal every process of a job, but the last iteration still needs its loader.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _received.append(number))
    os.register_at_fork(after_in_child=_obey_the_parent_alone)


def _obey_the_parent_alone() -> None:
    """In a loader worker: only its parent, which says so by SIGTERM at the end, ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Signals wait until the end of the block, and processes started within it never get them: helpers of a save."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TimeLimit:
    """Is it time to save?  When the longest save so far and two of the longest iterations would only just fit."""

    def __init__(self, end: float | None, now: Callable[[], float] = time.time) -> None:
        """end: seconds since 1970, None: never; now: the clock."""
        self.end, self.now = end, now
        self.last = self.start = now()
        self.longest_save = self.longest_iteration = 0.0
        self._of_saves = 0.0  # seconds since `last` that were saves

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self.longest_save = max(self.longest_save, seconds)
        self._of_saves += seconds

    def iterated(self) -> bool:
        """An iteration (with its evaluation, if any) is over; returns whether to stop."""
        now = self.now()
        self.longest_iteration = max(self.longest_iteration, now - self.last - self._of_saves)
        self.last, self._of_saves = now, 0.0
        if self.end is None:
            return False
        save = self.longest_save or UNKNOWN_SAVE * (self.end - self.start)
        return now + save + SPARE_ITERATIONS * self.longest_iteration >= self.end


def _anywhere(*flags: bool) -> list[bool]:
    """Each flag: is it set on any process?  All processes call it."""
    import torch

    from megatron_patch import device

    found = torch.tensor([int(flag) for flag in flags], device=device.current_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def stop_in_time(
    decide: Callable[..., bool], save: Callable[..., None], wants_save: Callable[[int], bool], limit: TimeLimit
) -> Callable[..., bool]:
    """Wrap Megatron's checkpoint_and_decide_exit(model, optimizer, scheduler, iteration, flops, context, iterator).

    Args:
        decide: the function to wrap.
        save: Megatron's save_checkpoint_and_time, made to pass over an iteration that is saved already.
        wants_save: should this iteration be saved for another reason?  The same answer on every process.
        limit: of the run's time.
    """
    from megatron.training import get_args
    from megatron.training.utils import print_rank_0

    def wrapped(
        model: list, optimizer: Any, scheduler: Any, iteration: int, operations: float, context: dict, data: Any
    ) -> bool:
        leaves = decide(model, optimizer, scheduler, iteration, operations, context, data)
        signalled, late = _anywhere(bool(_received), limit.iterated())
        args = get_args()
        if args.save and (signalled or late or wants_save(iteration)):
            save(iteration, model, optimizer, scheduler, operations, context, train_data_iterator=data)
        if signalled or late:
            why = "a signal asked for it" if signalled else "the time limit is near"
            print_rank_0(
                f"stopped after iteration {iteration} of {args.train_iters}, for {why}; "
                + ("it is saved, and the same command goes on from it" if args.save else "nothing is saved")
            )
        return leaves or signalled or late

    return wrapped


def measure_saves(save: Callable[..., None], limit: TimeLimit) -> Callable[..., None]:
    """Wrap save_checkpoint_and_time: its seconds count for the time limit, and no signal disturbs it."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        begin = limit.now()
        with undisturbed():
            save(*args, **kwargs)
        limit.saved(limit.now() - begin)

    return wrapped
