"""What may be added to an LLM and a tower: special tokens, a trained projector, unused rows of the vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.errors import UserError

_RANGE = re.compile(r"(?P<head>.*?)(?P<first>0|[1-9]\d*)(?P<tail>\D*)\.\.(?P=head)(?P<last>0|[1-9]\d*)(?P=tail)")
DEFAULT_SEED = 1234
_MOST_TOKENS = 100_000  # a slip of the finger in a range should not make an embedding of a billion rows


@dataclass(frozen=True)
class Additions:
    """Wishes of the user; the defaults add `<image>` and a new projector only.

    Attributes:
        tokens: special tokens, appended to the tokenizer in this order, before `<image>`.
        projector: kind of the projector; None: the kind of projector_file, else mlp2x_gelu.
        projector_file: an mm_projector.bin to start from; None: a new projector drawn from `seed`.
        seed: of a new projector; None: DEFAULT_SEED.
        feature_layer: vision_feature_layer for a tower of its own folder; None: -2, LLaVA's.
        vocabulary_multiple: the embedding is given unused rows up to a multiple of this.
        kind: of LLAVA_KINDS, of a LLaVA made from an LLM and a tower; None: llava, 1.5.
    """

    tokens: tuple[str, ...] = ()
    projector: str | None = None
    projector_file: Path | None = None
    seed: int | None = None
    vocabulary_multiple: int = 1
    feature_layer: int | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.vocabulary_multiple < 1:
            raise UserError(
                f"the vocabulary cannot be padded to a multiple of {self.vocabulary_multiple}; pass 1 or more"
            )


def read_tokens(names: Iterable[str]) -> tuple[str, ...]:
    """Tokens from their names; `<extra_id_0>..<extra_id_7>` stands for eight.

    Raises:
        UserError: an empty token, one with white space, one that occurs twice, a range that runs backwards.
    """
    tokens: list[str] = []
    for name in names:
        found = _RANGE.fullmatch(name)
        if found is None:
            if ".." in name:
                raise UserError(
                    f"{name!r} is no range of tokens; wanted the same text around two numbers, like <x_0>..<x_7>"
                )
            tokens.append(name)
            continue
        first, last = int(found["first"]), int(found["last"])
        if not first <= last < first + _MOST_TOKENS:
            raise UserError(f"the range {name!r} holds {last - first + 1} tokens; wanted 1 to {_MOST_TOKENS}")
        tokens += [f"{found['head']}{number}{found['tail']}" for number in range(first, last + 1)]
    for token in tokens:
        if not token or any(letter.isspace() for letter in token):
            raise UserError(f"{token!r} is no special token; wanted a word without white space, like <extra_id_0>")
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UserError(f"special tokens occur twice: {', '.join(twice[:8])}; name each once")
    return tuple(tokens)
