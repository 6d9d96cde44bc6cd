"""Raw sample -> training row: shifted labels, pixels and placeholder positions, or a RecordError that says why not."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megatron_patch.data.conversation import ConversationEncoder
from megatron_patch.data.image import image_to_tiles, open_image
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.record import Record, cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class EncodedText:
    """A record without its images' pixels.  S: its tokens, N: its images (tiles are images of their own)."""

    record_id: str
    tokens: np.ndarray  # int64 [S]
    labels: np.ndarray  # int64 [S]: the token to predict at each position, or IGNORE_LABEL
    image_starts: list[int]  # N first placeholders
    truncated: bool


@dataclass(frozen=True)
class EncodedRecord(EncodedText):
    """One row before padding."""

    pixels: np.ndarray | None  # uint8 [N, 3, side_px, side_px]; None where images are not wanted
    features: Tensor | None = None  # [N, P, hidden], cached, in place of pixels


_tokenizer = functools.cache(load_tokenizer)  # check, training and validation of a process have the same


def decode_images(images: Sequence[bytes], config: DataConfig) -> np.ndarray:
    """Images of a record -> pixels uint8 [N, 3, side_px, side_px], the tiles of each together.  Raises RecordError."""
    opened = [open_image(data, config.apply_exif_orientation) for data in images]
    tiles = np.empty((len(opened), config.tiles, 3, config.side_px, config.side_px), dtype=np.uint8)
    for number, image in enumerate(opened):
        tiles[number] = image_to_tiles(
            image,
            config.tile_columns,
            config.tile_rows,
            config.side_px,
            config.image_aspect_ratio,
            config.image_mean,
            config.center_crop,
            config.resample,
        )
    return tiles.reshape(-1, *tiles.shape[2:])


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
        )
        self._config = config
        self._with_pixels = with_pixels

    def encode(self, parts: Mapping[str, Any]) -> EncodedRecord:
        """Parts of a sample (bytes) -> row.  Raises RecordError."""
        return self.encode_record(cook(parts))

    def encode_record(self, record: Record) -> EncodedRecord:
        """Record -> row.  Raises RecordError."""
        text = self.encode_text(record)
        if self._with_pixels:
            return EncodedRecord(**vars(text), pixels=decode_images(record.images, self._config))
        # Decoded all the same: every pipeline stage must agree on which records are left out.
        for data in record.images:
            open_image(data, self._config.apply_exif_orientation)
        return EncodedRecord(**vars(text), pixels=None)

    def encode_text(self, record: Record) -> EncodedText:
        """Record -> everything but its pixels; the images are not looked at.  Raises RecordError."""
        config = self._config
        encoded = self.conversation.encode(record.exchanges, record.system)
        tokens = np.asarray(encoded.ids, dtype=np.int64)
        trained = np.asarray(encoded.trained, dtype=bool)
        truncated = len(tokens) > config.longest_record
        if truncated:
            tokens, trained = tokens[: config.longest_record], trained[: config.longest_record]
            if encoded.image_starts and encoded.image_starts[-1] + config.tokens_per_mark > config.longest_record:
                raise RecordError(
                    "too long", f"an image ends beyond token {config.longest_record} of {len(encoded.ids)}"
                )
        labels = np.full(len(tokens), IGNORE_LABEL, dtype=np.int64)
        labels[:-1][trained[1:]] = tokens[1:][trained[1:]]
        if not (labels != IGNORE_LABEL).any():
            raise RecordError("no trained token", f"none within {config.longest_record} of {len(encoded.ids)} tokens")
        starts = [start + tile * config.image_tokens for start in encoded.image_starts for tile in range(config.tiles)]
        return EncodedText(record.record_id, tokens, labels, starts, truncated)
