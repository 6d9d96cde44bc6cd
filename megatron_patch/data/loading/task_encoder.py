"""Raw sample -> training row: shifted labels, pixels and placeholder positions, or a RecordError that says why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_patch.data.conversation import ConversationEncoder
from megatron_patch.data.image import open_picture, picture_to_tiles
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.samples import Record, cook
from megatron_patch.data.settings import DataSettings
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class EncodedText:
    """A record without its pictures' pixels.  S: its tokens, N: its pictures (tiles are pictures of their own)."""

    record_id: str
    tokens: np.ndarray  # int64 [S]
    labels: np.ndarray  # int64 [S]: the token to predict at each position, or IGNORE_LABEL
    image_starts: list[int]  # N first placeholders
    truncated: bool


@dataclass(frozen=True)
class EncodedRecord(EncodedText):
    """One row before padding."""

    pixels: np.ndarray | None  # uint8 [N, 3, side_px, side_px]; None where pictures are not wanted


class RecordEncoder:
    """Encodes samples with one tokenizer, template and picture size."""

    def __init__(self, settings: DataSettings, with_pixels: bool, tokenizer: Any = None) -> None:
        """tokenizer: in place of the one at settings.tokenizer_path."""
        self.conversation = ConversationEncoder(
            load_tokenizer(settings.tokenizer_path) if tokenizer is None else tokenizer,
            settings.template,
            settings.image_token_id,
            settings.tokens_per_mark,
            image_conv_front=settings.image_conv_front,
            image_start_end=settings.image_start_end,
        )
        self._settings = settings
        self._with_pixels = with_pixels

    def encode(self, parts: Mapping[str, Any]) -> EncodedRecord:
        """Parts of a sample (bytes) -> row.  Raises RecordError."""
        return self.encode_record(cook(parts))

    def encode_record(self, record: Record) -> EncodedRecord:
        """Record -> row.  Raises RecordError."""
        settings = self._settings
        text = self.encode_text(record)
        # Decoded also where pixels are not wanted: every pipeline stage must agree on which records are left out.
        pictures = [open_picture(data, settings.apply_exif_orientation) for data in record.pictures]
        pixels = None
        if self._with_pixels:
            shape = (len(pictures), settings.tiles, 3, settings.side_px, settings.side_px)
            tiles = np.empty(shape, dtype=np.uint8)
            for number, picture in enumerate(pictures):
                tiles[number] = picture_to_tiles(
                    picture,
                    settings.tile_columns,
                    settings.tile_rows,
                    settings.side_px,
                    settings.image_aspect_ratio,
                    settings.image_mean,
                    settings.center_crop,
                    settings.resample,
                )
            pixels = tiles.reshape(-1, *shape[2:])
        return EncodedRecord(**vars(text), pixels=pixels)

    def encode_text(self, record: Record) -> EncodedText:
        """Record -> everything but its pixels; the pictures are not looked at.  Raises RecordError."""
        settings = self._settings
        encoded = self.conversation.encode(record.exchanges, record.system)
        tokens = np.asarray(encoded.ids, dtype=np.int64)
        trained = np.asarray(encoded.trained, dtype=bool)
        truncated = len(tokens) > settings.longest_record
        if truncated:
            tokens, trained = tokens[: settings.longest_record], trained[: settings.longest_record]
            if encoded.image_starts and encoded.image_starts[-1] + settings.tokens_per_mark > settings.longest_record:
                raise RecordError(
                    "too long", f"a picture ends beyond token {settings.longest_record} of {len(encoded.ids)}"
                )
        labels = np.full(len(tokens), IGNORE_LABEL, dtype=np.int64)
        labels[:-1][trained[1:]] = tokens[1:][trained[1:]]
        if not (labels != IGNORE_LABEL).any():
            raise RecordError("no trained token", f"none within {settings.longest_record} of {len(encoded.ids)} tokens")
        starts = [
            start + tile * settings.image_tokens for start in encoded.image_starts for tile in range(settings.tiles)
        ]
        return EncodedText(record.record_id, tokens, labels, starts, truncated)
