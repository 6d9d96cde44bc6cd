"""Conversations -> token ids and the mask of trained tokens.

A template turns question/answer pairs into segments; each segment knows whether it is trained.  The text between two
images is tokenised as one piece, as LLaVA's `tokenizer_image_token` does, and a token is trained when it covers a
character of a trained segment.  So ids equal the original's for every tokenizer and no length is ever re-counted, which
is where the original masks whole samples by mistake.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from megatron_patch.data.rejection import RecordError
from megatron_patch.data.templates import IMAGE_MARK, TEMPLATES, find_template, write_out
from megatron_patch.errors import UserError
from megatron_patch.llava_kinds import VIDEO_MARK

__all__ = ["IMAGE_MARK", "TEMPLATES", "VIDEO_MARK", "ConversationEncoder", "EncodedConversation", "Exchange"]

Value = TypeVar("Value")

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"  # LLaVA's use_im_start_end


@dataclass(frozen=True)
class Exchange:
    """A question, with an IMAGE_MARK where each of its images stands and a VIDEO_MARK where each video does, and its
    answer (None: still to be given)."""

    question: str
    answer: str | None


class Segment(NamedTuple):
    """A piece of the text and whether its tokens are trained."""

    text: str
    trained: bool = False


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids with expanded placeholders, one trained flag per token, each image's and video's first placeholder."""

    ids: list[int]
    trained: list[bool]
    image_starts: list[int]
    is_video: list[bool]  # of each of image_starts

    def in_order(self, images: Sequence[Value], videos: Sequence[Value]) -> list[Value]:
        """A value of each image and of each video -> the values in the order of the placeholders."""
        left = iter(images), iter(videos)
        return [next(left[is_video]) for is_video in self.is_video]


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one template (a name of TEMPLATES, or a template file).

    image_tokens placeholders with image_token_id stand for each image.  video_token_id: that of a video's placeholders;
    None: the model knows no videos, and VIDEO_MARK is text.  What is said of images holds for videos, too.
    image_conv_front: all images come before the first question, in a turn of their own where the template has one
    (NeMo's sep_image_conv_front).
    image_start_end: each stands between IMAGE_START and IMAGE_END, also in the template `plain` (as in NeMo; LLaVA's
    own code loses them there).

    Raises UserError for an unknown or faulty template, a tokenizer without character offsets, an `<image>` or `<video>`
    token with another id than the model's, or one in which the template's ending, IMAGE_START or IMAGE_END is not a
    single token (and so could not be learnt).
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        image_token_id: int,
        image_tokens: int,
        image_conv_front: bool = False,
        image_start_end: bool = False,
        video_token_id: int | None = None,
    ) -> None:
        texts = write_out(find_template(template), tokenizer.bos_token, tokenizer.eos_token)
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {where}: {type(tokenizer).__name__} gives no character offsets; "
                "wanted one with a tokenizer.json (AutoTokenizer writes it with save_pretrained)"
            )
        self._mark_ids = {IMAGE_MARK: image_token_id}
        if video_token_id is not None:
            self._mark_ids[VIDEO_MARK] = video_token_id
        for mark, wanted_id in self._mark_ids.items():
            known_id = tokenizer.convert_tokens_to_ids(mark)
            if known_id != wanted_id:
                raise UserError(
                    f"tokenizer {where}: {mark} has id {known_id}, the model wants {wanted_id}; "
                    "use the tokenizer beside the checkpoint (its llava/ folder)"
                )
        self._marks = re.compile(f"({'|'.join(map(re.escape, self._mark_ids))})")
        self._tokenizer = tokenizer
        # Called without the wrapper around it, which costs more than the tokenizing of a short conversation.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._texts = texts
        self._image_tokens = image_tokens
        self._image_conv_front = image_conv_front
        self._beside_image = (IMAGE_START, IMAGE_END) if image_start_end else ("", "")
        self._ending_id = None
        if texts.ending:
            self._ending_id = self._single_token(
                texts.ending,
                where,
                f"which ends an answer in template {template}",
                "choose a template that fits the tokenizer",
            )
        if image_start_end:
            for token in (IMAGE_START, IMAGE_END):
                self._single_token(
                    token,
                    where,
                    "which image_start_end puts beside each image",
                    "convert the model with --add-tokens, or leave image_start_end out",
                )

    @property
    def ending_id(self) -> int | None:
        """Id of the token that ends an answer; None where the template has none (plain, v0)."""
        return self._ending_id

    @property
    def pad_token_id(self) -> int:
        """Id that fills the ends of rows; masks go by position, so it may equal another token's."""
        candidates = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(token_id for token_id in candidates if token_id is not None)

    def prompt(self, exchanges: Sequence[Exchange], system: str | None = None) -> str:
        """The text of the template, without BOS; with a last answer of None it ends where the model begins."""
        pieces, marks = _pieces(self._segments(exchanges, system), self._marks, *self._beside_image)
        texts = ("".join(segment.text for segment in piece) for piece in pieces)
        return "".join(text + mark for text, mark in zip(texts, [*marks, ""], strict=True))

    def marks_in(self, text: str) -> list[str]:
        """The marks in a text that stand for images and, where the model knows any, for videos, in their order."""
        return self._marks.findall(text)

    def without_marks(self, text: str) -> str:
        """A text without the marks of marks_in(), and without spaces at its ends."""
        return self._marks.sub("", text).strip()

    def encode(
        self,
        exchanges: Sequence[Exchange],
        system: str | None = None,
        image_tokens: Sequence[int] | None = None,
        video_tokens: Sequence[int] = (),
    ) -> EncodedConversation:
        """Exchanges -> ids, trained flags, images and videos.

        Raises RecordError when the template cannot hold them, or there are more or fewer marks than numbers of tokens.

        system: replaces the template's own system sentence; empty: none at all.
        image_tokens: placeholders of each image, in order; None: the same number for all.
        video_tokens: placeholders of each video, in order.
        """
        pieces, marks = _pieces(self._segments(exchanges, system), self._marks, *self._beside_image)
        left = {}
        for mark, reason, counts in ((IMAGE_MARK, "image", image_tokens), (VIDEO_MARK, "video", video_tokens)):
            found = marks.count(mark)
            counts = [self._image_tokens] * found if counts is None else counts
            # masked_scatter would put what is left over nowhere, and say nothing
            if found != len(counts):
                raise RecordError(f"{reason} marks", f"{found} {mark} marks, {len(counts)} {reason}s")
            left[mark] = iter(counts)
        ids: list[int] = []
        trained: list[bool] = []
        image_starts: list[int] = []
        for number, piece in enumerate(pieces):
            if number:  # between two pieces stands an image
                image_starts.append(len(ids))
                mark = marks[number - 1]
                count = next(left[mark])
                ids += [self._mark_ids[mark]] * count
                trained += [False] * count
            piece_ids, offsets = self._tokenize("".join(segment.text for segment in piece))
            for mark, mark_id in self._mark_ids.items():
                if mark_id in piece_ids:
                    raise RecordError(f"{mark[1:-1]} marks", f"the text itself holds the token {mark}")
            if number == 0:
                # Said explicitly: tokenizers differ in whether they add it.  A text that starts with it keeps one.
                bos = self._tokenizer.bos_token_id
                if bos is not None and piece_ids[:1] != [bos]:
                    ids.append(bos)
                    trained.append(False)
            ids += piece_ids
            trained += _trained_tokens(piece, offsets)
        return EncodedConversation(ids, trained, image_starts, [mark == VIDEO_MARK for mark in marks])

    def _segments(self, exchanges: Sequence[Exchange], system: str | None) -> list[Segment]:
        """The text of a conversation, in pieces that are trained or not."""
        texts = self._texts
        if texts.most_exchanges and len(exchanges) > texts.most_exchanges:
            most = texts.most_exchanges
            limit = "one question and one answer" if most == 1 else f"at most {most} questions and their answers"
            raise RecordError("turns", f"the template takes {limit}, got {len(exchanges)} questions")
        if system is not None and (marks := self.marks_in(system)):
            raise RecordError(f"{marks[0][1:-1]} marks", f"the system sentence holds {marks[0]}")
        sentence = texts.system if system is None else system
        system_turn = texts.system_turn.replace("{system}", sentence) if sentence else ""
        picture_turn = ""
        if self._image_conv_front:
            exchanges, marks = self._without_marks(exchanges)
            if marks and texts.picture_turn:
                picture_turn = texts.picture_turn.replace("{pictures}", marks)
            elif marks:
                first, *rest = exchanges
                exchanges = [Exchange(f"{marks}\n{first.question}".strip(), first.answer), *rest]
        segments = []
        for number, exchange in enumerate(exchanges):
            question = exchange.question
            if texts.images_only:
                question = "".join(self.marks_in(question))
            elif number == 0 and texts.system_in_question:
                question = system_turn + question
            before = texts.between if number else texts.opening + picture_turn
            if number == 0 and not texts.system_in_question:
                before = system_turn + before
            segments.append(Segment(f"{before}{texts.question[0]}{question}{texts.question[1]}"))
            if exchange.answer is not None:
                segments.append(Segment(f"{texts.answer[0]}{exchange.answer}{texts.answer[1]}", trained=True))
                segments.append(Segment(texts.closing))
        return segments

    def _without_marks(self, exchanges: Sequence[Exchange]) -> tuple[list[Exchange], str]:
        """The exchanges without their images, and a mark for each of these."""
        marks = "".join(mark for exchange in exchanges for mark in self.marks_in(exchange.question))
        cleared = [
            Exchange(self.without_marks(exchange.question), exchange.answer)
            if self._marks.search(exchange.question)
            else exchange
            for exchange in exchanges
        ]
        return cleared, marks

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the (start, end) characters of each, no special tokens added."""
        if not text:
            return [], []
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _single_token(self, text: str, where: str, role: str, remedy: str) -> int:
        """The one id of a text, wherever it stands.  Raises UserError when it is several tokens."""
        alone, behind = self._tokenize(text)[0], self._tokenize(f"x{text}")[0]
        if len(alone) != 1:
            raise UserError(f"tokenizer {where}: {text!r}, {role}, is {len(alone)} tokens, wanted one; {remedy}")
        if behind[-1:] != alone:
            raise UserError(
                f"tokenizer {where}: {text!r}, {role}, becomes other tokens behind a word; "
                f"wanted a special token; {remedy}"
            )
        return alone[0]


def _pieces(
    segments: Sequence[Segment], marks: re.Pattern[str], before: str, after: str
) -> tuple[list[list[Segment]], list[str]]:
    """Cut the segments at each mark: n of them give n + 1 pieces, each a list of segments without marks, and the marks.

    before, after: what stands beside an image.
    """
    pieces: list[list[Segment]] = [[]]
    found: list[str] = []
    for segment in segments:
        if segment.trained:  # an answer never holds an image, whatever it says
            pieces[-1].append(segment)
            continue
        first, *rest = marks.split(segment.text)  # texts and marks in turn
        pieces[-1].append(Segment(first) if rest else segment)
        for mark, text in zip(rest[::2], rest[1::2], strict=True):
            pieces[-1][-1] = Segment(pieces[-1][-1].text + before)
            pieces.append([Segment(after + text)])
            found.append(mark)
    return pieces, found


def _trained_tokens(piece: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """One flag per token: does it cover a character of a trained segment?  (A token without width counts as one.)"""
    flags = [False] * len(offsets)
    position = 0
    for text, trained in piece:
        begin, position = position, position + len(text)
        if trained and text:
            # Tokens are in the order of the text: those that end behind its begin and begin before its end.
            first = bisect_right(offsets, begin, key=lambda span: max(span[1], span[0] + 1))
            last = bisect_left(offsets, position, key=lambda span: span[0])
            flags[first:last] = [True] * (last - first)
    return flags
