"""A conversation with the model: what was asked and answered, and what waits to be seen with the next question."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_patch.data.conversation import IMAGE_MARK, Exchange
from megatron_patch.data.image import check_image
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.video import FrameSampling, read_frames
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Engine, Request, Sampling
from megatron_patch.llava_kinds import VIDEO_MARK

Frames = tuple[bytes, ...]  # of a video


class Chat:
    """One conversation; ask() goes on with it."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self._engine, self._sampling = engine, sampling
        self.reset()

    def reset(self) -> None:
        """Forget all questions, answers, images and videos."""
        self._turns: list[Exchange] = []
        self._images: list[bytes] = []
        self._videos: list[Frames] = []
        self._waiting: list[bytes] = []
        self._waiting_videos: list[Frames] = []

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

    def add_video(self, path: Path, sampling: FrameSampling | None = None) -> int:
        """The next question is about this video too, a file or a folder of frames; returns how many frames are seen.

        Raises:
            UserError: it is none, or the model sees none, or not so many frames.
        """
        try:
            frames = tuple(read_frames(str(path), sampling or FrameSampling()))
        except RecordError as error:
            raise UserError(f"{path}: {error}") from None
        # the question below would be refused with it until /reset: better now
        self._engine.prepare(Request(path.name, (Exchange(f"{VIDEO_MARK}\n?", None),), videos=(frames,)))
        self._waiting_videos.append(frames)
        return len(frames)

    def ask(self, question: str) -> Iterator[str]:
        """The answer piece by piece.  What has been said when the iterator is closed early counts as the answer.

        Raises:
            RequestError: the conversation cannot be asked so; it is as it was before.
        """
        marks = [IMAGE_MARK] * len(self._waiting) + [VIDEO_MARK] * len(self._waiting_videos)
        asked = Exchange("".join(f"{mark}\n" for mark in marks) + question, None)
        images, videos = [*self._images, *self._waiting], [*self._videos, *self._waiting_videos]
        request = Request("chat", (*self._turns, asked), tuple(images), videos=tuple(videos))
        prompt = self._engine.prepare(request)
        said = ""
        try:
            for piece in self._engine.stream(prompt, self._sampling):
                said += piece
                yield piece
        finally:
            if said:
                self._turns.append(replace(asked, answer=said))
                self._images, self._waiting = images, []
                self._videos, self._waiting_videos = videos, []
