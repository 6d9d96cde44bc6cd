"""Rows -> one micro-batch.  B: rows, S: tokens, N: pictures of all rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_patch.data.encoder import IGNORED, EncodedRecord
from megatron_patch.data.settings import DataSettings


def collate(
    rows: Sequence[EncodedRecord | None], settings: DataSettings, pad_token_id: int, with_pixels: bool
) -> dict[str, Any]:
    """Rows (None: a record that was left out, whose place stays as an empty row) -> batch.

    tokens int64 [B, S]; labels int64 [B, S], -100 where nothing is trained; pixels uint8 [N, 3, side_px, side_px] in
    the order of the placeholders, or None; image_spans int64 [N, 2] (row, first placeholder); record_ids of the B
    rows ("" for an empty one).  S is the longest row, rounded up to a multiple of length_multiple.
    """
    kept = [row for row in rows if row is not None]
    longest = max((len(row.tokens) for row in kept), default=1)
    length = -(-longest // settings.length_multiple) * settings.length_multiple
    tokens = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    spans = []
    for number, row in enumerate(rows):
        if row is not None:
            tokens[number, : len(row.tokens)] = row.tokens
            labels[number, : len(row.labels)] = row.labels
            spans += [(number, start) for start in row.image_starts]
    pixels = None
    if with_pixels:
        none = np.empty((0, 3, settings.side_px, settings.side_px), dtype=np.uint8)
        pixels = torch.from_numpy(np.concatenate([none, *(row.pixels for row in kept if row.pixels is not None)]))
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "pixels": pixels,
        "image_spans": torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
        "record_ids": ["" if row is None else row.record_id for row in rows],
    }
