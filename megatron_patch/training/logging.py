"""Around Megatron's log line: samples per second, the account of records, and losses that a resumed run prints like one
never stopped.
"""

import time
from collections.abc import Callable
from typing import Any

from megatron.training import get_args, get_tensorboard_writer
from megatron.training.utils import print_rank_last

from megatron_patch.training import ledger


def complete_log(training_log: Callable[..., Any], counts: Callable[[], dict[str, int]]) -> Callable[..., Any]:
    """Wrap Megatron's training_log(loss_dict, total_loss_dict, learning_rate, iteration, ...).

    `counts` gives those of this process's loader.

    The rate is that of the iterations since the last line, checkpoints and evaluations between them included.
    """
    since = {"time": time.perf_counter(), "iteration": None}

    def wrapped(loss_dict: dict, total_loss_dict: dict, learning_rate: float, iteration: int, *args, **kwargs) -> Any:
        settings = get_args()
        # Megatron logs the first iteration after a start without resetting its sums.  Where that iteration ends an
        # interval of its own, the next line would show an average over two intervals.
        if iteration % settings.log_interval == 0:
            kwargs["is_first_iteration"] = False
        result = training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        if iteration % settings.log_interval == 0:
            _log_account(ledger.totals(counts()), iteration)
        now = time.perf_counter()
        if since["iteration"] is None:
            since.update(time=now, iteration=iteration)  # the first iteration warms up
        elif iteration % settings.log_interval == 0:
            samples = (iteration - since["iteration"]) * settings.global_batch_size
            rate = samples / (now - since["time"])
            print_rank_last(f" samples per second: {rate:.2f} | per device: {rate / settings.world_size:.2f}")
            if writer := get_tensorboard_writer():
                writer.add_scalar("samples per second", rate, iteration)
            since.update(time=now, iteration=iteration)
        return result

    return wrapped


def _log_account(found: dict[str, int], iteration: int) -> None:
    print_rank_last(ledger.sentence(found))
    if writer := get_tensorboard_writer():
        for name, count in found.items():
            if count or name in ("kept", "truncated", "skipped"):
                writer.add_scalar(f"records/{name}", count, iteration)
