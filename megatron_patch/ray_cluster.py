"""An existing Ray cluster at work for a command, which stays one process on one of its nodes.

RayCluster     the nodes: each looks whether it sees what the command sees
SharedFolder   a folder of the command's that all of them see
RayActors      processes on the nodes that each open the same thing once, a model, and then do piece after piece

Files and this repository must lie on storage that every node sees at the same paths: nodes look for them before
anything begins, and each process again before its first piece, for nodes may join later.

Any node but the command's own may die: others do its pieces again.
"""

import importlib.util
import os
import pickle
import re
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import UserError
from megatron_patch.object_storage import StorageError
from megatron_patch.sight import Sight, differences, look

PACKAGE = "ray==2.60.0"  # tried; any with the same calls will do
REPOSITORY = str(Path(__file__).resolve().parents[1])
SECONDS_TO_CONNECT = 5
SECONDS_TO_LOOK = 120  # a node starts a process for it
SECONDS_BETWEEN_LOOKS = 10  # whether a node is left that an actor fits on
LOSSES = 10  # of processes or nodes that one piece may live through
QUEUED = 2  # pieces that an actor has: one is done while the other waits
AHEAD = 2  # pieces of each actor that may be done before an earlier one is

Token = tuple[str, str]  # a file, and what must stand in it


class RayCluster:
    """A cluster that runs already, whose nodes see what this one does.  A context manager.

    Args:
        address: HOST:PORT of its head; None: RAY_ADDRESS, else the cluster of which this machine is a node.
        seen: what look() sees here.
        wanted: what that is, for the message.
        option: of the command line that asked for it, for the message.
        models: are models run on it?  Then nodes without a GPU are left out where others have one.
    Raises UserError when Ray is not installed, the cluster does not answer, or a node does not see what this one does.
    """

    def __init__(
        self, address: str | None, seen: Sight, wanted: str, option: str = "--engine ray", models: bool = False
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError(f"{option}: Ray is not installed for {sys.executable}; pip install {PACKAGE}")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to Ray's makers
        # Where something else answers, or the cluster last seen here is gone, Ray tries 20 times, 40 s each.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
        if address != "auto":
            check_answer(address)
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError: whatever Ray has to say
            raise UserError(
                f"--ray-address {address}: {' '.join(str(error).split())[:500]}; wanted a Ray cluster of which this "
                "machine is a node (ray start --head --disable-usage-stats on the first, ray start --address=HOST:PORT "
                "on the others)"
            ) from None
        self.ray = ray
        self.seen = seen
        self._wanted = wanted
        self.call, actor = map(ray.remote, _by_value(REPOSITORY))
        self._actor = actor
        self._needs = "GPU" if models and self._resource("GPU") else "CPU"
        self.check_nodes(None)

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    def cores(self) -> int:
        """Of all nodes."""
        return self._resource("CPU")

    def _resource(self, name: str) -> int:
        return int(self.ray.cluster_resources().get(name, 0))

    def shape(self, workers: int | None) -> "Shape":
        """Of actors with a model: one for each GPU; without any, one for each node, with its cores.

        workers: so many in their place.  Raises UserError: there are not as many GPUs or cores.
        """
        there = self._resource(self._needs)
        if workers is not None and workers > there:
            raise UserError(
                f"--ray-workers {workers}: the cluster has {there} {self._needs}s, and each model takes one; give at "
                f"most {there}, or leave it out"
            )
        if self._needs == "GPU":
            return Shape(workers or there, cpus=1, gpus=1)
        nodes = self._alive("CPU")
        count = workers or len(nodes)
        least = int(min(node["Resources"]["CPU"] for node in nodes))
        return Shape(count, cpus=max(1, least * len(nodes) // max(count, len(nodes))), gpus=0)

    def start(self, shape: "Shape") -> Any:
        """Begin a process for pieces, wherever there is room: its handle."""
        where = {"num_cpus": shape.cpus, "num_gpus": shape.gpus, "scheduling_strategy": "SPREAD"}
        return self._actor.options(**where, max_restarts=0, max_task_retries=0).remote()

    def holds(self, shape: "Shape") -> bool:
        """Is there a node that such a process fits on?"""
        wanted = {"CPU": shape.cpus, "GPU": shape.gpus}
        nodes = [node["Resources"] for node in self._alive(self._needs)]
        return any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in nodes)

    def check_nodes(self, token: "Token | None") -> None:
        """Each node that is needed looks for itself; token: of a SharedFolder.  Raises UserError."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes, begun = self._nodes(), {}
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": LOSSES, "scheduling_strategy": here}
            begun[node] = self.call.options(**options).remote(__name__, "unseen", pickle.dumps((self.seen, token)))
        problems = [] if nodes else ["none of them has a CPU core for tasks"]
        for node, answer in begun.items():
            try:
                problems += [f"{nodes[node]}: {problem}" for problem in self.ray.get(answer, timeout=SECONDS_TO_LOOK)]
            except Exception as error:  # of Ray, or of the import of this package there
                if node in self._nodes():  # else it was dead already, which Ray tells late
                    told = getattr(error, "cause", None) or error
                    problems.append(f"{nodes[node]}: {type(told).__name__}: {' '.join(str(told).split())[:300]}")
        if problems:
            shown = "".join(f"\n  {problem}" for problem in problems[:10])
            raise UserError(
                f"{len(problems)} of what the nodes of the cluster ({len(begun)}) need is not there; wanted "
                f"{self._wanted} and {REPOSITORY} on storage that every node sees at the same paths: mount it, or take "
                f"the node out of the cluster{shown}"
            )

    def _nodes(self) -> dict[str, str]:
        """{id: name} of the nodes that are needed and, as far as Ray knows, live."""
        return {
            node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
            for node in self._alive(self._needs)
        }

    def _alive(self, resource: str) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) > 0]


class SharedFolder:
    """A folder that every node sees as this one does and may write into, known by what stands in a file of it.

    A context manager.  Raises UserError when a node does not.
    """

    def __init__(self, cluster: RayCluster, file: Path) -> None:
        """file: is made, and gone at the end; what a command that was killed has left of it is overwritten."""
        self._file = file.absolute()
        self.token: Token = (str(self._file), os.urandom(8).hex())
        self._file.write_text(self.token[1])
        try:
            cluster.check_nodes(self.token)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The file goes; no node takes the folder for the command's any more."""
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> "SharedFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Shape:
    """How many actors, and what each of them takes of its node."""

    count: int
    cpus: int
    gpus: int


@dataclass(frozen=True)
class _Begun:
    """What an actor has begun: a piece, or with number None opening what pieces work with."""

    actor: int
    number: int | None
    data: bytes


class RayActors:
    """Actors that each have called `opener` and do pieces with what it gave.  A context manager.

    opener and pieces are pickled; a piece is called with what opener gave, in an actor's process.
    """

    def __init__(self, cluster: RayCluster, shape: Shape, opener: Callable[[], Any], folder: SharedFolder) -> None:
        self._cluster, self._shape = cluster, shape
        self._setup = pickle.dumps((pickle.dumps(opener), cluster.seen, folder.token))
        self._actors: dict[int, Any] = {}  # handles by number
        self._open: dict[int, int] = {}  # pieces that each has, of those that have opened
        self._begun: dict[Any, _Begun] = {}  # by Ray's reference
        self._started = 0
        self._losses: Counter[int | None] = Counter()  # by piece

    def __enter__(self) -> "RayActors":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            self._cluster.ray.kill(actor)

    def in_order(self, pieces: Iterable[Callable[[Any], Any]]) -> Iterator[Any]:
        """What each piece gives, in the order of the pieces.

        Raises UserError: opener or a piece raised one, or an OSError; or processes or nodes were lost again and again.
        """
        coming = enumerate(map(pickle.dumps, pieces))
        waiting: deque[tuple[int, bytes]] = deque()  # the next, or one that is done again
        found: dict[int, Any] = {}  # before an earlier one
        wanted, is_end = 0, False
        while True:
            while not is_end and not waiting:
                waiting.extend([piece] if (piece := next(coming, None)) else ())
                is_end = piece is None
            if is_end and not waiting and not found and all(one.number is None for one in self._begun.values()):
                return
            self._start_actors()
            limit = wanted + QUEUED * AHEAD * self._shape.count
            while waiting and waiting[0][0] < limit and (actor := self._free()) is not None:
                number, data = waiting.popleft()
                self._call(actor, number, "do", data)
                if not waiting and (piece := next(coming, None)):
                    waiting.append(piece)
            for number, result in self._finished(waiting):
                found[number] = result
            while wanted in found:
                yield found.pop(wanted)
                wanted += 1

    def _start_actors(self) -> None:
        while len(self._actors) < self._shape.count:
            self._actors[self._started] = self._cluster.start(self._shape)
            self._call(self._started, None, "open_here", self._setup)
            self._started += 1

    def _free(self) -> int | None:
        """The actor with the least to do, unless each has enough."""
        actor = min(self._open, key=self._open.__getitem__, default=None)
        return None if actor is None or self._open[actor] >= QUEUED else actor

    def _call(self, actor: int, number: int | None, name: str, data: bytes) -> None:
        self._begun[self._actors[actor].call.remote(__name__, name, data)] = _Begun(actor, number, data)
        if number is not None:
            self._open[actor] += 1

    def _finished(self, waiting: "deque[tuple[int, bytes]]") -> Iterator[tuple[int, Any]]:
        """Wait for one: its number and what it gave.  What was lost comes to the front of those that wait."""
        from ray.exceptions import RayError, RayTaskError

        ready, _ = self._cluster.ray.wait(list(self._begun), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        if not ready and not self._open and not self._cluster.holds(self._shape):
            raise UserError(
                f"no node of the cluster is left with {self._shape.gpus} GPUs and {self._shape.cpus} cores for a "
                "model; start one, and the same command goes on"
            )
        for reference in ready:
            begun = self._begun.pop(reference)
            try:
                refusal, result = self._cluster.ray.get(reference)
            except RayTaskError:
                raise  # a fault of this program
            except RayError as error:
                self._lose(begun, error)
                if begun.number is not None:
                    waiting.append((begun.number, begun.data))
                    ordered = sorted(waiting)
                    waiting.clear()
                    waiting.extend(ordered)
                continue
            if refusal is not None:
                raise UserError(f"{refusal}; the same command goes on")
            if begun.number is None:
                self._open[begun.actor] = 0
                self._losses[None] = 0
                continue
            if begun.actor in self._open:
                self._open[begun.actor] -= 1
            yield begun.number, result

    def _lose(self, begun: _Begun, error: Exception) -> None:
        """The actor of something begun is gone.  Raises UserError when that was too often."""
        self._losses[begun.number] += 1
        if self._losses[begun.number] > LOSSES:
            raise UserError(
                f"the processes of the cluster died {LOSSES + 1} times at the same piece, perhaps for lack of memory "
                f"({' '.join(str(error).split())[:300]}); the same command goes on"
            ) from error
        self._open.pop(begun.actor, None)
        if (actor := self._actors.pop(begun.actor, None)) is not None:
            self._cluster.ray.kill(actor)  # one that is only out of reach must not go on


@contextmanager
def ray_actors(
    address: str, workers: int | None, opener: Callable[[], Any], places: Sequence[Path], output: Path, wanted: str
) -> Iterator[RayActors]:
    """Actors with a model, which opener() loads.

    Args:
        address: HOST:PORT of the cluster's head; auto: of which this machine is a node.
        workers: models at a time; None: one for each GPU, without any one for each node.
        places: files and folders that every node must see, absolute.
        output: a file or folder that comes to be; where it lies every node sees too.
        wanted: what these are, for the message.
    Raises UserError when the cluster does not answer, or a node does not see all of these.
    """
    known = None if address == "auto" else address
    folder = next(path for path in output.absolute().parents if path.is_dir())
    file = folder / f"{output.name}.ray"
    with (
        RayCluster(known, look(places), wanted, f"--ray-address {address}", models=True) as cluster,
        SharedFolder(cluster, file) as shared,
        RayActors(cluster, cluster.shape(workers), opener, shared) as actors,
    ):
        yield actors


def check_answer(address: str) -> None:
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


def _by_value(repository: str) -> tuple[Callable[..., Any], type]:
    """A function and an actor that Ray sends as they are, so that a node needs no PYTHONPATH to find this package."""

    def call(module: str, name: str, *words: bytes) -> Any:
        import importlib
        import sys

        if repository not in sys.path:
            sys.path.insert(0, repository)
        return getattr(importlib.import_module(module), name)(*words)

    class Process:
        def call(self, module: str, name: str, *words: bytes) -> Any:
            return call(module, name, *words)

    return call, Process


@dataclass
class _Here:
    """Of this actor."""

    opened: Any
    seen: Mapping[str, str | None]
    token: Token


_here: _Here | None = None


def unseen(setup: bytes) -> list[str]:
    """What this node does not see; setup: pickled (files seen, a SharedFolder's token or None)."""
    seen, token = pickle.loads(setup)
    problems = differences(seen)
    if token is not None:
        path = Path(token[0])
        try:
            if path.read_text() != token[1]:
                raise FileNotFoundError(f"{path} is another file")
            probe = path.with_name(f"{path.name}-{os.urandom(8).hex()}")
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            problems.append(f"{path.parent} is not the folder of the command, or not to be written ({error})")
    return problems


def named(problems: list[str]) -> str:
    """What is said of this node."""
    return f"node {socket.gethostname()}: {'; '.join(problems[:3])}"


def check_sight() -> None:
    """For a piece that did not find what it wanted.  Raises UserError: this actor's node does not see it (any more)."""
    if _here is not None and (problems := unseen(pickle.dumps((_here.seen, _here.token)))):
        raise UserError(f"{named(problems)}; mount it, or take the node out of the cluster")


def open_here(setup: bytes) -> tuple[str | None, None]:
    """Open what this actor's pieces work with; (why that cannot be or None, None)."""
    global _here
    opener, seen, token = pickle.loads(setup)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the actors are the parallelism
    _here = _Here(None, seen, token)
    try:
        check_sight()
        _here.opened = pickle.loads(opener)()
    except UserError as error:
        return str(error), None
    except (ImportError, StorageError) as error:
        return named([str(error)]), None
    return None, None


def do(piece: bytes) -> tuple[str | None, Any]:
    """Do a piece: (why it cannot be done or None, what it gave)."""
    try:
        return None, pickle.loads(piece)(_here.opened)
    except UserError as error:
        return str(error), None
    except (OSError, StorageError) as error:
        return named([str(error)]), None
