"""Asks two or more models the same prompts and shows where they first choose another token.

    python examples/llava_mcore/compare_answers.py CHECKPOINT EXPORTED --prompts P.jsonl --image-root IMAGES

Each model is a Megatron checkpoint or an exported Hugging Face folder; the first is what the others are compared with.
For each difference: the tokens around it, and both tokens' probabilities by both models; equal ones (0.412 and 0.411)
tell of rounding, far ones of different weights, templates or images.  --output: all token ids as JSON lines.

Lines of P.jsonl as for run_inference_llava.sh; those that are no prompts are named and left out.

Exit code: 0 all tokens are equal, 1 some differ, 2 the call is wrong.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.llava_mcore.engine_options import exit_code, sampling_of
from megatron_patch.atomic_files import write_text
from megatron_patch.errors import UserError
from megatron_patch.inference import Request, open_engine
from megatron_patch.inference.compare import Comparison, compare
from megatron_patch.inference.engine import DTYPES
from megatron_patch.inference.prompt_file import count_lines, read_lines, texts_of
from megatron_patch.launch.asking import add_sampling_options, positive

AROUND = 4  # token ids shown before a difference


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="DIR", help="checkpoints or exported folders")
    parser.add_argument("--prompts", type=Path, required=True, metavar="JSONL", help="the prompts, one a line")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="image names start here; default: beside JSONL")
    parser.add_argument("--output", type=Path, metavar="JSONL", help="token ids of all answers")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts at once; default: 8")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: fp32 on a CPU, else as stored")
    parser.add_argument("--template", metavar="NAME", help="default: as each model was trained")
    add_sampling_options(parser)
    return parser.parse_args()


def read_requests(arguments: argparse.Namespace) -> list[Request]:
    """The prompts; what is none is named on stderr.  Raises UserError: there is none."""
    texts = texts_of(arguments.prompts, range(count_lines(arguments.prompts)))
    found = []
    for number, line in enumerate(read_lines(texts, arguments.image_root or arguments.prompts.absolute().parent), 1):
        if line.request is None:
            print(f"left out: line {number}: {line.error}", file=sys.stderr)
        else:
            found.append(line.request)
    if not found:
        raise UserError(f"{arguments.prompts} holds no prompt; wanted one on each line")
    return found


def show(models: list[Path], comparison: Comparison) -> None:
    """The differences, and for each model how many answers are equal."""
    for difference in comparison.differences:
        answers = [answers[difference.prompt] for answers in comparison.answers]
        print(f"{answers[0].id}: token {difference.position + 1} differs")
        start = max(0, difference.position - AROUND)
        for model, choice in zip((0, difference.model), difference.choices, strict=True):
            around = " ".join(map(str, answers[model].token_ids[start : difference.position + AROUND + 1]))
            print(
                f"  {models[model]}: {choice.token!r} with probability {choice.probability:.4f}, the other's "
                f"{choice.of_the_other:.4f}; ids from token {start + 1}: {around}"
            )
    count = len(comparison.answers[0])
    for model in range(1, len(models)):
        different = sum(difference.model == model for difference in comparison.differences)
        print(f"{models[model]}: {count - different} of {count} answers have the tokens of {models[0]}")


def main() -> int:
    arguments = parse_arguments()
    if len(arguments.models) < 2:
        raise UserError("wanted two models or more; the first is what the others are compared with")
    models = [
        partial(open_engine, model, dtype=arguments.dtype, template=arguments.template) for model in arguments.models
    ]
    requests = read_requests(arguments)
    comparison = compare(models, requests, sampling_of(arguments), arguments.batch_size)
    show(arguments.models, comparison)
    if arguments.output is not None:
        names = [str(model) for model in arguments.models]
        lines = [
            {"id": answers[0].id, **dict(zip(names, (answer.token_ids for answer in answers), strict=True))}
            for answers in zip(*comparison.answers, strict=True)
        ]
        write_text(arguments.output, "".join(json.dumps(line) + "\n" for line in lines))
    return 1 if comparison.differences else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
