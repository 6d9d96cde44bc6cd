"""Answers questions about images.  Started by run_inference_llava.sh, whose --help tells all."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.llava_mcore.engine_options import engine_of, exit_code, ray_engines_of, sampling_of
from megatron_patch.data.conversation import Exchange
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.video import FrameSampling, read_frames
from megatron_patch.errors import UserError
from megatron_patch.inference import Request
from megatron_patch.inference.ray_engines import answer_by
from megatron_patch.inference.run import TOLD, Job, check_job, merge, run, run_by
from megatron_patch.launch.asking import COMMANDS, image_root


def answer_one(arguments: argparse.Namespace) -> None:
    """One prompt, streamed to standard output."""
    try:
        videos = tuple(tuple(read_frames(str(video), FrameSampling())) for video in arguments.video)
    except RecordError as error:
        raise UserError(f"--video: {error}") from None
    request = Request("prompt", (Exchange(arguments.prompt, None),), tuple(arguments.image), videos=videos)
    sampling = sampling_of(arguments)
    with engine_of(arguments) as engine:
        for piece in engine.stream(request, sampling):
            print(piece, end="", flush=True)
    print()


def answer_file(arguments: argparse.Namespace) -> None:
    """All prompts of a file."""
    job = Job(
        prompts=arguments.prompts,
        image_root=image_root(arguments),
        output=arguments.output,
        sampling=sampling_of(arguments),
        batch_size=arguments.batch_size,
        model={
            "model": str(arguments.model.absolute()),
            "engine": arguments.engine,
            "dtype": arguments.dtype,
            "template": str(arguments.template),
        },
        part=arguments.part,
    )
    if arguments.merge:
        summary = merge(job)
    else:
        check_job(job)
        if arguments.ray_address is None:
            with engine_of(arguments) as engine:
                summary = run(job, engine)
        else:
            with ray_engines_of(arguments, [job.prompts, job.image_root], job.output) as actors:
                summary = run_by(answer_by(actors, job.image_root, job.sampling, job.batch_size), job)
    print(f"{summary.lines} lines, {summary.lines - len(summary.errors)} answered: {job.target}", file=sys.stderr)
    if summary.errors:
        more = len(summary.errors) - TOLD
        told = [*summary.errors[:TOLD], *([f"and {more} more, see the lines with `error`"] if more > 0 else [])]
        print(f"{len(summary.errors)} could not be answered:", *told, sep="\n  ", file=sys.stderr)


def main() -> None:
    command = COMMANDS["inference"]
    arguments = command.parser().parse_args()
    if problems := command.problems(arguments):
        raise UserError("; ".join(problems))
    if arguments.prompts is None:
        answer_one(arguments)
    else:
        answer_file(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
