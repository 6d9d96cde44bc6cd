"""A small benchmark that the model under training answers at each validation: its score as a curve, and a sheet of
answers over time.

Below the run's own folder: benchmark/iter_0000010.jsonl (a line per question with answer and score) and
benchmark/answers.png (some questions, and what was answered at each validation).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_patch.atomic_files import write_text
from megatron_patch.evaluation.metrics import Scores, Table
from megatron_patch.evaluation.report import Sample, draw_over_time
from megatron_patch.training.benchmark import Benchmark
from megatron_patch.training.generation import GreedyGeneration
from megatron_patch.training.logging import record_scalars

FOLDER, SHEET = "benchmark", "answers.png"
DRAWN = 8  # questions and validations on the sheet, at most


class BenchmarkScores:
    """Megatron's hooks of an evaluation for what is no loss: `generate` on all ranks, `tell` on the last.

    Args:
        output: the run's own folder.

    Attributes:
        score: the first figure over all questions at the latest validation, the same on all ranks; None before.
    """

    def __init__(self, benchmark: Benchmark, output: Path | None) -> None:
        self._asked, self._folder = benchmark, output / FOLDER if output else None
        self._generation = GreedyGeneration(benchmark.reader, benchmark.pad_token_id)
        self._scores: Scores = None
        self._table: Table = {}
        self.score: float | None = None

    def generate(self, model: list[torch.nn.Module]) -> list[str]:
        """One answer for each question.  Megatron has set the model to evaluation."""
        answers = self._generation.texts(model, self._asked.prompts)
        self._scores, self._table = self._asked.judge(self._asked.questions, answers)
        self.score = next(iter(self._figures().values()))
        return answers

    def _figures(self) -> dict[str, float]:
        return {name: value for name, value in self._table["all"].items() if name != "questions"}

    def tell(self, answers: list[str], iteration: int, _: SummaryWriter) -> None:
        """To the log, TensorBoard, W&B and the run's folder."""
        figures = self._figures()
        told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
        print(f" {self._asked.name} at iteration {iteration}: {told} ({len(answers)} questions)", flush=True)
        record_scalars({f"benchmark/{self._asked.name} {name}": value for name, value in figures.items()}, iteration)
        if self._folder is None:
            return
        scores: Sequence[float | None] = self._scores or [None] * len(answers)
        lines = [
            json.dumps({"id": question.id, "answer": answer, "score": score}, ensure_ascii=False) + "\n"
            for question, answer, score in zip(self._asked.questions, answers, scores, strict=True)
        ]
        write_text(self._folder / f"iter_{iteration:07d}.jsonl", "".join(lines))
        draw_over_time(self._folder / SHEET, self._drawn())

    def _drawn(self) -> dict[str, list[Sample]]:
        """For each validation so far, those of earlier starts too, what was answered to the first questions."""
        files = sorted(self._folder.glob("iter_*.jsonl"))
        last = len(files) - 1
        chosen = sorted({round(place * last / (DRAWN - 1)) for place in range(DRAWN)}) if last else [0]
        found = {}
        for file in (files[place] for place in chosen):
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            known = {line["id"]: line for line in lines}
            asked = [question for question in self._asked.questions[:DRAWN] if question.id in known]
            found[file.stem.removeprefix("iter_").lstrip("0") or "0"] = [
                Sample.of(question, known[question.id]["answer"], known[question.id]["score"]) for question in asked
            ]
        return found
