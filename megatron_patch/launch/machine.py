"""Nodes, processes and devices of a job: where ENV says they come from."""

import contextlib
import os
import re
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from megatron_patch import device
from megatron_patch.launch.rows import Argument, Call, python_path, quoted
from megatron_patch.launch.rules import COUNT, COUNT_OR_ZERO, HOST, PORT, TEXT, TRACKER, Rule, whole

NODES, NODE_RANK = whole(1, 99999), whole(0, 99998)
INTERFACES = "/sys/class/net"
SIOCGIFADDR = 0x8915  # linux/sockios.h
PORTS = 10000, 30000  # below the range from which the system lends its own


@dataclass(frozen=True)
class Job:
    """What the processes of this node are told."""

    processes: int  # on this node
    nodes: int
    node_rank: int
    address: str  # where they meet
    port: int
    device: ModuleType  # of megatron_patch.device

    @property
    def world(self) -> int:
        """Processes on all nodes."""
        return self.processes * self.nodes


# ---------------------------------------------------------------- where a job's variables come from


@dataclass(frozen=True)
class Cluster:
    """A value of ENV.  variables: required in the environment; nodes: number, rank, address and port."""

    meaning: str
    variables: tuple[Argument, ...]
    nodes: Callable[[Call], tuple[int, int, str, int]]
    rank: str  # variable that must be less than the number of nodes
    count: str = ""  # variable that is the number of nodes, where one is
    processes: str = ""  # variable that says how many there are on this node, where NPROC_PER_NODE does not
    world: str = ""  # variable that says how many there are on all nodes


def first_host(nodes: str) -> str:
    """The first of SLURM's list: `gpu[07-09,12],login1` -> gpu07."""
    found = re.match(r"([^\[,]*)(?:\[([^\]]*)\]([^,\[]*))?", nodes)
    prefix, numbers, suffix = (part or "" for part in found.groups())
    return prefix + re.split("[-,]", numbers)[0] + suffix


def port_of_job(job: int) -> int:
    """A port that is the same on all nodes of a job, and another one for most other jobs."""
    low, high = PORTS
    return low + job % (high - low)


def _variable(name: str, rule: Rule, meaning: str) -> Argument:
    return Argument(name, rule, meaning)


DSW = "dsw"
CLUSTERS = {
    "dlc": Cluster(
        "one node of a PAI-DLC or Kubeflow job",
        (
            _variable("WORLD_SIZE", NODES, "nodes of the job"),
            _variable("RANK", NODE_RANK, "number of this node, from 0"),
            _variable("MASTER_ADDR", HOST, "node 0"),
            _variable("MASTER_PORT", PORT, "port on node 0"),
            _variable("KUBERNETES_CONTAINER_RESOURCE_GPU", whole(1, 4096), "GPUs of this node"),
        ),
        lambda call: (call.int("WORLD_SIZE"), call.int("RANK"), call["MASTER_ADDR"], call.int("MASTER_PORT")),
        rank="RANK",
        count="WORLD_SIZE",
        processes="KUBERNETES_CONTAINER_RESOURCE_GPU",
    ),
    "multinode": Cluster(
        "one of several machines, on each of which the same command is typed",
        (
            _variable("WORLD_SIZE", COUNT, "processes of the job on all machines: its GPUs"),
            _variable("NODE_RANK", NODE_RANK, "number of this machine, from 0"),
            _variable("MASTER_ADDR", HOST, "machine 0"),
            _variable("MASTER_PORT", PORT, "port on machine 0"),
        ),
        lambda call: (0, call.int("NODE_RANK"), call["MASTER_ADDR"], call.int("MASTER_PORT")),
        rank="NODE_RANK",
        world="WORLD_SIZE",
    ),
    "slurm": Cluster(
        "one node of a SLURM job, started by srun once on each",
        (
            _variable("SLURM_NNODES", NODES, "nodes of the job"),
            _variable("SLURM_NODEID", NODE_RANK, "number of this node, from 0"),
            _variable("SLURM_JOB_NODELIST", TEXT, "names of the nodes; the first is where the processes meet"),
            _variable("SLURM_JOB_ID", COUNT_OR_ZERO, "number of the job, from which the port follows"),
        ),
        lambda call: (
            call.int("SLURM_NNODES"),
            call.int("SLURM_NODEID"),
            first_host(call["SLURM_JOB_NODELIST"]),
            int(call["MASTER_PORT"] or port_of_job(call.int("SLURM_JOB_ID"))),
        ),
        rank="SLURM_NODEID",
        count="SLURM_NNODES",
        processes="SLURM_GPUS_ON_NODE",
    ),
}
# What says that a job has more nodes than the one that ENV=dsw starts on.
OF_SEVERAL_NODES = {
    "NODE_RANK": lambda value: value > 0,
    "SLURM_NNODES": lambda value: value > 1,
}


def cluster_rows() -> list[tuple[str, Argument]]:
    """Every variable with its value of ENV, for tables."""
    return [(name, row) for name, cluster in CLUSTERS.items() for row in cluster.variables]


def choose_job(call: Call, model_parallel: int) -> Job | None:
    """The job that ENV and the machine describe; None: something is wrong, which the call knows.

    Args:
        model_parallel: processes that hold one model; so many are started where devices do not count, unless
            NPROC_PER_NODE says otherwise.
    """
    if not call.right("ENV", "ACCELERATOR", "GPUS", "NPROC_PER_NODE", "MASTER_PORT"):
        return None
    cluster = CLUSTERS.get(call["ENV"])
    if cluster and not call.right(*(row.name for row in cluster.variables)):
        return None
    kind = device.seen_here() if call["ACCELERATOR"] == "auto" else device.kind(call["ACCELERATOR"])
    if problem := kind.choice_problem(call["GPUS"]):
        name, text = problem
        call.refuse(name, text) if name in call else call.complain(
            f"environment {name}={quoted(call.environment.get(name, ''))}", text
        )
        return None
    of_job = call.environment.get(cluster.processes, "") if cluster and cluster.processes else ""
    processes = int(call["NPROC_PER_NODE"] or (of_job if of_job.isdecimal() else 0))
    if not (cluster and cluster.processes and processes):
        processes = _count(call, kind, processes, model_parallel)
    if processes is None:
        return None
    chosen = call["GPUS"].split(",") if call["GPUS"] else []
    if chosen and processes != len(chosen):
        told = cluster.processes if cluster and cluster.processes and not call["NPROC_PER_NODE"] else "NPROC_PER_NODE"
        call.refuse("GPUS", f"names {len(chosen)} GPUs, and {told} says {processes} processes; each has one")
        return None
    if cluster is None:
        job = Job(processes, 1, 0, "127.0.0.1", int(call["MASTER_PORT"] or free_port()), kind)
        _refuse_several_nodes(call, job)
    else:
        nodes, rank, address, port = cluster.nodes(call)
        if cluster.world:
            nodes, rest = divmod(call.int(cluster.world), processes)
            if rest or not nodes:
                call.refuse(cluster.world, f"must be a multiple of the {processes} processes of this machine")
                return None
        if rank >= nodes:
            counted = f"{cluster.count}={nodes} (nodes, counted from 0)"
            of_world = (
                f"{nodes}: {call[cluster.world]} processes are {nodes} times {processes}" if cluster.world else ""
            )
            call.refuse(cluster.rank, f"must be less than {of_world or counted}")
            return None
        job = Job(processes, nodes, rank, address, port, kind)
    _check_network(call, job)
    return job if call.right("MASTER_PORT") else None


def _count(call: Call, kind: ModuleType, asked: int, model_parallel: int) -> int | None:
    """Processes of this node: those that are asked for, else one for each device."""
    seen = kind.count(call["GPUS"])
    if seen is None:
        return asked or model_parallel
    if seen == 0 and not asked:
        call.refuse(
            "ACCELERATOR",
            f"found no {kind.DEVICES} on this machine; set NPROC_PER_NODE to the number of {kind.DEVICES}, or use "
            "ACCELERATOR=cpu",
        )
        return None
    if 0 < seen < asked:
        call.refuse("NPROC_PER_NODE", f"is more than the {seen} {kind.DEVICES} seen here ({kind.COUNTED_BY})")
        return None
    return asked or seen


def _refuse_several_nodes(call: Call, job: Job) -> None:
    """Each node of a job would train by itself, all of them into one folder."""
    several = OF_SEVERAL_NODES | {"WORLD_SIZE": lambda value: value > job.processes}
    for name, is_of_several in several.items():
        value = call.environment.get(name, "")
        if value.isdecimal() and is_of_several(int(value)):
            call.complain(
                f"environment {name}={value}",
                f"is of a job of several nodes, and ENV=dsw starts {job.processes} processes on this one alone; use "
                f"ENV={' or '.join(CLUSTERS)}, or unset it",
            )


def _check_network(call: Call, job: Job) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = call.environment.get(name, "")
        # NCCL: prefixes, ^ leaves some out, = means exact names
        if not wanted or wanted[0] in "^=" or not os.path.isdir(INTERFACES):
            continue
        known = sorted(os.listdir(INTERFACES))
        exact = name.startswith("GLOO")
        for one in wanted.split(","):
            if not any(found == one or (not exact and found.startswith(one)) for found in known):
                call.complain(f"environment {name}={wanted}", f"must be a network interface (known: {' '.join(known)})")
    if job.node_rank == 0 and call["MASTER_PORT"] and not is_free(job.port):
        call.refuse("MASTER_PORT", "is in use on this machine: another job? name another port, or leave it out")


def is_free(port: int) -> bool:
    """Does nobody on this machine listen on the port?"""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches an address; None: it cannot be told."""
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((socket.gethostbyname(address), 9))  # sends nothing
        own = socket.inet_aton(way.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(way.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if found[20:24] == own:
                    return name
    return None


def free_port() -> int:
    """A port nobody listens on."""
    low, high = PORTS
    while not is_free(port := low + int.from_bytes(os.urandom(4), "big") % (high - low)):
        pass
    return port


def cores() -> int:
    """Of this machine that a process started here may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_words(call: Call, job: Job, output: str, stamp: str) -> list[str]:
    """The command up to the script that processes.py starts."""
    # What needs torch to be seen: tokenizer, template and data fit, labels are learnt, a resumed run had this data.
    check = ["--check"] if call["CHECK"] == "true" else []
    return [
        # as torchrun, which would import torch first
        *(call.python(), "-u", "-m", "megatron_patch.launch.processes", *check),
        *("--max-rollbacks", call["MAX_ROLLBACKS"]),
        *_restarts(call, output),
        *("--nproc_per_node", str(job.processes), "--nnodes", str(job.nodes), "--node_rank", str(job.node_rank)),
        *("--master_addr", job.address, "--master_port", str(job.port)),
        *("--log-dir", f"{output}/log/{stamp}-node{job.node_rank}"),  # nodes may share the disk
    ]


def _restarts(call: Call, output: str) -> list[str]:
    """Of one node alone: the launchers of several would have to agree.  With ENV=slurm train_llava.sbatch restarts."""
    if call["MAX_RESTARTS"] == "0" or call["ENV"] != DSW:
        return []
    return ["--max-restarts", call["MAX_RESTARTS"], "--progress", f"{output}/checkpoint/{TRACKER}"]


def process_environment(call: Call, job: Job) -> dict[str, str]:
    """Variables of the processes beside the caller's."""
    threads = max(1, cores() // job.processes)
    variables: Mapping[str, str] = job.device.environment(job.nodes)
    if job.nodes > 1 and not call.environment.get("GLOO_SOCKET_IFNAME"):
        # gloo would take the one that the host's name stands for, which often is the loopback
        interface = interface_towards(job.address)
        variables = {**variables, **({"GLOO_SOCKET_IFNAME": interface} if interface else {})}
    return {
        "OMP_NUM_THREADS": call.environment.get("OMP_NUM_THREADS") or str(threads),
        "PYTHONPATH": python_path(call.environment),
        **variables,
        **job.device.choice(call["GPUS"]),
    }
