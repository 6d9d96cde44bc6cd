"""Requests -> the tokens and pixels that training would have made of them, by the settings in the model's folder."""

from pathlib import Path

import numpy as np

from megatron_patch.arguments import auto_template
from megatron_patch.data.answer import AnswerReader
from megatron_patch.data.conversation import IMAGE_MARK, ConversationEncoder, Exchange
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.task_encoder import decode_images, image_sizes, plan_numbers
from megatron_patch.data.record import image_in_front
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.templates import find_template
from megatron_patch.inference.interface import Prompt, Request, RequestError
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from megatron_patch.tokenizer_files import load_tokenizer


class PromptEncoder:
    """Encodes requests for the model of one folder; `reader` reads its answers.

    Args:
        folder: the `llava/` folder of a checkpoint, or an exported Hugging Face folder.
        template: in place of the one that the model was trained with.
        settings: of a training under way, in place of those in the folder.
    Raises:
        UserError: files are missing or do not fit each other.
    """

    def __init__(
        self, folder: LlavaFolder, template: str | None = None, settings: TrainingSettings | None = None
    ) -> None:
        geometry, settings = folder.geometry(), settings or folder.settings
        language, tower = geometry.language, geometry.tower
        self.template = template or auto_template(folder)
        self.max_tokens = min(language.max_positions, language.sliding_window or language.max_positions)
        images = folder.image_processing(tower.side_px)
        self._config = DataConfig(
            tokenizer_path=str(folder.tokenizer),
            template=self.template,
            image_token_id=geometry.image_token_id,
            image_tokens=tower.image_tokens,
            any_resolution=geometry.any_resolution,
            side_px=tower.side_px,
            image_mean=images["image_mean"],
            center_crop=images["center_crop"],
            resample=images["resample"],
            decoder_seq_len=self.max_tokens,
            **settings.for_data(),
            **{"micro_batch_size": 1, "length_multiple": 1, "seed": 0, "num_workers": 0},
        )
        tokenizer = load_tokenizer(folder.tokenizer)
        self._conversation = ConversationEncoder(
            tokenizer,
            self.template,
            geometry.image_token_id,
            self._config.tokens_per_mark,
            image_conv_front=settings.image_conv_front,
            image_start_end=settings.image_start_end,
        )
        self._takes_questions = "{question}" in find_template(self.template).question
        self.pad_token_id = self._conversation.pad_token_id
        self.reader = AnswerReader(tokenizer, self._conversation.ending_id)

    def encode(self, request: Request) -> Prompt:
        """Raises RequestError: the request cannot be answered, with the reason."""
        try:
            return self._encode(request)
        except RecordError as error:
            raise RequestError(f"{request.id}: {error}") from None

    def _encode(self, request: Request) -> Prompt:
        turns = _with_marks(request)
        images, config = [_bytes_of(image) for image in request.images], self._config
        sizes = image_sizes(images, config)
        plans = [config.image_plan(size, len(images)) for size in sizes]
        encoded = self._conversation.encode(turns, request.system, [plan.tokens for plan in plans])
        if len(encoded.ids) >= self.max_tokens:
            raise RecordError(
                "too long",
                f"{len(encoded.ids)} tokens ({len(request.images)} images), wanted fewer than {self.max_tokens}",
            )
        if self._takes_questions and not turns[-1].question.replace(IMAGE_MARK, "").strip():
            raise RecordError("malformed", "the prompt is empty")
        tokens, pixels = np.asarray(encoded.ids, dtype=np.int64), decode_images(images, config)
        return Prompt(request.id, tokens, pixels, plan_numbers(plans), tuple(filter(None, sizes)))


def _with_marks(request: Request) -> list[Exchange]:
    """The turns, checked, with as many marks as images, where training puts them.  Raises RecordError."""
    turns = list(request.turns)
    if not turns or turns[-1].answer is not None or any(turn.answer is None for turn in turns[:-1]):
        raise RecordError("malformed", "wanted questions with answers, and a last question without one")
    texts = [request.system or "", *(text for turn in turns for text in (turn.question, turn.answer or ""))]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RecordError("malformed", f"a turn is not Unicode text ({error})") from None
    marks, images = sum(turn.question.count(IMAGE_MARK) for turn in turns), len(request.images)
    if marks == 0 and images:
        turns[0] = Exchange(f"{IMAGE_MARK}\n" * images + turns[0].question, turns[0].answer)
    elif images == 1:  # several marks in a turn are one there
        turns = [
            Exchange(image_in_front(turn.question), turn.answer) if IMAGE_MARK in turn.question else turn
            for turn in turns
        ]
    marks = sum(turn.question.count(IMAGE_MARK) for turn in turns)
    if marks != images:
        raise RecordError("image marks", f"{marks} {IMAGE_MARK} marks, {images} images")
    return turns


def _bytes_of(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise RecordError("image missing", f"{image} ({error.strerror})") from None
