"""The benchmarks: one file each, named as the benchmark is.  A file defines `read` and `METRIC` and says its format.

METRIC = "exact_match"                          # a name of metrics.METRICS
def read(source: Source) -> Iterator[Question]  # raises UserError
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from megatron_patch.errors import UserError
from megatron_patch.evaluation.question import Question
from megatron_patch.evaluation.source import Source

BENCHMARKS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


@dataclass(frozen=True)
class Benchmark:
    """What a file of this folder defines; format: its docstring."""

    name: str
    metric: str
    format: str
    read: Callable[[Source], Iterator[Question]]


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name.  Raises UserError."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark is {name!r}; wanted one of {', '.join(BENCHMARKS)}")
    module = import_module(f"{__name__}.{name}")
    return Benchmark(name, module.METRIC, module.__doc__ or "", module.read)


def read_questions(benchmark: Benchmark, source: Source) -> list[Question]:
    """All questions, in the order of the files.  Raises UserError: also where there is none, or two share an id."""
    questions = list(benchmark.read(source))
    if not questions:
        reasons = "".join(f" ({count} left out: {reason})" for reason, count in source.left_out.items())
        raise UserError(f"{source.data}: holds no question{reasons}")
    (known, times), *_ = Counter(question.id for question in questions).most_common(1)
    if times > 1:
        raise UserError(f"{source.data}: {times} questions have the id {known!r}; wanted each id once")
    return questions
