"""Sample answers: at each validation the model answers the first questions of the validation set, greedily.

Every process of the run takes part, nothing is drawn at random and the loaders are not touched, so training goes on as
without it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_patch.atomic_files import write_text
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.prompts import Prompts
from megatron_patch.training.generation import GreedyGeneration


class SampleGeneration:
    """Megatron's hooks of an evaluation for what is no loss: `generate` on all ranks, `tell` on the last.

    Args:
        path: the validation set.
        output: the run's own folder; answers/iter_0000010.jsonl is written there.
    """

    def __init__(self, path: str, settings: DataConfig, count: int, output: Path | None) -> None:
        self._questions = Prompts(path, settings, count)
        self._generation = GreedyGeneration(self._questions.reader, self._questions.pad_token_id)
        self._output = output

    def generate(self, model: list[torch.nn.Module]) -> list[str]:
        """One answer for each question.  Megatron has set the model to evaluation."""
        return self._generation.texts(model, self._questions.found)

    def tell(self, answers: list[str], iteration: int, writer: SummaryWriter) -> None:
        """To TensorBoard (an image and a text for each question) and answers/iter_0000010.jsonl."""
        lines = []
        for number, (question, answer) in enumerate(zip(self._questions.found, answers, strict=True), 1):
            told = {"record": question.record_id, "question": question.text, "reference": question.reference}
            lines.append(json.dumps(told | {"answer": answer}, ensure_ascii=False))
            text = "  \n".join(f"**{name}:** {value}" for name, value in (told | {"answer": answer}).items())
            writer.add_text(f"answers/{number}", text, iteration)
            if len(question.pixels):
                writer.add_image(f"answers/{number}", np.concatenate(list(question.pixels), axis=2), iteration)
        if self._output is not None:
            write_text(self._output / "answers" / f"iter_{iteration:07d}.jsonl", "\n".join(lines) + "\n")
