"""Answers compared as texts or numbers: equality, edit distance, a tolerance."""

import re
from collections.abc import Sequence
from fractions import Fraction

ANLS_THRESHOLD = 0.5
TOLERANCE = Fraction(5, 100)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, to the letter, else 0."""
    return float(answer.strip() in {reference.strip() for reference in references})


def word_match(answer: str, references: Sequence[str]) -> float:
    """exact_match without regard to case and a final period, as LLaVA prepares answers for GQA's evaluation."""
    return exact_match(_plain(answer), [_plain(reference) for reference in references])


def anls(answer: str, references: Sequence[str]) -> float:
    """0..1: average normalised Levenshtein similarity (Biten et al. 2019, DocVQA), the best over the references.

    1 - distance / length of the longer text; 0 where that is not above ANLS_THRESHOLD.  Case and the white space
    around and between words do not count.
    """
    given = " ".join(answer.lower().split())
    return max((_similarity(given, " ".join(reference.lower().split())) for reference in references), default=0.0)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 where a number is within 5% of a reference's, or a text is the reference's without regard to case; else 0.

    ChartQA (Masry et al. 2022, section 5.1).  `5%` is 0.05; commas within numbers do not count; the bound itself is
    within, computed exactly.  What the reference says decides whether numbers are compared.
    """
    return float(any(_is_close(answer, reference) for reference in references))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def _similarity(first: str, second: str) -> float:
    longer = max(len(first), len(second))
    if longer == 0:
        return 1.0
    distance = edit_distance(first, second) / longer
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and substitutions from one text to the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, 1):
        above, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (character != other))
    return row[-1]


def _is_close(answer: str, reference: str) -> bool:
    wanted, given = _number(reference), _number(answer)
    if wanted is None or given is None:
        return answer.strip().lower() == reference.strip().lower()
    return abs(given - wanted) <= TOLERANCE * abs(wanted)


def _number(text: str) -> Fraction | None:
    """`1,234.5` or `12%` as a number; None for anything else."""
    text = text.strip().replace(",", "")
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if not _NUMBER.fullmatch(text):
        return None
    return Fraction(text) / (100 if percent else 1)
