"""Answers questions about images with a trained LLaVA: a Megatron checkpoint, or an exported Hugging Face folder.

All prompts of a file:

    bash run_inference_llava.sh --model DIR --prompts P.jsonl --image-root IMAGES --output A.jsonl [--batch-size 8]

One prompt, the answer on standard output:

    bash run_inference_llava.sh --model DIR --image cat.jpg --prompt "What is this?"

Each line of P.jsonl is {"image": ..., "prompt": ...}, {"question_id": ..., "image": ..., "text": ...} or
{"id": ..., "images": [...], "conversations": [{"from": "human", "value": ...}]}.  Each line of A.jsonl belongs to the
same line of P.jsonl: id, answer, finish_reason (stop or length), prompt_tokens, completion_tokens; or id and error.
Lines that cannot be answered are counted and named on stderr at the end.  Until all is answered the lines stand in
A.jsonl.partial; the same command goes on there after an interruption.

Exit code: 0 when every line is accounted for, those with an error too; 2 when the call is wrong.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.llava_mcore.engine_options import (
    add_engine_options,
    add_sampling_options,
    engine_of,
    exit_code,
    positive,
    sampling_of,
)
from megatron_patch.data.conversation import Exchange
from megatron_patch.errors import UserError
from megatron_patch.inference import Request
from megatron_patch.inference.run import TOLD, Job, check_job, run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_inference_llava.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint or exported folder")
    many = parser.add_argument_group("a file of prompts")
    many.add_argument("--prompts", type=Path, metavar="JSONL", help="the prompts, one a line")
    many.add_argument("--image-root", type=Path, metavar="DIR", help="image names start here; default: beside JSONL")
    many.add_argument("--output", type=Path, metavar="JSONL", help="the answers, one a line; must not exist")
    many.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts at once; default: 8")
    one = parser.add_argument_group("one prompt")
    one.add_argument("--prompt", metavar="TEXT", help="may hold <image> where an image stands")
    one.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be given again")
    add_sampling_options(parser)
    add_engine_options(parser)
    return parser.parse_args()


def answer_one(arguments: argparse.Namespace) -> None:
    """One prompt, streamed to standard output."""
    request = Request("prompt", (Exchange(arguments.prompt, None),), tuple(arguments.image))
    sampling = sampling_of(arguments)
    with engine_of(arguments) as engine:
        for piece in engine.stream(request, sampling):
            print(piece, end="", flush=True)
    print()


def answer_file(arguments: argparse.Namespace) -> None:
    """All prompts of a file."""
    job = Job(
        prompts=arguments.prompts,
        image_root=arguments.image_root or arguments.prompts.absolute().parent,
        output=arguments.output,
        sampling=sampling_of(arguments),
        batch_size=arguments.batch_size,
        model={
            "model": str(arguments.model.absolute()),
            "engine": arguments.engine,
            "dtype": arguments.dtype,
            "template": str(arguments.template),
        },
    )
    check_job(job)
    with engine_of(arguments) as engine:
        summary = run(job, engine)
    print(f"{summary.lines} lines, {summary.lines - len(summary.errors)} answered: {job.output}", file=sys.stderr)
    if summary.errors:
        more = len(summary.errors) - TOLD
        told = [*summary.errors[:TOLD], *([f"and {more} more, see the lines with `error`"] if more > 0 else [])]
        print(f"{len(summary.errors)} could not be answered:", *told, sep="\n  ", file=sys.stderr)


def main() -> None:
    arguments = parse_arguments()
    if (arguments.prompts is None) == (arguments.prompt is None):
        raise UserError("wanted --prompts with a file, or --prompt with a text, one of them; see --help")
    if arguments.prompts is None:
        if arguments.output is not None or arguments.image_root is not None:
            raise UserError("--output and --image-root belong to --prompts; one prompt's answer is printed")
        answer_one(arguments)
    elif arguments.output is None or arguments.image:
        raise UserError("--prompts wants --output, and no --image: images are named in the file; see --help")
    else:
        answer_file(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
