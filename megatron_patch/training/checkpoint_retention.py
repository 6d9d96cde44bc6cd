"""Which checkpoints are retained (whole ones, the last N, the best validation), and what a save leaves behind.

checkpoint/iter_0000010/        weights and optimizer; finished once the tracker names it or a later one
checkpoint/data/iter_0000010/   the loaders' state, and notes.json: what loss_spikes.py remembers
checkpoint/best.json            {"iteration": 10, "loss": 1.9}, or "score" in place of the loss
checkpoint/best/                that iteration as a checkpoint of its own, by links: export it, or start from it
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args
from torch.distributed.checkpoint import CheckpointException

from megatron_patch import device, llava_folder
from megatron_patch.atomic_files import write_text
from megatron_patch.checkpoint_files import TRACKER, checkpoint_format
from megatron_patch.errors import UserError
from megatron_patch.training.forward_step import LOSS
from megatron_patch.training.loader_state import DATA_FOLDER

BEST, BEST_FILE, NOTES = "best", "best.json", "notes.json"
SIGN = {"loss": 1, "score": -1}  # what is least when multiplied with it is the best
DELETED = "deleted_"  # a folder under this name is on its way out


def folder_name(iteration: int) -> str:
    """Megatron's name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def tracked(folder: Path) -> int | None:
    """Iteration that the tracker of a folder of checkpoints names; None without one (or with `release`)."""
    tracker = folder / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text.isdecimal() else None


def _iterations(folder: Path) -> dict[int, Path]:
    return {int(path.name[5:]): path for path in folder.glob("iter_*") if path.name[5:].isdecimal()}


def _delete(path: Path) -> None:
    """Rename, then delete: half a folder is never met under its own name."""
    if path.is_dir():
        going = path.with_name(DELETED + path.name)
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def tidy(folder: Path) -> list[str]:
    """Remove what killed saves and killed deletions left; returns the names of the iterations that were not whole."""
    newest = tracked(folder)
    broken = [
        path for number, path in sorted(_iterations(folder).items()) if number != newest and not checkpoint_format(path)
    ]
    for path in (*broken, *folder.glob(f"{DELETED}*"), *(folder / DATA_FOLDER).glob(f"{DELETED}*")):
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in broken]


def prune(folder: Path, last: int, protected: set[int]) -> list[int]:
    """Delete iterations older than the newest finished one, but for the `last` and the `protected`.

    Returns those deleted, oldest first.
    """
    newest = tracked(folder)
    if newest is None or last == 0:
        return []
    finished = sorted(number for number in _iterations(folder) if number <= newest)
    gone = sorted(set(finished[:-last]) - protected)
    for number in gone:
        _delete(folder / folder_name(number))
    known = {*_iterations(folder), newest}
    for number, path in _iterations(folder / DATA_FOLDER).items():
        if number < newest and number not in known:
            _delete(path)
    return gone


def read_best(folder: Path, measure: str = "loss") -> tuple[int | None, float]:
    """(iteration, value) of the best checkpoint so far; the worst of values where another measure has found it."""
    where = folder / BEST_FILE
    if not where.is_file():
        return None, SIGN[measure] * math.inf
    found = json.loads(where.read_text())
    return found["iteration"], found.get(measure, SIGN[measure] * math.inf)


def record_best(folder: Path, iteration: int, value: float, measure: str = "loss") -> None:
    """Make best/ refer to `iteration`, whose checkpoint is finished.  At every moment it refers to a whole one."""
    best = folder / BEST
    best.mkdir(exist_ok=True)
    for name in (llava_folder.NAME, folder_name(iteration)):
        if not (best / name).is_symlink():
            (best / name).symlink_to(Path("..") / name)
    write_text(best / TRACKER, str(iteration))
    write_text(folder / BEST_FILE, json.dumps({"iteration": iteration, measure: value}) + "\n")
    for number, link in _iterations(best).items():
        if number != iteration:
            link.unlink()


class Keeper:
    """Around the saves and evaluations of a run.  Rank 0 alone touches the folder."""

    def __init__(
        self,
        folder: Path,
        last: int,
        best: bool,
        notes: Callable[[], dict[str, Any]],
        score: Callable[[], float | None] | None = None,
    ) -> None:
        """
        Args:
            folder: of the checkpoints (--save).
            last: so many are retained; 0: all.
            best: keep the best validation too.
            notes: what else to write down with each save, for read_notes().
            score: of the latest validation, the same on all ranks: the highest is the best, not the lowest loss.
        """
        self.folder, self.last, self.best, self.notes = folder, last, best, notes
        self.saved: int | None = None  # iteration of the last save of this start
        self._score, self.measure = score, "loss" if score is None else "score"
        self.evaluated: tuple[int, float] | None = None  # the latest validation: iteration, loss or score
        self.best_value = read_best(folder, self.measure)[1]
        self._iteration = 0

    def wants_save(self, iteration: int) -> bool:
        """Is this iteration the best so far?"""
        return self.best and self.evaluated is not None and self.evaluated == (iteration, self.best_value)

    def save(self, save: Callable[..., None]) -> Callable[..., None]:
        """Wrap Megatron's save_checkpoint_and_time(iteration, ...)."""

        def wrapped(iteration: int, *args: Any, **kwargs: Any) -> None:
            if kwargs.get("non_persistent_ckpt"):
                save(iteration, *args, **kwargs)
                return
            if iteration == self.saved or self._resumed_at(iteration):
                return  # it is there, and a second save would put the only whole one at risk
            try:
                if torch.distributed.get_rank() == 0:
                    _delete(self.folder / folder_name(iteration))
                    self._write_notes(iteration)
                torch.distributed.barrier()
                save(iteration, *args, **kwargs)
            except (Exception, CheckpointException) as error:  # torch's own is no Exception
                if _disk_is_full(self.folder, error):
                    raise UserError(self._sentence(iteration)) from None
                raise
            self.saved = iteration
            self.settle()

        return wrapped

    def _resumed_at(self, iteration: int) -> bool:
        args = get_args()
        return iteration == args.iteration > 0 and args.load == args.save and tracked(self.folder) == iteration

    def _sentence(self, iteration: int) -> str:
        newest = tracked(self.folder)
        kept = "no checkpoint was finished before" if newest is None else f"that of iteration {newest} is kept"
        return (
            f"the disk of {self.folder} is full, so the checkpoint of iteration {iteration} was not written; {kept}; "
            "free some space (KEEP_LAST=N deletes older ones) and start the same command again"
        )

    def _write_notes(self, iteration: int) -> None:
        here = self.evaluated is not None and self.evaluated[0] == iteration
        beside = self.folder / DATA_FOLDER / folder_name(iteration)
        found = {**self.notes(), f"validation {self.measure}": self.evaluated[1] if here else None}
        write_text(beside / NOTES, json.dumps(found) + "\n")

    def settle(self) -> None:
        """Record the best and delete the old, as far as finished checkpoints allow: an asynchronous save takes time."""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() != 0:
            return
        newest = tracked(self.folder)
        if newest is None:
            return
        iteration, before = read_best(self.folder, self.measure)
        if self.best:
            value = self.evaluated[1] if self.evaluated and self.evaluated[0] == newest else None
            value = read_notes(self.folder, newest).get(f"validation {self.measure}") if value is None else value
            better = value is not None and SIGN[self.measure] * value < SIGN[self.measure] * before
            if better and checkpoint_format(self.folder / folder_name(newest)):
                record_best(self.folder, newest, value, self.measure)
                iteration = newest
                print(f" best validation {self.measure} so far: {value:.6f} at iteration {newest}", flush=True)
        gone = prune(self.folder, self.last, {iteration} if iteration is not None else set())
        if gone:
            print(f" deleted the checkpoints of iterations {', '.join(map(str, gone))}", flush=True)

    def watch_evaluation(self, evaluate: Callable[..., tuple]) -> Callable[..., tuple]:
        """Wrap Megatron's evaluate(...) -> (losses on the last stage, ...)."""

        def wrapped(*args: Any, **kwargs: Any) -> tuple:
            result = evaluate(*args, **kwargs)
            found = (result[0] or {}).get(LOSS)
            loss = torch.tensor([-math.inf if found is None else float(found)], device=device.current_device())
            torch.distributed.all_reduce(loss, op=torch.distributed.ReduceOp.MAX)
            value = loss.item() if self._score is None else self._score()
            if value is not None and math.isfinite(value):
                self.evaluated = (self._iteration, value)
                self.best_value = min(self.best_value, value, key=lambda found: SIGN[self.measure] * found)
            return result

        return wrapped

    def number_evaluation(self, evaluate_and_print: Callable[..., None]) -> Callable[..., None]:
        """Wrap Megatron's evaluate_and_print_results(prefix, forward, data, model, iteration, ...)."""

        def wrapped(prefix: str, step: Any, data: Any, model: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
            self._iteration = iteration
            evaluate_and_print(prefix, step, data, model, iteration, *args, **kwargs)

        return wrapped


def read_notes(folder: Path, iteration: int) -> dict[str, Any]:
    """What was written down with the checkpoint of `iteration`; empty when nothing was."""
    where = folder / DATA_FOLDER / folder_name(iteration) / NOTES
    return json.loads(where.read_text()) if where.is_file() else {}


def _disk_is_full(folder: Path, error: BaseException) -> bool:
    """Does an error, or one behind it, say so?  Helpers of a save hide it: then, would one like the last fit?"""
    newest = tracked(folder)
    files = (folder / folder_name(newest)).iterdir() if newest is not None else ()
    if shutil.disk_usage(folder).free < sum(path.stat().st_size for path in files):
        return True
    marks = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "PytorchStreamWriter failed writing")
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(mark in str(seen) for mark in marks):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
