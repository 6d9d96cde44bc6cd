"""Puts the scores of two or more folders of answers beside each other: those that answer.py has written.

python -m examples.llava_mcore.quickstart.compare_scores OUT.json NAME=ANSWERS NAME=ANSWERS ... [--better-by 0.1]
"""

import argparse
import json
from pathlib import Path

from megatron_patch.atomic_files import write_text
from megatron_patch.errors import UserError
from megatron_patch.evaluation import SCORED


def exact_share(answers: Path) -> float:
    """Of all questions, those that were answered exactly right, 0..1.  Raises UserError."""
    try:
        scores = [json.loads(line)["score"] for line in (answers / SCORED).read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{answers}: no answers ({error}); wanted a folder that answer.py has written") from None
    if not scores:
        raise UserError(f"{answers}: its {SCORED} is empty; wanted a folder that answer.py has written")
    return sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write: {name: share}")
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="a name and its folder of answers")
    parser.add_argument(
        "--better-by", type=float, default=0.0, metavar="SHARE", help="exit with 1 unless the first is so much better"
    )
    arguments = parser.parse_args()
    scores = {}
    for run in arguments.runs:
        name, equals, folder = run.partition("=")
        if not equals or not folder:
            parser.exit(2, f"error: {run}: wanted NAME=DIR with a folder of answers\n")
        try:
            scores[name] = exact_share(Path(folder))
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
    write_text(arguments.out, json.dumps(scores, indent=2) + "\n")
    print("all exactly right: " + ", ".join(f"{name} {share:.1%}" for name, share in scores.items()))
    first, *others = scores.values()
    if others and first < max(others) + arguments.better_by:
        parser.exit(1, f"error: {first:.1%} is not better by {arguments.better_by:.0%}\n")


if __name__ == "__main__":
    main()
