"""Conversations -> token ids and the mask of trained tokens.

A template turns question/answer pairs into segments; each segment knows whether it is trained.  The text between two
pictures is tokenised as one piece, as LLaVA's `tokenizer_image_token` does, and a token is trained when it covers a
character of a trained segment.  So ids equal the original's for every tokenizer and no length is ever re-counted, which
is where the original masks whole samples by mistake.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError

IMAGE_MARK = "<image>"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Exchange:
    """A question, with an IMAGE_MARK where each of its pictures stands, and its answer (None: still to be given)."""

    question: str
    answer: str | None


@dataclass(frozen=True)
class Segment:
    """A piece of the text and whether its tokens are trained."""

    text: str
    trained: bool = False


@dataclass(frozen=True)
class Template:
    """How exchanges become text, and the token that ends an answer (None: nothing to be learnt as an ending)."""

    render: Callable[[Sequence[Exchange], str], Iterator[Segment]]
    ending: Callable[[Any], str | None]


def _render_plain(exchanges: Sequence[Exchange], ending: str) -> Iterator[Segment]:
    """Stage 1: pictures, caption, newline; the question's words are dropped and nothing marks the end."""
    if len(exchanges) != 1:
        raise RecordError("turns", f"template plain takes one question and one answer, got {len(exchanges)} questions")
    yield Segment(IMAGE_MARK * exchanges[0].question.count(IMAGE_MARK))
    if exchanges[0].answer is not None:
        yield Segment(exchanges[0].answer + "\n", trained=True)


def _render_v1(exchanges: Sequence[Exchange], ending: str) -> Iterator[Segment]:
    """Vicuna v1: `system USER: q ASSISTANT: a</s>USER: ...`."""
    yield Segment(VICUNA_SYSTEM + " ")
    for exchange in exchanges:
        yield Segment(f"USER: {exchange.question} ASSISTANT:")
        if exchange.answer is not None:
            # The space belongs to the answer: a prompt ends with the colon and the model must produce what follows.
            yield Segment(f" {exchange.answer}{ending}", trained=True)


def _render_mistral(exchanges: Sequence[Exchange], ending: str) -> Iterator[Segment]:
    """LLaVA's mistral_instruct, llama_2 without system and second BOS: `[INST] q [/INST] a </s>[INST] ...`."""
    for exchange in exchanges:
        yield Segment(f"[INST] {exchange.question} [/INST]")
        if exchange.answer is not None:
            yield Segment(f" {exchange.answer} {ending}", trained=True)


def _render_qwen(exchanges: Sequence[Exchange], ending: str) -> Iterator[Segment]:
    """ChatML with Qwen's system sentence; the newline after `<|im_end|>` is not trained."""
    yield Segment(f"<|im_start|>system\n{QWEN_SYSTEM}{ending}\n")
    for exchange in exchanges:
        yield Segment(f"<|im_start|>user\n{exchange.question}{ending}\n<|im_start|>assistant\n")
        if exchange.answer is not None:
            yield Segment(exchange.answer + ending, trained=True)
            yield Segment("\n")


TEMPLATES = {
    "plain": Template(_render_plain, ending=lambda tokenizer: None),
    "v1": Template(_render_v1, ending=lambda tokenizer: tokenizer.eos_token or "</s>"),
    "mistral": Template(_render_mistral, ending=lambda tokenizer: tokenizer.eos_token or "</s>"),
    "qwen": Template(_render_qwen, ending=lambda tokenizer: "<|im_end|>"),
}


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids with expanded image placeholders, one trained flag per token, and each picture's first placeholder."""

    ids: list[int]
    trained: list[bool]
    image_starts: list[int]


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one template.

    Raises UserError for an unknown template, a tokenizer without character offsets, an `<image>` token with another id
    than the model's, or one in which the template's ending is not a single token (an ending that cannot be learnt).
    """

    def __init__(self, tokenizer: Any, template: str, image_token_id: int, image_tokens: int) -> None:
        if template not in TEMPLATES:
            raise UserError(f"conversation template is {template!r}; wanted one of {', '.join(TEMPLATES)}")
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {where}: {type(tokenizer).__name__} gives no character offsets; "
                "wanted one with a tokenizer.json (AutoTokenizer writes it with save_pretrained)"
            )
        known_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        if known_id != image_token_id:
            raise UserError(
                f"tokenizer {where}: {IMAGE_MARK} has id {known_id}, the model wants {image_token_id}; "
                "use the tokenizer beside the checkpoint (its llava/ folder)"
            )
        self._render = TEMPLATES[template].render
        self._ending = TEMPLATES[template].ending(tokenizer) or ""
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._image_tokens = image_tokens
        if self._ending and len(self._tokenize(self._ending)[0]) != 1:
            raise UserError(
                f"tokenizer {where}: {self._ending!r}, which ends an answer in template {template}, is "
                f"{len(self._tokenize(self._ending)[0])} tokens, wanted one; choose a template that fits the tokenizer"
            )

    @property
    def pad_token_id(self) -> int:
        """Id that fills the ends of rows; masks go by position, so it may equal another token's."""
        candidates = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(token_id for token_id in candidates if token_id is not None)

    def prompt(self, exchanges: Sequence[Exchange]) -> str:
        """The text of the template, without BOS; with a last answer of None it ends where the model begins."""
        return "".join(segment.text for segment in self._render(exchanges, self._ending))

    def encode(self, exchanges: Sequence[Exchange]) -> EncodedConversation:
        """Exchanges -> ids, trained flags and pictures.  Raises RecordError when the template cannot hold them."""
        ids: list[int] = []
        trained: list[bool] = []
        image_starts: list[int] = []
        pieces = _pieces(self._render(exchanges, self._ending))
        for number, piece in enumerate(pieces):
            if number:  # between two pieces stands a picture
                image_starts.append(len(ids))
                ids += [self._image_token_id] * self._image_tokens
                trained += [False] * self._image_tokens
            piece_ids, offsets = self._tokenize("".join(segment.text for segment in piece))
            if self._image_token_id in piece_ids:
                raise RecordError("image marks", f"the text itself holds the token {IMAGE_MARK}")
            if number == 0:
                # Said explicitly: tokenizers differ in whether they add it.  A text that starts with it keeps one.
                bos = self._tokenizer.bos_token_id
                if bos is not None and piece_ids[:1] != [bos]:
                    ids.append(bos)
                    trained.append(False)
            ids += piece_ids
            trained += _trained_tokens(piece, offsets)
        return EncodedConversation(ids, trained, image_starts)

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the (start, end) characters of each, no special tokens added."""
        if not text:
            return [], []
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["input_ids"], encoding["offset_mapping"]


def _pieces(segments: Iterator[Segment]) -> list[list[Segment]]:
    """Cut the segments at each picture: n pictures give n + 1 pieces, each a list of segments without marks."""
    pieces: list[list[Segment]] = [[]]
    for segment in segments:
        if segment.trained:
            pieces[-1].append(segment)  # an answer never holds a picture, whatever it says
            continue
        first, *rest = segment.text.split(IMAGE_MARK)
        pieces[-1].append(Segment(first))
        pieces += [[Segment(text)] for text in rest]
    return pieces


def _trained_tokens(piece: list[Segment], offsets: list[tuple[int, int]]) -> list[bool]:
    """One flag per token: does it cover a character of a trained segment?  (A token without width counts as one.)"""
    spans = []
    position = 0
    for segment in piece:
        if segment.trained:
            spans.append((position, position + len(segment.text)))
        position += len(segment.text)
    flags = []
    first = 0  # spans and tokens are both in order of the text
    for start, end in offsets:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        flags.append(first < len(spans) and spans[first][0] < max(end, start + 1))
    return flags
