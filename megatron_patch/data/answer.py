"""Token ids of an answer -> has the model ended it, and its text."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoding makes of the first bytes of a character whose others are still to come


class AnswerReader:
    """Reads what a model writes behind a prompt.

    Args:
        ending_id: of the token by which the template ends an answer; None: it teaches none (plain), and the answer ends
            at its first newline.
    """

    def __init__(self, tokenizer: Any, ending_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._ends_at_newline = ending_id is None
        self._endings = {token_id for token_id in (ending_id, tokenizer.eos_token_id) if token_id is not None}

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Has the model ended its answer?"""
        if ids and ids[-1] in self._endings:
            return True
        return self._ends_at_newline and "\n" in self._decode(ids).lstrip()

    def text(self, ids: Sequence[int]) -> str:
        """The answer's text, without special tokens and outer white space."""
        if ids and ids[-1] in self._endings:
            ids = ids[:-1]  # not every tokenizer calls it special
        decoded = self._decode(ids).strip()
        return decoded.split("\n")[0].rstrip() if self._ends_at_newline else decoded

    def text_so_far(self, ids: Sequence[int]) -> str:
        """The beginning of text() that further tokens cannot change."""
        return self.text(ids).rstrip(BROKEN).rstrip()

    def token(self, token_id: int) -> str:
        """One token as the tokenizer spells it, special ones too."""
        return self._tokenizer.decode([token_id])

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
