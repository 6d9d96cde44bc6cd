"""Answers token by token: what both engines share.  B: requests of the batch, S: tokens, V: vocabulary."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from megatron_patch.inference.interface import Answer, Prompt, Request, Sampling
from megatron_patch.inference.prompt import PromptEncoder

SAMPLED_FROM = torch.float64  # sums of 100,000 probabilities


class Session(Protocol):
    """One batch in a model: the states of all tokens so far."""

    logits: Tensor  # [B, V], of the token behind each prompt

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token for each request -> logits [B, V] of the next one."""
        ...

    def close(self) -> None:
        """Give the states up."""
        ...


@dataclass
class Row:
    """One request of a batch while it is answered."""

    prompt: Prompt
    limit: int  # tokens of the answer
    random: Random
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class BatchEngine:
    """An Engine, but for the model: a subclass gives `name` and `_start`."""

    name: str

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self.max_tokens = encoder.max_tokens

    def _start(self, prompts: Sequence[Prompt], most_new: int) -> Session:
        """Read the prompts, for at most so many new tokens each."""
        raise NotImplementedError

    def prepare(self, request: Request) -> Prompt:
        """As Engine says."""
        return self._encoder.encode(request)

    def answer(self, requests: Sequence[Request | Prompt], sampling: Sampling) -> list[Answer]:
        """As Engine says."""
        rows: list[Row] = []
        for after_each_token in self._generate(self._prepared(requests), sampling):
            rows = after_each_token
        return [self._answer_of(row) for row in rows]

    def stream(self, request: Request | Prompt, sampling: Sampling) -> Iterator[str]:
        """As Engine says."""
        (prompt,) = self._prepared([request])
        told, rows = "", []
        for rows in self._generate([prompt], sampling):
            text = self._encoder.reader.text_so_far(rows[0].ids)
            if text.startswith(told) and text != told:
                yield text[len(told) :]
                told = text
        answer = self._answer_of(rows[0])
        if answer.text[len(told) :]:
            yield answer.text[len(told) :]
        return answer

    def probabilities(self, prompt: Prompt, answer: Sequence[int]) -> Tensor:
        """[V]: of each token behind the prompt and these tokens of an answer."""
        session = self._start([prompt], len(answer) + 1)
        try:
            logits = session.logits
            for token in answer:
                logits = session.step([token])
            return torch.softmax(logits[0].to(SAMPLED_FROM), -1).cpu()
        finally:
            session.close()

    def token(self, token_id: int) -> str:
        """A token as its tokenizer spells it."""
        return self._encoder.reader.token(token_id)

    def close(self) -> None:
        """As Engine says."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepared(self, requests: Sequence[Request | Prompt]) -> list[Prompt]:
        return [request if isinstance(request, Prompt) else self.prepare(request) for request in requests]

    def _generate(self, prompts: list[Prompt], sampling: Sampling) -> Iterator[list[Row]]:
        """The rows of the batch after each token; the same objects each time."""
        if not prompts:
            return
        rows = [
            Row(
                prompt,
                min(sampling.max_new_tokens, self.max_tokens - len(prompt.tokens)),
                # seeded with a text it is the same on every machine
                Random(f"{sampling.seed}/{prompt.id}"),
            )
            for prompt in prompts
        ]
        session = self._start(prompts, max(row.limit for row in rows))
        try:
            logits = session.logits
            while True:
                chosen = choose(logits, sampling, [row.random.random() for row in rows])
                for row, token in zip(rows, chosen, strict=True):
                    self._take(row, token)
                yield rows
                if all(row.finish_reason for row in rows):
                    return
                logits = session.step(
                    [self._encoder.pad_token_id if row.finish_reason else row.ids[-1] for row in rows]
                )
        finally:
            session.close()

    def _take(self, row: Row, token: int) -> None:
        if row.finish_reason:
            return
        row.ids.append(token)
        if self._encoder.reader.is_complete(row.ids):
            row.finish_reason = "stop"
        elif len(row.ids) == row.limit:
            row.finish_reason = "length"

    def _answer_of(self, row: Row) -> Answer:
        return Answer(
            id=row.prompt.id,
            text=self._encoder.reader.text(row.ids),
            token_ids=tuple(row.ids),
            finish_reason=row.finish_reason,
            prompt_tokens=len(row.prompt.tokens),
            completion_tokens=len(row.ids),
        )


def choose(logits: Tensor, sampling: Sampling, uniform: Sequence[float]) -> list[int]:
    """logits [B, V] -> a token for each row; uniform: a random number of 0..1 for each.

    The token is where the cumulated probabilities, in the order of the vocabulary, pass the random number: so a
    rounding error of another batch size moves a bound a little and does not shuffle the tokens.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = torch.softmax(logits.to(SAMPLED_FROM) / sampling.temperature, -1)
    if sampling.top_p < 1:
        highest, places = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        beyond = highest.cumsum(-1) - highest >= sampling.top_p  # what stands before it holds enough
        probabilities = probabilities.scatter(-1, places, highest.masked_fill(beyond, 0))
    reached = probabilities.cumsum(-1)
    drawn = torch.tensor(uniform, dtype=SAMPLED_FROM, device=logits.device) * reached[:, -1]
    return torch.searchsorted(reached, drawn[:, None], right=True)[:, 0].tolist()


def left_padded(prompts: Sequence[Prompt], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """tokens int64 [B, S] and real bool [B, S], False at the padding, which stands before the shorter prompts."""
    length = max(len(prompt.tokens) for prompt in prompts)
    tokens = np.full((len(prompts), length), pad_token_id)
    real = np.zeros(tokens.shape, dtype=bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt.tokens) :] = prompt.tokens
        real[row, length - len(prompt.tokens) :] = True
    return torch.from_numpy(tokens), torch.from_numpy(real)


def all_pixels(prompts: Sequence[Prompt]) -> Tensor:
    """uint8 [N, 3, side, side]: the images of all prompts, in the order of their placeholders."""
    return torch.from_numpy(np.concatenate([prompt.pixels for prompt in prompts]))


def all_plans(prompts: Sequence[Prompt]) -> Tensor:
    """int64 [M, PLAN_FIELDS]: the plans of the same images."""
    return torch.from_numpy(np.concatenate([prompt.plans for prompt in prompts]))
