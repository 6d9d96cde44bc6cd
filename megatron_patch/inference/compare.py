"""The same prompts through several models: where they first choose another token, and how close a decision that was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_patch.inference.generation import BatchEngine
from megatron_patch.inference.interface import Answer, Prompt, Request, Sampling


@dataclass(frozen=True)
class Choice:
    """What one model says at the token of the first difference, after the same tokens."""

    token: str  # its text
    token_id: int
    probability: float  # by this model
    of_the_other: float  # of the other model's token, by this model


@dataclass(frozen=True)
class Difference:
    """The first one between the reference (model 0) and another model, for one prompt."""

    prompt: int  # its number, from 0
    model: int
    position: int  # in the answer, from 0
    choices: tuple[Choice, Choice]  # of the reference, of the other


@dataclass(frozen=True)
class Comparison:
    """Answers of every model, in the order of the requests, and the first differences."""

    answers: list[list[Answer]]
    differences: list[Difference]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two answers first differ, from 0; the end of one of them is where the other goes on."""
    for position in range(max(len(one), len(other))):
        if one[position : position + 1] != other[position : position + 1]:
            return position
    return None


def compare(
    models: Sequence[Callable[[], BatchEngine]], requests: Sequence[Request], sampling: Sampling, batch_size: int
) -> Comparison:
    """Ask all of them, one model in memory at a time; those that differ are opened once more for the probabilities.

    Raises:
        RequestError: a model cannot be asked one of the requests.
    """
    answers = []
    for opened in models:
        with opened() as engine:
            answers.append(
                [
                    answer
                    for start in range(0, len(requests), batch_size)
                    for answer in engine.answer(requests[start : start + batch_size], sampling)
                ]
            )
    found = [
        (number, model, position)
        for model in range(1, len(models))
        for number in range(len(requests))
        if (position := first_difference(answers[0][number].token_ids, answers[model][number].token_ids)) is not None
    ]
    # an answer that is over has no token there
    told = {place: _chosen(answers, place) for place in found}
    choices: dict[tuple[int, tuple[int, int, int]], Choice] = {}
    for asked in sorted({model for place in found for model in (0, place[1])}):
        with models[asked]() as engine:
            for place in found:
                if asked in (0, place[1]):
                    prompt = engine.prepare(requests[place[0]])
                    prefix = answers[0][place[0]].token_ids[: place[2]]
                    own, other = told[place] if asked == 0 else told[place][::-1]
                    choices[asked, place] = _choice(engine, prompt, prefix, own, other)
    differences = [Difference(*place, (choices[0, place], choices[place[1], place])) for place in found]
    return Comparison(answers, differences)


def _chosen(answers: list[list[Answer]], place: tuple[int, int, int]) -> tuple[int | None, int | None]:
    number, model, position = place
    both = (answers[0][number].token_ids, answers[model][number].token_ids)
    return tuple(ids[position] if position < len(ids) else None for ids in both)


def _choice(engine: BatchEngine, prompt: Prompt, prefix: Sequence[int], own: int | None, other: int | None) -> Choice:
    probabilities = engine.probabilities(prompt, prefix)

    def of(token: int | None) -> float:
        return float("nan") if token is None else float(probabilities[token])

    text = "(the answer is over)" if own is None else engine.token(own)
    return Choice(text, -1 if own is None else own, of(own), of(other))
