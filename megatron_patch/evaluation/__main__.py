"""Asks a trained LLaVA the questions of a published benchmark and scores its answers.

--output gets answers.jsonl, scored.jsonl, results.json, results.png (plot) and questions.png (contact sheet).  The same
command again goes on where it stopped; when everything is answered it scores anew, so --metric may change.  --part 1/4
answers a quarter of the questions, on as many machines or GPUs as there are parts; --merge makes the results of them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_patch.errors import UserError
from megatron_patch.evaluation import run
from megatron_patch.evaluation.benchmarks import BENCHMARKS, find_benchmark, read_questions
from megatron_patch.evaluation.metrics import METRICS, Scores, Table, find_metric
from megatron_patch.evaluation.pictures import Sample, draw_results, draw_sheet
from megatron_patch.evaluation.question import Question, rotations
from megatron_patch.evaluation.source import Source
from megatron_patch.inference import KINDS, Sampling, open_engine
from megatron_patch.inference.engine import DTYPES, folder_kind

MAX_NEW_TOKENS = 128  # as LLaVA-1.5's own evaluation of short answers


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(words)
    try:
        evaluate(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def evaluate(arguments: argparse.Namespace) -> None:
    """Everything that can be wrong is looked at before anything is created."""
    benchmark = find_benchmark(arguments.benchmark)
    metric = arguments.metric or benchmark.metric
    judge = find_metric(metric)
    folder_kind(arguments.model)
    source = Source(arguments.data, arguments.images)
    questions = read_questions(benchmark, source)[: arguments.limit]
    if arguments.circular:
        questions = [turned for question in questions for turned in rotations(question)]
        if not any(question.choices for question in questions):
            raise UserError(f"--circular rotates the choices of questions, and {benchmark.name} has none; leave it out")
    sampling = Sampling(arguments.max_new_tokens)
    settings = run.settings_of(
        sampling,
        benchmark=benchmark.name,
        data=str(arguments.data.resolve()),
        model=str(arguments.model.resolve()),
        weights=run.weights_of(arguments.model),
        template=arguments.template,
        engine=arguments.engine,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        circular=arguments.circular,
    )
    run.check_folder(arguments.output, settings)
    batches = run.batches_of(questions, arguments.batch_size)
    if arguments.merge:
        answers = run.merge(arguments.output, questions, arguments.batch_size)
    else:
        mine, file = arguments.part.of(batches), arguments.output / arguments.part.file
        if not run.is_complete(file, mine):
            # Of several ranks only the first comes out of this call before all is answered.
            with open_engine(
                *(arguments.model, arguments.engine, arguments.dtype, arguments.template),
                tensor=arguments.tensor,
                pipeline=arguments.pipeline,
            ) as engine:
                run.begin(arguments.output, settings)
                run.ask(engine, mine, file, sampling)
        if int(os.environ.get("RANK", "0")) > 0:
            return
        answers = run.read_answers(file, mine)
        if arguments.part.count > 1:
            print(f"{file}: {len(answers)} answers; --merge makes the results when all parts are there")
            return
    table, scores = run.score(arguments.output, settings, questions, answers, (metric, judge), dict(source.left_out))
    draw_results(arguments.output / "results.png", benchmark.name, table)
    draw_sheet(arguments.output / "questions.png", _samples(questions, [line["answer"] for line in answers], scores))
    print(table_text(table))
    for what, count in _remarks(answers, source).items():
        print(f"{count} questions {what}")
    print(arguments.output / run.RESULTS)


def table_text(table: Table) -> str:
    """The table in columns; a figure that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    width = max(4, *map(len, table))
    lines = [f"{'task':<{width}}" + "".join(f"  {name:>10}" for name in names)]
    for task, row in table.items():
        cells = ["" if name not in row else f"{row[name]:.{0 if name == 'questions' else 1}f}" for name in names]
        lines.append(
            f"{task:<{width}}" + "".join(f"  {cell:>{max(10, len(n))}}" for cell, n in zip(cells, names, strict=True))
        )
    return "\n".join(lines)


def _samples(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> list[Sample]:
    return [
        Sample(
            question.images[0] if question.images else None,
            question.text,
            answers[number],
            " / ".join(dict.fromkeys(question.references)),
            None if scores is None else scores[number] >= 0.5,
        )
        for number, question in enumerate(questions)
    ]


def _remarks(answers: Sequence[dict], source: Source) -> dict[str, int]:
    """What a reader of the table should know, with counts."""
    failed = [line for line in answers if line["finish_reason"] == run.FAILED]
    found = {f"were left out: {reason}": count for reason, count in source.left_out.items()}
    if failed:
        found[f"could not be asked and count as wrong, as {failed[0]['error']}"] = len(failed)
    if cut := sum(line["finish_reason"] == "length" for line in answers):
        found["have an answer that --max-new-tokens cut off"] = cut
    return found


def _part(text: str) -> run.Part:
    """`2/4` -> the second of four parts."""
    number, _, count = text.partition("/")
    part = run.Part(int(number), int(count))
    if not 1 <= part.number <= part.count:
        raise ValueError(text)
    return part


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash examples/llava_mcore/evaluate_llava.sh",
        description=__doc__,
        epilog="Benchmarks and what their data is:\n\n" + "\n\n".join(map(_described, BENCHMARKS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # argparse names a type by its function when it refuses a value
    _part.__name__, _count.__name__ = "part (as 1/4)", "whole number from 1"
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported Hugging Face folder or Megatron checkpoint")
    add("--benchmark", required=True, metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    add("--data", type=Path, required=True, metavar="PATH", help="its files as published; see below")
    add("--images", type=Path, metavar="DIR", help="its images, where they do not lie beside the data")
    add("--output", type=Path, required=True, metavar="DIR", help="where answers and results go")
    sharing = parser.add_mutually_exclusive_group()
    sharing.add_argument("--part", type=_part, default=run.Part(), metavar="I/N", help="answer the I-th of N parts")
    sharing.add_argument("--merge", action="store_true", help="results of all parts, which are answered")
    add("--batch-size", type=_count, default=8, metavar="B", help="questions at a time; default: 8")
    add("--limit", type=_count, metavar="N", help="only the first N questions")
    add("--circular", action="store_true", help="ask with the choices in every rotation (MMBench's CircularEval)")
    add("--metric", metavar="NAME", help=f"in place of the benchmark's: {', '.join(METRICS)}")
    add("--max-new-tokens", type=_count, default=MAX_NEW_TOKENS, metavar="N", help="of an answer; default: 128")
    add("--engine", choices=KINDS, default="auto", help="default: as the folder is")
    add("--dtype", choices=tuple(DTYPES), default="auto", help="default: fp32 on a CPU, else that of the weights")
    add("--template", metavar="T", help="conversation template in place of the one of the training")
    add("--tensor", type=_count, default=1, metavar="TP", help="tensor-parallel size, under torchrun; default: 1")
    add("--pipeline", type=_count, default=1, metavar="PP", help="pipeline-parallel size, under torchrun; default: 1")
    return parser


def _described(name: str) -> str:
    benchmark = find_benchmark(name)
    return f"{name} ({benchmark.metric})\n  " + benchmark.format.strip().replace("\n", "\n  ")


if __name__ == "__main__":
    sys.exit(main())
