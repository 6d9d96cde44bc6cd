"""What the commands that use a trained model share: its engine, and its processes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_patch import device, parent_process
from megatron_patch.errors import UserError
from megatron_patch.inference import Engine, Sampling, open_engine
from megatron_patch.inference.ray_engines import Model
from megatron_patch.ray_cluster import RayActors, ray_actors

REPOSITORY = Path(__file__).resolve().parents[2]


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
        parent_process.end_with_parent()
    return open_engine(arguments.model, arguments.engine, arguments.dtype, arguments.template, tensor, pipeline)


def ray_engines_of(
    arguments: argparse.Namespace, places: Sequence[Path], output: Path
) -> AbstractContextManager[RayActors]:
    """The model of the arguments on the nodes of --ray-address.

    places: what else the answers are made from; output: as ray_actors() takes it.
    """
    template = arguments.template
    if template is not None and Path(template).is_file():
        template = str(Path(template).absolute())
        places = [*places, Path(template)]
    model = Model(arguments.model.absolute(), arguments.engine, arguments.dtype, template)
    places = [model.folder, *(place.absolute() for place in places)]
    address, workers = arguments.ray_address, arguments.ray_workers
    return ray_actors(address, workers, model, places, output, "model, prompts, images, output")


def _become_launcher(processes: int) -> None:
    """The same program once for each process, by processes.py; does not return."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | device.seen_here().environment(nodes=1)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    sys.stdout.flush()
    command = [
        *(sys.executable, "-u", "-m", "megatron_patch.launch.processes"),
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
