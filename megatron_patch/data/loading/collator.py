"""Rows -> one micro-batch.  B: rows, S: tokens, N: images of all rows."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_patch.data.loading.config import DataConfig, round_up
from megatron_patch.data.loading.task_encoder import EncodedRecord, plan_numbers
from megatron_patch.geometry import IGNORE_LABEL

LEAST_SAVED = 0.05  # share of a batch's positions; below, one row gains nothing over several


def collate(
    rows: Sequence[EncodedRecord | None], config: DataConfig, pad_token_id: int, with_pixels: bool
) -> dict[str, Any]:
    """Rows (None: a record that was left out, whose place stays as an empty row) -> batch.

    tokens int64 [B, S]; labels int64 [B, S], -100 where nothing is trained; pixels uint8 [N, 3, side_px, side_px] in
    the order of the placeholders, or None; of a model that has a rule for them plans int64 [M, PLAN_FIELDS] of the M
    images, or None; record_ids of the B rows ("" for an empty one).  S is the padded_length() of the longest row.
    """
    longest = max((len(row.tokens) for row in rows if row is not None), default=1)
    tokens, labels = _empty(len(rows), config.padded_length(longest), pad_token_id)
    for number, row in enumerate(rows):
        if row is not None:
            tokens[number, : len(row.tokens)] = row.tokens
            labels[number, : len(row.labels)] = row.labels
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        **_images(rows, config, with_pixels),
        "record_ids": ["" if row is None else row.record_id for row in rows],
    }


def collate_packed(
    records: Sequence[EncodedRecord | None], config: DataConfig, pad_token_id: int, with_pixels: bool
) -> dict[str, Any]:
    """Records (None: left out) behind each other in a single row -> batch as in collate(), B = 1, and cu_seqlens.

    cu_seqlens int32 [records + 1]: where each record begins, then S.  A record takes a multiple of record_multiple
    positions; the last one goes on to the end of the row, and padding is never seen by a token before it.
    record_ids are those of all records in the row.
    """
    kept = [record for record in records if record is not None]
    lengths = [round_up(len(record.tokens), config.record_multiple) for record in kept] or [config.record_multiple]
    lengths[-1] += config.padded_length(sum(lengths)) - sum(lengths)
    bounds = [0, *itertools.accumulate(lengths)]
    tokens, labels = _empty(1, bounds[-1], pad_token_id)
    for start, record in zip(bounds, kept, strict=False):
        tokens[0, start : start + len(record.tokens)] = record.tokens
        labels[0, start : start + len(record.labels)] = record.labels
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        **_images(kept, config, with_pixels),
        "record_ids": [record.record_id for record in kept],
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
    }


def collate_padding_free(
    rows: Sequence[EncodedRecord | None], config: DataConfig, pad_token_id: int, with_pixels: bool
) -> dict[str, Any]:
    """collate(), or collate_packed() of the same records where that leaves out a good part of the positions.

    Rows of one length stay rows: attention takes them all at once.
    """
    lengths = [round_up(len(row.tokens), config.record_multiple) for row in rows if row is not None]
    padded = len(rows) * config.padded_length(max(lengths, default=1))
    worth_it = config.padded_length(sum(lengths)) <= padded * (1 - LEAST_SAVED)
    return (collate_packed if worth_it else collate)(rows, config, pad_token_id, with_pixels)


def as_it_is(item: Any) -> Any:
    """Collate function of loaders whose items are whole batches already; torch's own would convert arrays."""
    return item


def _empty(rows: int, length: int, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels [rows, length] that hold nothing."""
    shape = (rows, length)
    return np.full(shape, pad_token_id, dtype=np.int64), np.full(shape, IGNORE_LABEL, dtype=np.int64)


def _images(
    rows: Sequence[EncodedRecord | None], config: DataConfig, with_pixels: bool
) -> dict[str, torch.Tensor | None]:
    """pixels and, where the model has a rule for images of any resolution, plans of all rows."""
    if not with_pixels:
        return {"pixels": None}
    kept = [row for row in rows if row is not None and row.pixels is not None]
    none = np.empty((0, 3, config.side_px, config.side_px), dtype=np.uint8)
    found = {"pixels": torch.from_numpy(np.concatenate([none, *(row.pixels for row in kept)]))}
    if config.any_resolution is not None:
        found["plans"] = torch.from_numpy(plan_numbers([plan for row in kept for plan in row.plans]))
        assert found["plans"][:, 0].sum() == len(found["pixels"]), "tiles that no plan speaks of"
    return found
