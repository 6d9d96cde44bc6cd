"""EVAL_BENCHMARK: the questions that a run asks at its validations, read and encoded before anything is created."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.data.answer import AnswerReader
from megatron_patch.evaluation.benchmarks import find_benchmark, read_questions
from megatron_patch.evaluation.metrics import Metric, find_metric
from megatron_patch.evaluation.question import Question
from megatron_patch.evaluation.source import Source
from megatron_patch.inference.interface import Prompt
from megatron_patch.inference.prompt import PromptEncoder
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings


@dataclass(frozen=True)
class Benchmark:
    """Some questions of a published benchmark, as the model is shown them."""

    name: str  # of evaluation.benchmarks
    judge: Metric
    questions: Sequence[Question]
    prompts: Sequence[Prompt]
    reader: AnswerReader
    pad_token_id: int


def read_benchmark(
    arguments: argparse.Namespace, folder: LlavaFolder, trained_with: TrainingSettings
) -> Benchmark | None:
    """What the arguments --eval-benchmark... name; None: nothing.

    Args:
        folder: the `llava/` folder of the run.
        trained_with: how the run's records become tokens and pixels.
    Raises:
        UserError: the benchmark is not known or cannot be read, or a question cannot be asked.
    """
    name, data, count = arguments.eval_benchmark, arguments.eval_benchmark_data, arguments.eval_benchmark_questions
    if name is None:
        return None
    known = find_benchmark(name)
    judge = find_metric(known.metric)
    every = read_questions(known, Source(data, arguments.eval_benchmark_images))
    count = min(count, len(every))
    questions = [every[number * len(every) // count] for number in range(count)]  # evenly chosen
    encoder = PromptEncoder(folder, trained_with.conversation_template, trained_with)
    prompts = [encoder.encode(question.request) for question in questions]
    return Benchmark(name, judge, questions, prompts, encoder.reader, encoder.pad_token_id)
