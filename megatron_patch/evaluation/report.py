"""Results for people: a table, a plot, a contact sheet of some questions."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

from megatron_patch.data.image import open_image
from megatron_patch.data.rejection import RecordError
from megatron_patch.evaluation.metrics import Table
from megatron_patch.evaluation.question import Question

LONGEST_TITLE = 60  # characters of a question
RIGHT = 0.5  # a score from here on is green
COLOURS = {True: "green", False: "red", None: "black"}  # of an answer


@dataclass(frozen=True)
class Sample:
    """One field of the contact sheet; right: green or red, None: not known."""

    image: Path | bytes | None
    question: str
    answer: str
    truth: str
    right: bool | None

    @classmethod
    def of(cls, question: Question, answer: str, score: float | None) -> Self:
        """A question, what was answered, and its score of 0..1; None: the metric knows none of a single question."""
        truth = " / ".join(dict.fromkeys(question.references))
        image = question.images[0] if question.images else None
        return cls(image, question.text, answer, truth, None if score is None else score >= RIGHT)


def table_text(table: Table) -> str:
    """The table in columns; a figure that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = [["task", *names]]
    for task, row in table.items():
        cells = [f"{row[name]:.{0 if name == 'questions' else 1}f}" if name in row else "" for name in names]
        rows.append([task, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([task.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for task, *cells in rows
    )


def draw_results(file: Path, title: str, table: Table) -> None:
    """A panel per figure, a bar per task."""
    pyplot = _pyplot()
    names = list(dict.fromkeys(name for row in table.values() for name in row if name != "questions"))
    height = 1.2 + 0.3 * len(table)
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), height), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        rows = [(task, row[name]) for task, row in table.items() if name in row]
        bars = axis.barh([task for task, _ in rows], [value for _, value in rows])
        axis.bar_label(bars, fmt="%.1f", padding=2)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(f"{title}: {name}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def draw_sheet(file: Path, samples: Sequence[Sample], most: int = 40) -> None:
    """Contact sheet of evenly chosen samples: image, question, answer (green or red), truth where it differs."""
    pyplot = _pyplot()
    chosen = np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2 * columns, 2.35 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, chosen, strict=False):
        sample = samples[index]
        _draw_image(axis, sample)
        caption = sample.answer if sample.right else f"{sample.answer or '(nothing)'}  (truth: {sample.truth})"
        axis.text(
            *(0.5, -0.03, _shortened(caption)),
            color=COLOURS[sample.right],
            fontsize=10,
            ha="center",
            va="top",
            transform=axis.transAxes,
            parse_math=False,
        )
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def draw_over_time(file: Path, samples: Mapping[str, Sequence[Sample]]) -> None:
    """A row per question, a column per moment (its name above): image and question, then the answers."""
    pyplot = _pyplot()
    moments = list(samples)
    rows = max(1, *(len(of_moment) for of_moment in samples.values()))
    shape = {"figsize": (2 + 1.6 * len(moments), 1.5 * rows + 0.3), "squeeze": False}
    figure, axes = pyplot.subplots(rows, len(moments) + 1, **shape)
    for axis in axes.flat:
        axis.axis("off")
    for column, moment in enumerate(moments, 1):
        axes[0, column].set_title(moment, fontsize=9)
        for row, sample in enumerate(samples[moment]):
            _draw_image(axes[row, 0], sample)
            text = textwrap.fill(_shortened(sample.answer or "(nothing)"), 20)
            colour = COLOURS[sample.right]
            axes[row, column].text(0.5, 0.5, text, color=colour, fontsize=9, ha="center", va="center", parse_math=False)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _draw_image(axis: Any, sample: Sample) -> None:
    """The sample's image below its question."""
    if sample.image is not None:
        data = sample.image if isinstance(sample.image, bytes) else sample.image.read_bytes()
        with suppress(RecordError):  # one that the model could not see either
            axis.imshow(open_image(data))
    axis.set_title(_shortened(sample.question), fontsize=8, parse_math=False)


def _shortened(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= LONGEST_TITLE else f"{text[: LONGEST_TITLE - 1]}…"


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a model may write any character
    from matplotlib import pyplot

    return pyplot
