"""Whole shards, written by worker processes: the same job gives the same bytes, whoever does it."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_patch.data.conversation import IMAGE_MARK, VIDEO_MARK, ConversationEncoder
from megatron_patch.data.image import check_image, image_size
from megatron_patch.data.preparation.report import Rejection
from megatron_patch.data.preparation.shard_writer import Shard
from megatron_patch.data.preparation.sources import Source
from megatron_patch.data.record import FRAMES, read_exchanges
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError
from megatron_patch.tile_plan import AnyResolution, video_plan
from megatron_patch.tokenizer_files import load_tokenizer


class Sample(NamedTuple):
    """A record whose text was found good.  A tuple, because tens of thousands a second go to other processes."""

    number: int  # its place in the source
    data: bytes  # the JSON part
    images: Sequence[Any]  # what Source.read_image takes
    content: int  # hash of the record
    repeats_id: bool = False
    videos: Sequence[Any] = ()  # what Source.read_video takes


@dataclass(frozen=True)
class Job:
    """One shard to be written."""

    split: str
    name: str
    samples: Sequence[Sample]
    number: int = 0  # its place among the jobs of all splits


@dataclass(frozen=True)
class Done:
    """What became of a job; a shard without samples has no file."""

    written: int
    text_only: int
    repeated_ids: int
    size: int  # bytes
    rejected: list[Rejection] = field(default_factory=list)


@dataclass(frozen=True)
class LengthLimit:
    """Records must fit into so many tokens, as training will count them."""

    tokenizer_path: str
    template: str
    image_tokens: int  # of each image, unless its size decides
    max_tokens: int
    any_resolution: AnyResolution | None = None  # the rule of a model by which an image's size decides
    apply_exif_orientation: bool = True  # sizes are those of images that stand upright

    def encoder(self) -> ConversationEncoder:
        """The encoder that training uses.  Raises UserError for a tokenizer or template that does not fit."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        video_token_id = tokenizer.get_vocab().get(VIDEO_MARK)
        return ConversationEncoder(
            tokenizer, self.template, image_token_id, self.image_tokens, video_token_id=video_token_id
        )

    def video_tokens(self, frames: int) -> int:
        """Tokens of a video.  Raises RecordError where an image's are no square: such a model sees none."""
        patches = math.isqrt(self.image_tokens)
        if patches**2 != self.image_tokens:
            raise RecordError(
                "video", f"an image of {self.image_tokens} tokens is no square, wanted --image-tokens 729"
            )
        return video_plan(frames, patches).tokens

    def tokens_of(self, images: Sequence[bytes]) -> list[int] | None:
        """Of each image of a record, by its header; None: the same for all.  Raises RecordError as image_size()."""
        if self.any_resolution is None:
            return None
        sizes = [image_size(data, self.apply_exif_orientation) for data in images]
        return [self.any_resolution.plan(size, len(sizes)).tokens for size in sizes]

    def shape_output(self) -> dict[str, Any]:
        """What the shards depend on, as JSON.  Without a rule the same as before there was one."""
        plain = {name: getattr(self, name) for name in ("tokenizer_path", "template", "image_tokens", "max_tokens")}
        if self.any_resolution is None:
            return plain
        exif = {"apply_exif_orientation": self.apply_exif_orientation}
        return plain | {"any_resolution": str(self.any_resolution)} | exif


class ShardBuilder:
    """Does jobs: reads and checks images, writes shards."""

    def __init__(self, source: Source, folder: Path, limit: LengthLimit | None) -> None:
        self._source = source
        self.folder = folder
        self._limit = limit
        self._encoder: ConversationEncoder | None = None

    def make(self, job: Job) -> Done:
        """Write one shard of the samples whose images are good.  Raises OSError when it cannot be written."""
        rejected: list[Rejection] = []
        text_only = repeated_ids = 0
        shard = Shard(self.folder, job.name)
        try:
            for sample in job.samples:
                try:
                    parts = self._parts(sample)
                except RecordError as error:
                    rejected.append(Rejection.of(sample.number, json.loads(sample.data), error))
                    continue
                shard.add(sample.number, parts)
                text_only += not sample.images and not sample.videos
                repeated_ids += sample.repeats_id
            if not shard.samples:
                shard.abandon()
                return Done(0, 0, 0, 0, rejected)
            size = shard.close()
        except OSError:
            shard.abandon()
            raise
        return Done(shard.samples, text_only, repeated_ids, size, rejected)

    def _parts(self, sample: Sample) -> dict[str, bytes]:
        """Parts of a sample, images first, then the frames of its videos.  Raises RecordError."""
        images: list[bytes] = []
        for place, reference in enumerate(sample.images):
            data = self._source.read_image(reference)
            try:
                check_image(data)
            except RecordError as error:
                name = reference if isinstance(reference, str) else _image_names(sample)[place]
                raise RecordError(error.reason, f"{name}: {error.detail}") from error
            images.append(data)
        counts = []
        for reference in sample.videos:
            frames = self._source.read_video(reference)
            for number, data in enumerate(frames, 1):
                try:
                    check_image(data)
                except RecordError as error:
                    told = f"{reference}: frame {number} of the {len(frames)} chosen: {error.detail}"
                    raise RecordError(error.reason, told) from error
            images += frames
            counts.append(len(frames))
        parts = {f"{place}.jpg" if place else "jpg": data for place, data in enumerate(images)}
        if self._limit is not None:
            self._check_length(sample, images[: len(sample.images)], counts)
        parts["json"] = sample.data
        if counts:
            parts["json"] = sample.data[:-1] + f', "{FRAMES}": {counts}}}'.encode()
        return parts

    def _check_length(self, sample: Sample, images: Sequence[bytes], frames: Sequence[int]) -> None:
        """Refuse what does not fit into the limit, or has nothing to learn within it.

        frames: of each video.
        """
        if self._encoder is None:
            self._encoder = self._limit.encoder()
        content = json.loads(sample.data)
        exchanges = read_exchanges(content["conversations"], len(sample.images), len(frames))
        if frames and not self._encoder.marks_in(VIDEO_MARK):
            raise RecordError("video", f"the tokenizer has no {VIDEO_MARK}; give --tokenizer of a LLaVA-OneVision")
        videos = [self._limit.video_tokens(count) for count in frames]
        counts = self._limit.tokens_of(images)
        encoded = self._encoder.encode(exchanges, content.get("system"), counts, video_tokens=videos)
        if len(encoded.ids) > self._limit.max_tokens:
            raise RecordError("too long", f"{len(encoded.ids)} tokens, wanted at most {self._limit.max_tokens}")
        if not any(encoded.trained):
            raise RecordError("no trained token", f"none of {len(encoded.ids)} tokens")


def _image_names(sample: Sample) -> list[str]:
    image = json.loads(sample.data)["image"]
    return image if isinstance(image, list) else [image]


class WorkersLost(UserError):
    """Nothing is wrong with the data: what is done stays, to be resumed."""


class Workers:
    """So many processes that make shards; none: this one does it.  A context manager."""

    def __init__(self, workers: int, maker: ShardBuilder) -> None:
        self.at_once = max(1, 2 * workers)  # jobs that may wait or be at work
        self._maker = maker
        self._pool = (
            ProcessPoolExecutor(
                workers,
                # Forked: they share what is loaded already, and this process runs no threads of its own yet.
                mp_context=multiprocessing.get_context("fork"),
                initializer=_start,
                initargs=(maker, os.getpid()),
            )
            if workers
            else None
        )

    def submit(self, job: Job) -> "Future[Done]":
        """Begin a job."""
        if self._pool is not None:
            try:
                return self._pool.submit(_make, job)
            except BrokenProcessPool as error:
                raise died() from error
        future: Future[Done] = Future()
        future.set_result(self._maker.make(job))
        return future

    def result(self, begun: "Future[Done]") -> Done:
        """Wait for a job.  Raises OSError when its shard could not be written, UserError when its worker died."""
        try:
            return begun.result()
        except BrokenProcessPool as error:
            raise died() from error

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def died() -> WorkersLost:
    """What is said when a worker is gone."""
    return WorkersLost(
        "a worker process was killed, perhaps for lack of memory; give --resume to go on, with fewer --workers"
    )


_maker: ShardBuilder  # of this worker process


def _start(maker: ShardBuilder, parent: int) -> None:
    """Prepare a worker: an interrupt is the parent's business, and nobody works on when the parent was killed."""
    global _maker
    _maker = maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _make(job: Job) -> Done:
    return _maker.make(job)
