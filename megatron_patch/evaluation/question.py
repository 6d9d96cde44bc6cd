"""A question of a benchmark, and the prompt that LLaVA-1.5 makes of it (docs/Evaluation.md of its repository)."""

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_patch.data.conversation import Exchange
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Request

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """One question and what is right.

    text: the question with its context; `<image>` where an image stands (none at all: the images come first).
    references: answers that count as right; with choices, the letter of the right one.
    images: files, or the bytes of one.
    suffix: how the answer is wanted, the prompt's last line.
    group: the question of which this is one rotation of the choices, or the image that two questions share.
    """

    id: str
    text: str
    references: tuple[str, ...]
    images: tuple[Path | bytes, ...] = ()
    choices: tuple[str, ...] = ()
    suffix: str = ""
    task: str = ""
    group: str = ""

    @property
    def prompt(self) -> str:
        """Text, choices with their letters, suffix: a line each."""
        choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join(filter(None, [self.text, *choices, self.suffix]))

    @property
    def request(self) -> Request:
        """As an engine takes it."""
        return Request(self.id, (Exchange(self.prompt, None),), self.images)


def rotations(question: Question) -> list[Question]:
    """The question with its choices in every rotation, for MMBench's CircularEval: right when all of them are.

    A question without choices, or one that is a rotation already, stays alone.
    """
    count = len(question.choices)
    if count < 2 or question.group:
        return [question]
    right = LETTERS.index(question.references[0])
    return [
        dataclasses.replace(
            question,
            id=f"{question.id}#{turn}",
            choices=question.choices[turn:] + question.choices[:turn],
            references=(LETTERS[(right - turn) % count],),
            group=question.id,
        )
        for turn in range(count)
    ]


def with_other_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The questions about other images: a random cycle through all images, so that each is another one.

    Raises:
        UserError: there are not two images.
    """
    images = sorted({image for question in questions for image in question.images})
    if len(images) < 2:
        raise UserError("swapping images needs at least two of them")
    order = [images[place] for place in np.random.default_rng(seed).permutation(len(images))]
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    return [
        dataclasses.replace(question, images=tuple(other[image] for image in question.images)) for question in questions
    ]
