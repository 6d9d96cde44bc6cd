"""Sample answers: at each validation the model answers the first questions of the validation set, greedily.

Every process of the run generates, so that every collective of a forward pass has its peers; nothing is cached, nothing
is drawn at random and the loaders are not touched, so training goes on as without it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_patch import device
from megatron_patch.atomic_files import write_text
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.prompts import Prompts, Question

NEW_TOKENS = 32
# Lengths are rounded up (a token never sees what follows it): sequence parallelism and fp8 kernels want multiples.
LENGTH_STEP = 16


class SampleGeneration:
    """Megatron's hooks of an evaluation for what is no loss: `generate` on all ranks, `tell` on the last.

    Args:
        output: the run's own folder; answers/iter_0000010.jsonl is written there.
    """

    def __init__(self, path: str, settings: DataConfig, count: int, tensor: int, output: Path | None) -> None:
        """path: the validation set; tensor: tensor-parallel size."""
        self._questions = Prompts(path, settings, count)
        self._step = LENGTH_STEP * tensor
        self._output = output

    def generate(self, model: list[torch.nn.Module]) -> list[str]:
        """One answer for each question.  Megatron has set the model to evaluation and switched gradients off."""
        return [self._answer(model[0], question) for question in self._questions.found]

    def _answer(self, model: torch.nn.Module, question: Question) -> str:
        here = device.current_device()
        pixels = torch.from_numpy(question.pixels).to(here)
        answer: list[int] = []
        while len(answer) < NEW_TOKENS and not self._questions.is_complete(answer):
            length = len(question.tokens) + len(answer)
            row = np.full((1, -(-length // self._step) * self._step), self._questions.pad_token_id)
            row[0, :length] = [*question.tokens, *answer]
            logits = model(tokens=torch.from_numpy(row).to(here), pixels=pixels)  # [1, S, V]
            answer.append(int(logits[0, length - 1].argmax()))
        return self._questions.text(answer)

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
