"""Asks a trained LLaVA a published benchmark.  Started by evaluate_llava.sh, whose --help tells all."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.llava_mcore.engine_options import engine_of, exit_code, ray_engines_of, sampling_of
from megatron_patch.errors import UserError
from megatron_patch.evaluation import run
from megatron_patch.evaluation.benchmarks import find_benchmark, read_questions
from megatron_patch.evaluation.metrics import Scores, Table, find_metric
from megatron_patch.evaluation.question import Question, rotations, with_other_images
from megatron_patch.evaluation.report import Sample, draw_results, draw_sheet, table_text
from megatron_patch.evaluation.source import Source
from megatron_patch.inference.engine import folder_kind
from megatron_patch.launch.asking import COMMANDS


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    return COMMANDS["evaluate"].parser().parse_args(words)


@dataclass(frozen=True)
class Outcome:
    """What is told at the end; table: of a part there is none."""

    table: Table | None
    remarks: list[str]
    file: Path


def evaluate(arguments: argparse.Namespace) -> Outcome:
    """Everything that can be wrong is looked at before anything is created.

    Raises:
        UserError: arguments or data are wrong, or the output belongs to another run.
    """
    benchmark = find_benchmark(arguments.benchmark)
    metric = arguments.metric or benchmark.metric
    judge = find_metric(metric)
    folder_kind(arguments.model)
    images = None if arguments.images is None else arguments.images.absolute()
    source = Source(arguments.data.absolute(), images)
    questions = _asked(read_questions(benchmark, source), arguments)
    options = ("engine", "dtype", "template", "batch_size", "limit", "circular", "swap_images")
    settings = run.settings_of(
        sampling_of(arguments),
        benchmark=benchmark.name,
        data=str(arguments.data.absolute()),
        model=str(arguments.model.absolute()),
        weights=run.weights_of(arguments.model),
        **{name: getattr(arguments, name) for name in options},
    )
    output = arguments.output
    run.check_folder(output, settings)
    batches = run.batches_of(questions, arguments.batch_size)
    if arguments.merge:
        answers = run.merge(output, questions, arguments.batch_size)
    else:
        part = run.Part(*arguments.part)
        mine, file = part.of(batches), output / part.file
        if not run.is_complete(file, mine):
            sampling = sampling_of(arguments)
            if arguments.ray_address is None:
                with engine_of(arguments) as engine:  # of several ranks only the first one comes here
                    run.begin(output, settings)
                    run.ask(engine, mine, file, sampling)
            else:
                with ray_engines_of(arguments, source.places(), output) as actors:
                    run.begin(output, settings)
                    run.ask_by(run.answer_by(actors, sampling), mine, file)
        answers = run.read_answers(file, mine)
        if part.count > 1:
            remark = f"{len(answers)} answers; --merge makes the results when all parts are there"
            return Outcome(None, [remark], file)
    table, scores = run.score(output, settings, questions, answers, (metric, judge), dict(source.left_out))
    draw_results(output / "results.png", benchmark.name, table)
    draw_sheet(output / "answers.png", _samples(questions, [line["answer"] for line in answers], scores))
    return Outcome(table, _remarks(answers, source), output / run.RESULTS)


def _asked(questions: list[Question], arguments: argparse.Namespace) -> list[Question]:
    """Those of the questions that are asked, as they are asked.  Raises UserError."""
    if arguments.swap_images:
        questions = with_other_images(questions)
    questions = questions[: arguments.limit]
    if arguments.circular:
        questions = [turned for question in questions for turned in rotations(question)]
        if not any(question.choices for question in questions):
            raise UserError(f"--circular rotates choices, and {arguments.benchmark} has none; leave it out")
    return questions


def _samples(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> list[Sample]:
    known: Sequence[float | None] = scores or [None] * len(answers)
    return [Sample.of(*of_question) for of_question in zip(questions, answers, known, strict=True)]


def _remarks(answers: Sequence[dict], source: Source) -> list[str]:
    """What a reader of the table should know."""
    found = [f"{count} questions were left out: {reason}" for reason, count in source.left_out.items()]
    if failed := [line for line in answers if line["finish_reason"] == run.FAILED]:
        found.append(f"{len(failed)} questions could not be asked and count as wrong; the first: {failed[0]['error']}")
    if cut := sum(line["finish_reason"] == "length" for line in answers):
        found.append(f"{cut} answers were cut off by --max-new-tokens")
    return found


def main() -> None:
    outcome = evaluate(parse_arguments())
    if outcome.table is not None:
        print(table_text(outcome.table))
    print(*outcome.remarks, outcome.file, sep="\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
