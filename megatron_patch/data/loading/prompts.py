"""The first questions of a validation set, as prompts that a model can answer."""

from dataclasses import dataclass

import numpy as np

from megatron_patch.data.answer import AnswerReader
from megatron_patch.data.conversation import IMAGE_MARK, VIDEO_MARK, Exchange
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.task_encoder import TaskEncoder, plan_numbers
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class Question:
    """The first question of a record.  S: tokens of the prompt, N: tiles, M: images."""

    record_id: str
    text: str  # without image marks
    reference: str
    tokens: np.ndarray  # int64 [S], up to where the answer begins
    pixels: np.ndarray  # uint8 [N, 3, side_px, side_px]
    plans: np.ndarray  # int64 [M, PLAN_FIELDS]


class Prompts:
    """The first usable records of the val split, in stored order; `reader` reads answers to them."""

    def __init__(self, path: str, config: DataConfig, count: int) -> None:
        """count: questions wanted; a smaller dataset gives fewer."""
        tokenizer = load_tokenizer(config.tokenizer_path)
        self._encoder = TaskEncoder(config, with_pixels=True, tokenizer=tokenizer)
        self.reader = AnswerReader(tokenizer, self._encoder.conversation.ending_id)
        dataset = Dataset(path, "val")
        self.found: list[Question] = []
        for index in range(len(dataset)):
            if len(self.found) == count:
                break
            parts = dataset[index]
            if parts is None:  # left out by split.yaml
                continue
            try:
                self.found.append(self._question(parts))
            except RecordError:  # validation itself counts and names it
                continue

    def _question(self, parts: dict) -> Question:
        record = cook(parts)
        first = record.exchanges[0]
        encoded = self._encoder.encode_record(record)
        conversation, text = self._encoder.conversation, first.question
        marks = conversation.marks_in(text)
        plans = encoded.plans[: len(marks)]
        counts = {
            mark: [plan.tokens for plan, its in zip(plans, marks, strict=True) if its == mark]
            for mark in (IMAGE_MARK, VIDEO_MARK)
        }
        asked = conversation.encode([Exchange(text, None)], record.system, counts[IMAGE_MARK], counts[VIDEO_MARK])
        text = conversation.without_marks(text)
        return Question(
            record.record_id,
            text,
            first.answer or "",
            np.asarray(asked.ids),
            encoded.pixels[: sum(plan.tiles for plan in plans)],
            plan_numbers(plans),
        )

    @property
    def pad_token_id(self) -> int:
        """Fills the end of a row."""
        return self._encoder.conversation.pad_token_id
