"""Questions that are answered with yes or no: POPE and MME."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

# The tasks of MME whose scores are added up (Fu et al. 2023).
MME_SUMS = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


def pope_answer(answer: str) -> str:
    """`yes` or `no`, as POPE's evaluation takes an answer: `no` where its first sentence says no or not, else `yes`.

    Case and punctuation do not count.  An answer without a word is neither (there it counts as yes): empty text.
    """
    words = re.findall(r"\w+", answer.split(".")[0].lower())
    if not words:
        return ""
    return "no" if {"no", "not"} & set(words) else "yes"


def pope_figures(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """accuracy, precision, recall, f1 (of `yes`) and yes_share, all 0..1; 0 where nothing is to divide by."""
    pairs = [(pope_answer(answer), label) for answer, label in zip(answers, labels, strict=True)]
    said_yes = sum(given == "yes" for given, _ in pairs)
    true_yes = sum(label == "yes" for _, label in pairs)
    hits = sum(given == label == "yes" for given, label in pairs)
    return {
        "accuracy": _ratio(sum(given == label for given, label in pairs), len(pairs)),
        "precision": _ratio(hits, said_yes),
        "recall": _ratio(hits, true_yes),
        "f1": _ratio(2 * hits, said_yes + true_yes),
        "yes_share": _ratio(said_yes, len(pairs)),
    }


def mme_answer(answer: str) -> str:
    """`yes`, `no` or neither (empty), as MME's evaluation: what stands in the first four characters."""
    begin = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in begin), "")


def mme_figures(right: Sequence[bool], images: Sequence[str]) -> dict[str, float]:
    """One task: accuracy (questions), accuracy_plus (images with all their questions right) and score, their sum.

    All are percentages, as MME gives them: score is 0..200.
    """
    by_image = defaultdict(list)
    for image, hit in zip(images, right, strict=True):
        by_image[image].append(hit)
    accuracy = 100 * _ratio(sum(right), len(right))
    plus = 100 * _ratio(sum(map(all, by_image.values())), len(by_image))
    return {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy + plus}


def mme_sums(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores of tasks -> perception (0..2000 over its ten tasks) and cognition (0..800 over four)."""
    return {name: sum(scores[task] for task in tasks if task in scores) for name, tasks in MME_SUMS.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
