"""A conversation with the model: what was asked and answered so far, and the images that wait for the next question."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_patch.data.conversation import IMAGE_MARK, Exchange
from megatron_patch.data.image import check_image
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Engine, Request, Sampling


class Chat:
    """One conversation; ask() goes on with it."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self._engine, self._sampling = engine, sampling
        self.reset()

    def reset(self) -> None:
        """Forget all questions, answers and images."""
        self._turns: list[Exchange] = []
        self._images: list[bytes] = []
        self._waiting: list[bytes] = []

    def add_image(self, path: Path) -> None:
        """The next question is about this image too.  Raises UserError: it is none."""
        try:
            data = path.read_bytes()
            check_image(data)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except RecordError as error:
            raise UserError(f"{path}: {error}") from None
        self._waiting.append(data)

    def ask(self, question: str) -> Iterator[str]:
        """The answer piece by piece.  What has been said when the iterator is closed early counts as the answer.

        Raises:
            RequestError: the conversation cannot be asked so; it is as it was before.
        """
        asked = Exchange(f"{IMAGE_MARK}\n" * len(self._waiting) + question, None)
        images = [*self._images, *self._waiting]
        prompt = self._engine.prepare(Request("chat", (*self._turns, asked), tuple(images)))
        said = ""
        try:
            for piece in self._engine.stream(prompt, self._sampling):
                said += piece
                yield piece
        finally:
            if said:
                self._turns.append(replace(asked, answer=said))
                self._images, self._waiting = images, []
