"""Requests -> the tokens and pixels that training would have made of them, by the settings in the model's folder."""

from pathlib import Path

import numpy as np

from megatron_patch.arguments import auto_template
from megatron_patch.data.answer import AnswerReader
from megatron_patch.data.conversation import IMAGE_MARK, VIDEO_MARK, ConversationEncoder, Exchange
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.task_encoder import check_videos, decode_images, image_sizes, plan_numbers
from megatron_patch.data.record import mark_in_front
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
            video_token_id=geometry.video_token_id,
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
            video_token_id=geometry.video_token_id,
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
        config = self._config
        check_videos(len(request.videos), config)
        images = [_bytes_of(image) for image in request.images]
        videos = [[_bytes_of(frame) for frame in video] for video in request.videos]
        sizes = image_sizes(images, config)
        of_images = [config.image_plan(size, len(images)) for size in sizes]
        of_videos = [config.video_plan(len(frames)) for frames in videos]
        counts = [[plan.tokens for plan in plans] for plans in (of_images, of_videos)]
        encoded = self._conversation.encode(turns, request.system, *counts)
        if len(encoded.ids) >= self.max_tokens:
            seen = f"{len(images)} images" + (f", {len(videos)} videos" if videos else "")
            raise RecordError("too long", f"{len(encoded.ids)} tokens ({seen}), wanted fewer than {self.max_tokens}")
        if self._takes_questions and not self._conversation.without_marks(turns[-1].question):
            raise RecordError("malformed", "the prompt is empty")
        plans = encoded.in_order(of_images, of_videos)
        pixels = decode_images(images, config, videos, plans)
        tokens = np.asarray(encoded.ids, dtype=np.int64)
        return Prompt(request.id, tokens, pixels, plan_numbers(plans), tuple(filter(None, sizes)))


def _with_marks(request: Request) -> list[Exchange]:
    """The turns, checked, with marks where training puts them; the encoder counts these.  Raises RecordError."""
    turns = list(request.turns)
    if not turns or turns[-1].answer is not None or any(turn.answer is None for turn in turns[:-1]):
        raise RecordError("malformed", "wanted questions with answers, and a last question without one")
    texts = [request.system or "", *(text for turn in turns for text in (turn.question, turn.answer or ""))]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RecordError("malformed", f"a turn is not Unicode text ({error})") from None
    counts = {IMAGE_MARK: len(request.images)} | ({VIDEO_MARK: len(request.videos)} if request.videos else {})
    alone = sum(counts.values()) == 1
    for mark, count in reversed(counts.items()):  # images come before videos
        if count and not any(mark in turn.question for turn in turns):
            turns[0] = Exchange(f"{mark}\n" * count + turns[0].question, turns[0].answer)
        elif count and alone:  # several marks in a turn are one there
            turns = [
                Exchange(mark_in_front(turn.question, mark), turn.answer) if mark in turn.question else turn
                for turn in turns
            ]
    return turns


def _bytes_of(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise RecordError("image missing", f"{image} ({error.strerror})") from None
