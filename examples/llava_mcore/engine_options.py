"""What the commands that use a trained model share: the options of its engine, and its processes."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_patch import device
from megatron_patch.errors import UserError
from megatron_patch.inference import KINDS, Engine, Sampling, open_engine
from megatron_patch.inference.engine import DTYPES

REPOSITORY = Path(__file__).resolve().parents[2]


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Which engine answers, and how it computes."""
    group = parser.add_argument_group("the engine")
    group.add_argument(
        "--engine", choices=KINDS, default="auto", help="default: transformers for an exported folder, else megatron"
    )
    group.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="of a Megatron checkpoint")
    group.add_argument("--pipeline-parallel", type=positive, default=1, metavar="N", help="of a Megatron checkpoint")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="default: fp32 on a CPU, else as the weights are stored"
    )
    group.add_argument(
        "--template", metavar="NAME", help="a conversation template or its file; default: as the model was trained"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    group, default = parser.add_argument_group("sampling"), Sampling()
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N", help="of an answer")
    group.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="T", help="default: 0, the most likely token"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=default.top_p,
        metavar="P",
        help="share of the probability; default: 1",
    )
    group.add_argument("--seed", type=int, default=default.seed, metavar="S", help="default: 0")


def positive(text: str) -> int:
    """`2` -> 2; for argparse."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """Raises UserError: numbers that mean nothing."""
    return Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)


def engine_of(arguments: argparse.Namespace) -> Engine:
    """The engine of arguments.model.

    In a process that nobody has told its rank, one process per part of the model takes this one's place.
    """
    tensor, pipeline = arguments.tensor_parallel, arguments.pipeline_parallel
    if tensor * pipeline > 1 and "LOCAL_RANK" not in os.environ:
        _become_launcher(tensor * pipeline)
    if "LOCAL_RANK" in os.environ:
        device.end_with_parent()
    return open_engine(arguments.model, arguments.engine, arguments.dtype, arguments.template, tensor, pipeline)


def _become_launcher(processes: int) -> None:
    """The same program once for each process, by launch.py; does not return."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | device.seen_here().environment(nodes=1)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    sys.stdout.flush()
    command = [
        *(sys.executable, "-u", "-m", "megatron_patch.launch"),
        *("--nproc_per_node", str(processes), *sys.argv),
    ]
    os.execve(sys.executable, command, environment)


def exit_code(work: Callable[[], int | None]) -> int:
    """Do the work: its code (None: 0), 2 after one sentence on stderr when the input is wrong, 130 when interrupted."""
    try:
        return work() or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # the others have found the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
