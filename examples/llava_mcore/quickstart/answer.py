"""Asks an exported LLaVA folder questions about images and counts the answers that are exactly right.

    python -m examples.llava_mcore.quickstart.answer MODEL QUESTIONS --out DIR

MODEL      an exported Hugging Face folder, or a Megatron checkpoint
QUESTIONS  a folder with digits.json (LLaVA's JSON format, the gpt turns hold the truth) and images/
DIR        what evaluate_llava.sh writes: answers.jsonl, answers.png (a contact sheet) and more

Every question is asked twice, as `evaluate_llava.sh --benchmark llava` does without and with --swap-images: about its
own image, and about another image (in DIR/other_images). A model that looks at the images is right the first time and
falls to chance the second time.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.llava_mcore import evaluate_llava
from megatron_patch.data.conversation import TEMPLATES
from megatron_patch.errors import UserError
from megatron_patch.evaluation import SCORED

BATCH = 128
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Score:
    """How a question fared over all images; shares are 0..1. `chance`: always giving its most frequent answer."""

    text: str
    count: int
    exact: float
    swapped: float
    chance: float


def score(own: Sequence[dict], swapped: Sequence[dict]) -> list[Score]:
    """Lines of scored.jsonl about the questions' own and about other images -> one row per question text, in the order
    of first appearance."""
    rows = defaultdict(list)
    for line, other in zip(own, swapped, strict=True):
        rows[line["prompt"]].append((line["references"][0], line["score"], other["score"]))
    return [
        Score(
            text=text,
            count=len(row),
            exact=sum(hit for _, hit, _ in row) / len(row),
            swapped=sum(hit for _, _, hit in row) / len(row),
            chance=max(Counter(truth for truth, _, _ in row).values()) / len(row),
        )
        for text, row in rows.items()
    ]


def total(scores: Sequence[Score]) -> Score:
    """All questions together, each weighing the same."""
    count = sum(row.count for row in scores)

    def mean(name: str) -> float:
        return sum(getattr(row, name) * row.count for row in scores) / count

    return Score("all", count, mean("exact"), mean("swapped"), mean("chance"))


def table(scores: Sequence[Score]) -> str:
    lines = [f"{'question':<32}{'asked':>7}{'exact':>9}{'other image':>15}{'chance':>9}"]
    for row in [*scores, total(scores)]:
        lines.append(f"{row.text:<32}{row.count:>7}{row.exact:>9.1%}{row.swapped:>15.1%}{row.chance:>9.1%}")
    return "\n".join(lines)


def answer_all(model: Path, questions: Path, out: Path, template: str | None = None) -> list[Score]:
    """Asks everything twice, writes to `out`, gives the scores.  Raises UserError."""
    if not (questions / "digits.json").is_file():
        raise UserError(
            f"{questions / 'digits.json'}: no such file; make it with examples/llava_mcore/quickstart/make_digits.py"
        )
    words = ["--benchmark", "llava", "--model", str(model), "--data", str(questions)]
    words += ["--batch-size", str(BATCH), "--max-new-tokens", str(MAX_NEW_TOKENS)]
    words += ["--template", template] if template else []
    lines = []
    for folder, more in ((out, []), (out / "other_images", ["--swap-images"])):
        evaluate_llava.evaluate(evaluate_llava.parse_arguments([*words, "--output", str(folder), *more]))
        lines.append([json.loads(line) for line in (folder / SCORED).read_text().splitlines()])
    return score(*lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported Hugging Face LLaVA folder")
    parser.add_argument("questions", type=Path, help="folder with digits.json and images/")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers.jsonl and answers.png")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit with 1 when less than this share is right")
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="default: the one the model was trained with")
    arguments = parser.parse_args()
    try:
        scores = answer_all(arguments.model, arguments.questions, arguments.out, arguments.template)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(table(scores))
    if total(scores).exact < arguments.at_least:
        parser.exit(1, f"error: {total(scores).exact:.1%} exactly right, wanted at least {arguments.at_least:.0%}\n")


if __name__ == "__main__":
    main()
