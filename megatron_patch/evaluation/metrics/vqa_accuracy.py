"""VQA accuracy (Antol et al. 2015, visualqa.org/evaluation): how many of ten people gave this answer.

Answers are compared after the normaliser of the official evaluation.  Two things differ from that code, both as in the
evaluator of TextVQA: answers are normalised also where all ten people agree, and a number is looked up in a table that
does not grow with what was looked up before.
"""

import re
from collections.abc import Sequence
from math import fsum

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
SPELLINGS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A word that lacks one apostrophe of a contraction becomes the contraction.
CONTRACTIONS = {
    spelling[:place] + spelling[place + 1 :]: spelling
    for spelling in SPELLINGS.split()
    for place, character in enumerate(spelling)
    if character == "'"
}
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # a period before a digit belongs to the number


def normalize(answer: str) -> str:
    """`Two dogs, on a mat.` -> `2 dogs on mat`: punctuation, articles, numbers, contractions."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    text, in_number = answer, _BETWEEN_DIGITS.search(answer) is not None
    for mark in PUNCTUATION:
        # Beside a space, or where a comma groups digits, a mark goes; otherwise it parts two words.
        glued = in_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if glued else " ")
    words = [NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """0..1: the mean over all people of min(1, others who gave this answer / 3)."""
    given = normalize(answer)
    same = [normalize(reference) == given for reference in references]
    return fsum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)
