"""Raw sample -> training row: shifted labels, pixels and placeholder positions, or a RecordError that says why not."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megatron_patch.data.conversation import ConversationEncoder
from megatron_patch.data.image import image_size, image_to_grid, image_to_pixels, image_to_tiles, open_image
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.record import Record, cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.tile_plan import PLAN_FIELDS, TilePlan
from megatron_patch.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class EncodedText:
    """A record without its images' pixels.  S: its tokens, N: images for the tower (tiles are images of their own)."""

    record_id: str
    tokens: np.ndarray  # int64 [S]
    labels: np.ndarray  # int64 [S]: the token to predict at each position, or IGNORE_LABEL
    # [start, end) of each image's or video's placeholders; fixed tiles have one each
    image_spans: list[tuple[int, int]]
    truncated: bool
    plans: tuple[TilePlan, ...]  # of the record's images and videos, in the order of their marks

    @property
    def tiles(self) -> int:
        """N."""
        return sum(plan.tiles for plan in self.plans)


@dataclass(frozen=True)
class EncodedRecord(EncodedText):
    """One row before padding."""

    pixels: np.ndarray | None  # uint8 [N, 3, side_px, side_px]; None where images are not wanted
    features: Tensor | None = None  # [N, P, hidden], cached, in place of pixels


_tokenizer = functools.cache(load_tokenizer)  # check, training and validation of a process have the same


def decode_images(
    images: Sequence[bytes],
    config: DataConfig,
    videos: Sequence[Sequence[bytes]] = (),
    plans: Sequence[TilePlan] | None = None,
) -> np.ndarray:
    """Images and videos of a record -> pixels uint8 [N, 3, side_px, side_px], the tiles or frames of each together.

    plans: of the images and videos, in the order of their marks; None: there are images alone.  Raises RecordError.
    """
    plain = config.sizes_matter and config.any_resolution.is_plain(len(images))
    left = iter(images), iter(videos)
    tiles = [np.empty((0, 3, config.side_px, config.side_px), dtype=np.uint8)]
    for is_video in [False] * len(images) if plans is None else [plan.frames > 0 for plan in plans]:
        found = next(left[is_video])
        tiles += [_frame(data, config)[None] for data in found] if is_video else [_tiles(found, config, plain)]
    return np.concatenate(tiles)


def _tiles(data: bytes, config: DataConfig, plain: bool) -> np.ndarray:
    """An image -> uint8 [N, 3, side_px, side_px].  plain: padded to a square."""
    image = open_image(data, config.apply_exif_orientation)
    if config.sizes_matter and not plain:
        return image_to_grid(image, config.any_resolution, config.resample)
    return image_to_tiles(
        image,
        config.tile_columns,
        config.tile_rows,
        config.side_px,
        "pad" if plain else config.image_aspect_ratio,
        config.image_mean,
        config.center_crop,
        config.resample,
    )


def _frame(data: bytes, config: DataConfig) -> np.ndarray:
    """A frame of a video -> uint8 [3, side_px, side_px], squeezed to a square as the base tile of an image."""
    image = open_image(data, config.apply_exif_orientation)
    return image_to_pixels(image, config.side_px, "stretch", config.image_mean, resample=config.resample)


def image_sizes(images: Sequence[bytes], config: DataConfig) -> list[tuple[int, int] | None]:
    """(height, width) of each image, upright if config says so; None where sizes do not matter.  Raises RecordError."""
    return [image_size(data, config.apply_exif_orientation) if config.sizes_matter else None for data in images]


def plan_images(images: Sequence[bytes], config: DataConfig) -> tuple[TilePlan, ...]:
    """Plan of each image of a record, by its header where sizes matter.  Raises RecordError."""
    return tuple(config.image_plan(size, len(images)) for size in image_sizes(images, config))


def plan_numbers(plans: Sequence[TilePlan]) -> np.ndarray:
    """Plans of M images and videos -> int64 [M, PLAN_FIELDS], for the model."""
    return np.array([plan.numbers for plan in plans], dtype=np.int64).reshape(-1, PLAN_FIELDS)


def check_videos(videos: int, config: DataConfig) -> None:
    """Raise RecordError where a record has videos and the model sees none."""
    if not videos or config.sees_videos:
        return
    if config.video_token_id is None:
        got = "this model, which knows no <video>"
    else:
        got = f"a model that is shown every image as one tile (IMAGE_ASPECT_RATIO={config.image_aspect_ratio})"
    raise RecordError(
        "video",
        f"{videos} videos for {got}, wanted a LLaVA-OneVision with IMAGE_ASPECT_RATIO=anyres; take one, or leave "
        "records with videos out",
    )


class TaskEncoder:
    """Encodes samples with one tokenizer, template and image size."""

    def __init__(self, config: DataConfig, with_pixels: bool, tokenizer: Any = None) -> None:
        """tokenizer: in place of the one at config.tokenizer_path."""
        self.conversation = ConversationEncoder(
            _tokenizer(config.tokenizer_path) if tokenizer is None else tokenizer,
            config.template,
            config.image_token_id,
            config.tokens_per_mark,
            image_conv_front=config.image_conv_front,
            image_start_end=config.image_start_end,
            video_token_id=config.video_token_id,
        )
        self.config = config
        self._with_pixels = with_pixels

    def encode(self, parts: Mapping[str, Any]) -> EncodedRecord:
        """Parts of a sample (bytes) -> row.  Raises RecordError."""
        return self.encode_record(cook(parts))

    def encode_record(self, record: Record) -> EncodedRecord:
        """Record -> row.  Raises RecordError."""
        text = self.encode_text(record)
        if self._with_pixels:
            pixels = decode_images(record.images, self.config, record.videos, text.plans if record.videos else None)
            return EncodedRecord(**vars(text), pixels=pixels)
        # Decoded all the same: every pipeline stage must agree on which records are left out.
        for data in (*record.images, *itertools.chain(*record.videos)):
            open_image(data, self.config.apply_exif_orientation)
        return EncodedRecord(**vars(text), pixels=None)

    def encode_text(self, record: Record) -> EncodedText:
        """Record -> everything but its pixels; neither images nor frames are decoded.  Raises RecordError."""
        config = self.config
        check_videos(len(record.videos), config)
        images, counts = (), None
        if config.sizes_matter:
            images = plan_images(record.images, config)
            counts = [plan.tokens for plan in images]
        videos = [config.video_plan(len(frames)) for frames in record.videos]
        encoded = self.conversation.encode(record.exchanges, record.system, counts, [plan.tokens for plan in videos])
        if config.sizes_matter:
            plans = tuple(encoded.in_order(images, videos))
        else:  # by the marks: there may be nothing behind them
            plans = (config.image_plan(None, len(encoded.image_starts)),) * len(encoded.image_starts)
        spans = [(start, start + plan.tokens) for start, plan in zip(encoded.image_starts, plans, strict=True)]
        tokens = np.asarray(encoded.ids, dtype=np.int64)
        trained = np.asarray(encoded.trained, dtype=bool)
        truncated = len(tokens) > config.longest_record
        if truncated:
            tokens, trained = tokens[: config.longest_record], trained[: config.longest_record]
            if spans and spans[-1][1] > config.longest_record:
                raise RecordError(
                    "too long",
                    f"{'a video' if plans[-1].frames else 'an image'} ends beyond token {config.longest_record} of "
                    f"{len(encoded.ids)}",
                )
        labels = np.full(len(tokens), IGNORE_LABEL, dtype=np.int64)
        labels[:-1][trained[1:]] = tokens[1:][trained[1:]]
        if not (labels != IGNORE_LABEL).any():
            raise RecordError("no trained token", f"none within {config.longest_record} of {len(encoded.ids)} tokens")
        if config.tiles > 1:
            width = config.image_tokens
            spans = [(first, first + width) for start, end in spans for first in range(start, end, width)]
        return EncodedText(record.record_id, tokens, labels, spans, truncated, plans)
