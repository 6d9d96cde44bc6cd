"""What a run came to: printed at its end and kept as summary.json."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from megatron_patch.atomic_files import write_text
from megatron_patch.checkpoint_files import TRACKER, newest_iteration
from megatron_patch.training.record_counters import Totals, sentence
from megatron_patch.training.throughput import Throughput
from megatron_patch.training.timer import Timer, as_clock

FILE = "summary.json"
EXPORT = "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Fields as summary.json holds them.  Times in seconds, memory in bytes."""

    ending: str
    iteration: int
    train_iters: int
    samples: int  # trained on since this start
    tokens: int
    records: dict[str, int]  # of the whole run, earlier starts with as many ranks included
    seconds: dict[str, float]  # total, training, and what went elsewhere
    throughput: dict[str, float]  # of all steps but the first, evaluating and saving left out
    memory_bytes: int
    loss: float | None  # of the last iteration
    validation_loss: float | None
    checkpoint: str | None
    next: list[str]  # commands

    @classmethod
    def of(
        cls,
        *,
        ending: str,
        iteration: int,
        train_iters: int,
        totals: Totals,
        watch: Timer,
        rates: Throughput | None,
        loss: float | None,
        validation_loss: float | None,
        save: str | None,
        stage_1: bool,
        model_size: str | None,
        precision: str,
        output: Path | None,
    ) -> "Summary":
        """save: folder of checkpoints; stage_1: the language model was frozen, so stage 2 may follow; precision: PR."""
        checkpoint = _newest(save)
        size = model_size or "MODEL_SIZE"
        steps = []
        if iteration < train_iters:
            again = (
                "starts at iteration 1, for nothing was saved" if checkpoint is None else "goes on from the checkpoint"
            )
            steps.append(f"the same command again {again}")
        if checkpoint is not None:
            folder = Path(checkpoint).parent
            target = (output or folder.parent) / "hf"
            command = ("bash", EXPORT, size, folder, "none", target, 1, 1, "true", precision)
            steps.append(f"{shlex.join(map(str, command))} HF_CKPT_PATH (the model of Hugging Face that it came from)")
            if stage_1 and iteration >= train_iters:
                steps.append(
                    f"run_sft_mcore_llava.sh (stage 2) with PRETRAIN_CHECKPOINT_PATH={shlex.quote(str(folder))}"
                )
        return cls(
            ending=ending,
            iteration=iteration,
            train_iters=train_iters,
            samples=totals.work.records,
            tokens=totals.work.tokens,
            records={name: count for name, count in totals.records.items() if count},
            seconds={"total": watch.total(), "training": watch.training(), **watch.aside},
            throughput=rates.scalars() if rates else {},
            memory_bytes=totals.memory_bytes,
            loss=loss,
            validation_loss=validation_loss,
            checkpoint=checkpoint,
            next=steps,
        )

    def text(self) -> str:
        """Some lines for people."""
        elsewhere = "".join(
            f", {name} {as_clock(spent)}" for name, spent in self.seconds.items() if name not in ("total", "training")
        )
        losses = [
            f"{name} {value:.4f}"
            for name, value in (("loss", self.loss), ("validation loss", self.validation_loss))
            if value is not None
        ]
        rates = " | ".join(f"{value:.4g} {name}" for name, value in self.throughput.items())
        lines = {
            "ended": f"{self.ending}, iteration {self.iteration} of {self.train_iters}",
            "trained on": f"{self.samples} samples, {self.tokens} tokens since this start",
            "records": sentence(_all_entries(self.records)).removeprefix(" records: "),
            "time": f"{as_clock(self.seconds['total'])}: training {as_clock(self.seconds['training'])}{elsewhere}",
            "throughput": rates,
            "memory": f"{self.memory_bytes / 2**30:.2f} GiB at most in one process",
            "result": ", ".join(losses),
            "checkpoint": self.checkpoint or "none",
            "next": "\n             ".join(self.next),
        }
        return "\n".join(["summary", *(f"  {name:<10} {value}" for name, value in lines.items() if value)])

    def write(self, file: Path) -> None:
        """Whole or not at all."""
        write_text(file, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def _all_entries(records: dict[str, int]) -> dict[str, Any]:
    return dict.fromkeys(("kept", "truncated", "skipped", "excluded"), 0) | records


def _newest(save: str | None) -> str | None:
    if save is None or not (Path(save) / TRACKER).is_file():
        return None
    return str(newest_iteration(Path(save)))
