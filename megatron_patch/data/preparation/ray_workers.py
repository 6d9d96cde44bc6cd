"""Whole shards, written by the nodes of an existing Ray cluster, as workers.py has them written by processes.

The command itself stays one process, on a node of the cluster: it streams the records, deals them and keeps the
journal.  Sources, output and this repository must lie on storage that every node sees at the same paths.  Nodes look
for them before anything begins, each process before its first shard (nodes may join later), and again whenever a shard
has images that are missing: a node without the mount must not reject records.

Any node but the command's own may die: Ray gives its shards to others, which write the same bytes.
"""

import importlib.util
import os
import pickle
import re
import socket
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron_patch.atomic_files import sync
from megatron_patch.data.preparation.sight import Sight, differences
from megatron_patch.data.preparation.workers import Done, Job, ShardBuilder, WorkersLost
from megatron_patch.errors import UserError

PACKAGE = "ray==2.60.0"  # tried; any with the same calls will do
REPOSITORY = str(Path(__file__).resolve().parents[3])
SECONDS_TO_CONNECT = 5
SECONDS_TO_LOOK = 120  # a node starts a process for it
LOSSES = 10  # of processes or nodes that one shard may live through
MISSING = ("image missing", "image unreadable")


class RayCluster:
    """A cluster that runs already, whose nodes see the sources.  A context manager.

    Raises UserError when Ray is not installed, the cluster does not answer, or a node does not see what this one does.
    """

    def __init__(self, address: str | None, seen: Sight) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError(f"--engine ray: Ray is not installed for {sys.executable}; pip install {PACKAGE}")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to Ray's makers
        # Where something else answers, or the cluster last seen here is gone, Ray tries 20 times, 40 s each.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
        if address != "auto":
            _check_answer(address)
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError: whatever Ray has to say
            raise UserError(
                f"--ray-address {address}: {' '.join(str(error).split())[:500]}; wanted a Ray cluster of which this "
                "machine is a node (ray start --head --disable-usage-stats on the first, ray start --address=HOST:PORT "
                "on the others)"
            ) from None
        self._ray = ray
        self.seen = seen
        self._call = ray.remote(_by_value(REPOSITORY))
        self.check_nodes(pickle.dumps((None, seen, None)))

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def workers(self, at_once: int | None) -> Callable[[ShardBuilder], "RayWorkers"]:
        """What makes workers of a shard builder; at_once: shards at work or waiting, None: two for each core."""
        return lambda maker: RayWorkers(self, at_once or max(2, 2 * self.cores()), maker)

    def cores(self) -> int:
        """Of all nodes."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def make(self, setup: bytes, job: Job) -> Any:
        """Begin a shard; its ObjectRef."""
        return self._call.options(num_cpus=1, max_retries=LOSSES).remote("make", setup, pickle.dumps(job))

    def check_nodes(self, setup: bytes) -> None:
        """Each node that has cores looks for itself.  Raises UserError."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes, begun = self._nodes(), {}
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": LOSSES, "scheduling_strategy": here}
            begun[node] = self._call.options(**options).remote("look", setup)
        problems = [] if nodes else ["none of them has a CPU core for tasks"]
        for node, answer in begun.items():
            try:
                problems += [f"{nodes[node]}: {problem}" for problem in self._ray.get(answer, timeout=SECONDS_TO_LOOK)]
            except Exception as error:  # of Ray, or of the import of this package there
                if node in self._nodes():  # else it was dead already, which Ray tells late
                    told = getattr(error, "cause", None) or error
                    problems.append(f"{nodes[node]}: {type(told).__name__}: {' '.join(str(told).split())[:300]}")
        if problems:
            shown = "".join(f"\n  {problem}" for problem in problems[:10])
            raise UserError(
                f"{len(problems)} of what the nodes of the cluster ({len(begun)}) need is not there; wanted sources, "
                f"output and {REPOSITORY} on storage that every node sees at the same paths: mount it, or take the "
                f"node out of the cluster{shown}"
            )

    def _nodes(self) -> dict[str, str]:
        """{id: name} of the nodes that have cores and, as far as Ray knows, live."""
        return {
            node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) > 0
        }


class RayWorkers:
    """As workers.Workers.  Raises UserError when a node does not see the folder in which the shards grow."""

    def __init__(self, cluster: RayCluster, at_once: int, maker: ShardBuilder) -> None:
        self.at_once = at_once
        self._cluster = cluster
        self._token = maker.folder / f"ray.part-{os.urandom(8).hex()}"
        self._token.write_text(self._token.name)
        self._setup = pickle.dumps((maker, cluster.seen, str(self._token)))
        try:
            cluster.check_nodes(self._setup)
        except BaseException:
            self._token.unlink()
            raise

    def submit(self, job: Job) -> "Future[Any]":
        """Begin a job."""
        return self._cluster.make(self._setup, job).future()

    def result(self, begun: "Future[Any]") -> Done:
        """Wait for a job.  Raises OSError when its shard could not be written, UserError when it was lost for good."""
        from ray.exceptions import RayError, RayTaskError

        try:
            found = begun.result()
        except RayTaskError:
            raise  # a fault of this program
        except RayError as error:
            raise WorkersLost(
                f"the Ray cluster gave a shard up: {' '.join(str(error).split())[:300]}; give --resume to go on"
            ) from error
        if isinstance(found, OSError):
            raise found
        if isinstance(found, str):
            raise WorkersLost(f"{found}; mount it, or take the node out of the cluster, and give --resume to go on")
        return found

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self._token.unlink(missing_ok=True)


def _check_answer(address: str) -> None:
    """Ray itself would wait long.  Raises UserError."""
    found = re.fullmatch(r"([^\s/]+):(\d{1,5})", address)
    if found is None:
        raise UserError(
            f"--ray-address {address}: wanted HOST:PORT of the cluster's head, as ray start printed it; the command "
            "runs on a node of the cluster, not through Ray's client"
        )
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray-address {address}: does not answer ({error}); wanted HOST:PORT of the cluster's head, as ray start "
            "printed it"
        ) from None


# ------------------------------------------------------------------------------------------------ on the nodes


def _by_value(repository: str) -> Callable[..., Any]:
    """A function that Ray sends as it is, so that a node needs no PYTHONPATH to find this module."""

    def call(name: str, *words: bytes) -> Any:
        import importlib
        import sys

        if repository not in sys.path:
            sys.path.insert(0, repository)
        return getattr(importlib.import_module("megatron_patch.data.preparation.ray_workers"), name)(*words)

    return call


_setups: dict[bytes, tuple[ShardBuilder, Sight, str]] = {}  # of this process: the one in use, unpickled


def look(setup: bytes) -> list[str]:
    """What this node does not see; setup: pickled (shard builder, files seen, token in its folder), or Nones."""
    _, seen, token = pickle.loads(setup)
    return _unseen(seen, token)


def make(setup: bytes, job: bytes) -> Done | OSError | str:
    """Make a pickled Job: what became of it, why it could not be written, or why this node cannot be trusted."""
    is_new = setup not in _setups
    maker, seen, token = pickle.loads(setup) if is_new else _setups[setup]
    if is_new and (problems := _unseen(seen, token)):
        return _named(problems)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    _setups.clear()
    _setups[setup] = (maker, seen, token)
    wanted = pickle.loads(job)
    try:
        done = maker.make(wanted)
        if done.written:
            sync(maker.folder / f"{wanted.name}.idx")  # this node may be gone when the folder is finished
    except OSError as error:
        return error
    lacking = any(rejection.reason in MISSING for rejection in done.rejected)
    if lacking and (problems := _unseen(seen, token)):
        return _named(problems)
    return done


def _unseen(seen: Mapping[str, str | None], token: str | None) -> list[str]:
    problems = differences(seen)
    if token is not None:
        path = Path(token)
        try:
            if path.read_text() != path.name:
                raise FileNotFoundError(f"{path} is another file")
            probe = path.with_name(f"{path.name}-{os.urandom(8).hex()}")
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            problems.append(f"{path.parent} is not the folder of the command, or not to be written ({error})")
    return problems


def _named(problems: list[str]) -> str:
    return f"node {socket.gethostname()}: {'; '.join(problems[:3])}"
