"""The letter that an answer to a multiple-choice question means."""

import re
from collections.abc import Sequence

from megatron_patch.evaluation.question import LETTERS

# From the surest sign to the weakest; LETTERS are those of the choices, `small` the same in small letters.
_NAMED = r".*\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\W*"
_SIGNS = (
    r"\W*([LETTERSsmall])\W*",  # nothing but the letter: B, (B), b., **B**
    r"\W*([LETTERS])\s*[.):\]](?:\s.*)?",  # B. a cat / (B) a cat / B: a cat
    _NAMED + r"([LETTERS])\b(?!['’]).*",  # Answer: B, since / The answer is (B)
    _NAMED + r"([small])\W*",  # Answer: b
)


def chosen_letter(answer: str, choices: Sequence[str]) -> str | None:
    """`(B)`, `B.`, `Answer: b`, or the text of choice B -> `B`; None where no choice, or no single one, is meant."""
    letters = LETTERS[: len(choices)]
    for sign in _SIGNS:
        pattern = sign.replace("LETTERS", letters).replace("small", letters.lower())
        if found := re.fullmatch(pattern, answer.strip(), re.DOTALL):
            return found[1].upper()
    return _by_text(answer, choices) or _standing_alone(answer, letters)


def multiple_choice(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """1 where the answer means a letter of the references, else 0."""
    return float(chosen_letter(answer, choices) in references)


def _by_text(answer: str, choices: Sequence[str]) -> str | None:
    """The choice whose text is the answer, else the only one whose text stands in it."""
    given, texts = _words(answer), [_words(choice) for choice in choices]
    same = [letter for letter, text in zip(LETTERS, texts, strict=False) if text.strip() and text == given]
    within = [letter for letter, text in zip(LETTERS, texts, strict=False) if text.strip() and text in given]
    return next((found[0] for found in (same, within) if len(found) == 1), None)


def _words(text: str) -> str:
    """Words in small letters, a space before, between and behind them, so that whole words are found."""
    return f" {' '.join(re.findall(r'\w+', text.lower()))} "


def _standing_alone(answer: str, letters: str) -> str | None:
    """The only capital letter that stands alone: `I think it is B`.  `A` and `I` before a word are words themselves."""
    found = set(re.findall(rf"(?<![\w'’])(?![AI] [a-z])([{letters}])(?![\w'’])", answer))
    return found.pop() if len(found) == 1 else None
