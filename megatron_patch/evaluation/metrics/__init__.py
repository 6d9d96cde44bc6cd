"""The metrics by name.  Each makes of questions and answers one score per question and a table.

The table is {task: {figure: value}}, `all` first: figures are percentages (MME: 0..200 a task, 0..2000 and 0..800 in
all; CIDEr is not bounded), `questions` is a count.

vqa_accuracy.py   ten people's answers
text.py           equality, edit distance (ANLS), a tolerance (relaxed accuracy)
choice.py         the letter that an answer means
yes_no.py         POPE, MME
captions.py       BLEU and CIDEr, by libraries
"""

from collections.abc import Callable, Sequence
from math import fsum

from megatron_patch.errors import UserError
from megatron_patch.evaluation.metrics import captions, choice, text, yes_no
from megatron_patch.evaluation.metrics.vqa_accuracy import vqa_accuracy
from megatron_patch.evaluation.question import Question

Table = dict[str, dict[str, float]]
Scores = list[float] | None  # 0..1 of each question; None: the metric knows no score of a single one
Metric = Callable[[Sequence[Question], Sequence[str]], tuple[Scores, Table]]


def _mean(score: Callable[[str, Question], float]) -> Metric:
    """A metric that is the mean of the questions' scores."""

    def metric(questions: Sequence[Question], answers: Sequence[str]) -> tuple[Scores, Table]:
        scores = [score(answer, question) for question, answer in zip(questions, answers, strict=True)]
        return scores, by_task(
            questions, lambda rows: _figures([questions[n] for n in rows], [scores[n] for n in rows])
        )

    return metric


def _figures(questions: Sequence[Question], scores: Sequence[float]) -> dict[str, float]:
    """accuracy, and circular_accuracy where choices were rotated: the questions that are right in every rotation."""
    figures = {"accuracy": 100 * fsum(scores) / len(scores)}
    groups: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        if question.choices and question.group:
            groups.setdefault(question.group, []).append(score)
    if groups:
        figures["circular_accuracy"] = 100 * sum(min(each) == 1 for each in groups.values()) / len(groups)
    return figures


def by_task(questions: Sequence[Question], figures: Callable[[list[int]], dict[str, float]]) -> Table:
    """The figures of all questions, then of each task, in the order in which tasks appear; questions by number."""
    tasks: dict[str, list[int]] = {"all": list(range(len(questions)))}
    for number, question in enumerate(questions):
        if question.task:
            tasks.setdefault(question.task, []).append(number)
    return {task: {"questions": len(rows)} | figures(rows) for task, rows in tasks.items()}


def _pope(questions: Sequence[Question], answers: Sequence[str]) -> tuple[Scores, Table]:
    def figures(rows: list[int]) -> dict[str, float]:
        found = yes_no.pope_figures([answers[n] for n in rows], [questions[n].references[0] for n in rows])
        return {name: 100 * value for name, value in found.items()}

    scores = [
        float(yes_no.pope_answer(answer) in question.references)
        for question, answer in zip(questions, answers, strict=True)
    ]
    return scores, by_task(questions, figures)


def _mme(questions: Sequence[Question], answers: Sequence[str]) -> tuple[Scores, Table]:
    right = [
        yes_no.mme_answer(answer) in question.references for question, answer in zip(questions, answers, strict=True)
    ]

    def figures(rows: list[int]) -> dict[str, float]:
        return yes_no.mme_figures([right[n] for n in rows], [questions[n].group for n in rows])

    table = by_task(questions, figures)
    sums = yes_no.mme_sums({task: row["score"] for task, row in table.items() if task != "all"})
    table["all"] = {"questions": len(questions)} | sums
    return [float(hit) for hit in right], table


def _bleu(questions: Sequence[Question], answers: Sequence[str]) -> tuple[Scores, Table]:
    return None, by_task(
        questions,
        lambda rows: {"bleu": captions.bleu([answers[n] for n in rows], [questions[n].references for n in rows])},
    )


def _cider(questions: Sequence[Question], answers: Sequence[str]) -> tuple[Scores, Table]:
    """Of all questions only: how rare a word is depends on the captions beside it."""
    value = captions.cider(answers, [question.references for question in questions])
    return None, {"all": {"questions": len(questions), "cider": value}}


def _choice_or_word(answer: str, question: Question) -> float:
    if question.choices:
        return choice.multiple_choice(answer, question.references, question.choices)
    return text.word_match(answer, question.references)


METRICS: dict[str, Metric] = {
    "exact_match": _mean(lambda answer, question: text.exact_match(answer, question.references)),
    "word_match": _mean(lambda answer, question: text.word_match(answer, question.references)),
    "anls": _mean(lambda answer, question: text.anls(answer, question.references)),
    "relaxed_accuracy": _mean(lambda answer, question: text.relaxed_accuracy(answer, question.references)),
    "vqa_accuracy": _mean(lambda answer, question: vqa_accuracy(answer, question.references)),
    "multiple_choice": _mean(
        lambda answer, question: choice.multiple_choice(answer, question.references, question.choices)
    ),
    "multiple_choice_or_word": _mean(_choice_or_word),
    "pope": _pope,
    "mme": _mme,
    "bleu": _bleu,
    "cider": _cider,
}


def find_metric(name: str) -> Metric:
    """The metric of this name.  Raises UserError: unknown, or its library is not installed."""
    if name not in METRICS:
        raise UserError(f"metric is {name!r}; wanted one of {', '.join(METRICS)}")
    captions.check_installed(name)
    return METRICS[name]
