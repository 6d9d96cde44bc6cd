"""Raw sample -> training row: shifted labels, pixels and placeholder positions, or a RecordError that says why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_patch.data.conversation import ConversationEncoder
from megatron_patch.data.image import open_picture, picture_to_pixels
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.samples import Record, cook
from megatron_patch.data.settings import DataSettings
from megatron_patch.errors import UserError

IGNORED = -100  # label of a position without loss, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class EncodedRecord:
    """One row before padding.  S: its tokens, N: its pictures."""

    record_id: str
    tokens: np.ndarray  # int64 [S]
    labels: np.ndarray  # int64 [S]: the token to predict at each position, or IGNORED
    pixels: np.ndarray | None  # uint8 [N, 3, side_px, side_px]; None where pictures are not wanted
    image_starts: list[int]  # N first placeholders
    truncated: bool


class RecordEncoder:
    """Encodes samples with one tokenizer, template and picture size."""

    def __init__(self, settings: DataSettings, with_pixels: bool) -> None:
        from transformers import AutoTokenizer

        # Checked here: a name that is no folder would be looked up on the hub.
        if not Path(settings.tokenizer_path).is_dir():
            raise UserError(
                f"{settings.tokenizer_path}: no such folder; wanted the one with the tokenizer (llava/ of a checkpoint)"
            )
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer_path)
        self.conversation = ConversationEncoder(
            tokenizer, settings.template, settings.image_token_id, settings.image_tokens
        )
        self._settings = settings
        self._with_pixels = with_pixels

    def encode(self, parts: Mapping[str, Any]) -> EncodedRecord:
        """Parts of a sample (bytes) -> row.  Raises RecordError."""
        return self.encode_record(cook(parts))

    def encode_record(self, record: Record) -> EncodedRecord:
        """Record -> row.  Raises RecordError."""
        settings = self._settings
        encoded = self.conversation.encode(record.exchanges)
        tokens = np.asarray(encoded.ids, dtype=np.int64)
        trained = np.asarray(encoded.trained, dtype=bool)
        truncated = len(tokens) > settings.longest_record
        if truncated:
            tokens, trained = tokens[: settings.longest_record], trained[: settings.longest_record]
            if encoded.image_starts and encoded.image_starts[-1] + settings.image_tokens > settings.longest_record:
                raise RecordError(
                    "too long", f"a picture ends beyond token {settings.longest_record} of {len(encoded.ids)}"
                )
        labels = np.full(len(tokens), IGNORED, dtype=np.int64)
        labels[:-1][trained[1:]] = tokens[1:][trained[1:]]
        if not (labels != IGNORED).any():
            raise RecordError("no trained token", f"none within {settings.longest_record} of {len(encoded.ids)} tokens")
        # Decoded also where pixels are not wanted: every pipeline stage must agree on which records are left out.
        pictures = [open_picture(data) for data in record.pictures]
        pixels = None
        if self._with_pixels:
            side_px, ratio, mean = settings.side_px, settings.image_aspect_ratio, settings.image_mean
            center_crop, resample = settings.center_crop, settings.resample
            pixels = np.empty((len(pictures), 3, side_px, side_px), dtype=np.uint8)
            for number, picture in enumerate(pictures):
                pixels[number] = picture_to_pixels(picture, side_px, ratio, mean, center_crop, resample)
        return EncodedRecord(record.record_id, tokens, labels, pixels, encoded.image_starts, truncated)
