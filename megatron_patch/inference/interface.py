"""What is asked and answered, whichever engine answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np

from megatron_patch.data.conversation import Exchange
from megatron_patch.errors import UserError
from megatron_patch.launch.asking import sampling_problems


class RequestError(UserError):
    """This one request cannot be answered; the others can.  The message begins with the request's id."""


@dataclass(frozen=True)
class Request:
    """A conversation whose last exchange has no answer yet.

    An IMAGE_MARK in a question stands for each image; a conversation without any mark has all of its images at the
    front of its first question, each in a line of its own.  Likewise a VIDEO_MARK for each video.
    """

    id: str
    turns: tuple[Exchange, ...]
    images: tuple[Path | bytes, ...] = ()  # files, or what is in them
    system: str | None = None  # in place of the template's own system sentence
    videos: tuple[tuple[Path | bytes, ...], ...] = ()  # frames of each


@dataclass(frozen=True)
class Prompt:
    """A request as the model sees it.  S: its tokens, N: its tiles and frames, M: its images and videos."""

    id: str
    tokens: np.ndarray  # int64 [S], image placeholders expanded, up to where the answer begins
    pixels: np.ndarray  # uint8 [N, 3, side_px, side_px]
    plans: np.ndarray  # int64 [M, PLAN_FIELDS]: tile_plan.TilePlan.numbers
    image_sizes: tuple[tuple[int, int], ...]  # height, width of the images, upright; empty where they do not matter


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Each request has random numbers of its own, which are a function of seed and id: what else is in the batch, and its
    size, do not change the answer.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0  # of the most likely tokens, those that hold this much of the probability
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, all at once."""
        problems = sampling_problems(self.max_new_tokens, self.temperature, self.top_p)
        if problems:
            raise UserError("; ".join(problems))


@dataclass(frozen=True)
class Answer:
    """One answer.  `stop`: the model ended it; `length`: max_new_tokens or the model's positions did."""

    id: str
    text: str  # without special tokens and outer white space
    token_ids: tuple[int, ...]  # all that were chosen, the ending too
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int  # image placeholders included
    completion_tokens: int


class Engine(Protocol):
    """A model that answers.  Ends with close(), or as a context manager."""

    name: str  # transformers or megatron
    max_tokens: int  # of prompt and answer together

    def prepare(self, request: Request) -> Prompt:
        """Tokens and pixels of a request; needs no accelerator, and may run in a thread of its own.

        Raises:
            RequestError: it cannot be answered, with the reason.
        """
        ...

    def answer(self, requests: Sequence[Request | Prompt], sampling: Sampling) -> list[Answer]:
        """One batch, answered in the order asked.

        Raises:
            RequestError: one of them cannot be answered; nothing has been computed then.
        """
        ...

    def stream(self, request: Request | Prompt, sampling: Sampling) -> Iterator[str]:
        """The text of one answer piece by piece; joined, the pieces are the answer's text.

        The generator's return value (of `yield from`) is the Answer.  Closing it early stops the computation.
        """
        ...

    def close(self) -> None:
        """Give the model up."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
