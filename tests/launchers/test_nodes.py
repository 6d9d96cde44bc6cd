"""Several nodes on this machine: network namespaces with addresses of their own, and a SLURM of one's own.

Both train the same small model with as many data-parallel ranks as nodes, which is what one node with as many processes
does: the losses are equal to the last digit.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_patch.launch.processes import LOST
from tests.training.launching import ROOT, Workspace, command, losses, run

NETWORK = ROOT / "tests/launchers/network.sh"
PORT = 29500
ITERATIONS = 80
OPTIONS = {"TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": 10, "EVAL_ITERS": 0}
may_make_networks = os.geteuid() == 0 and shutil.which("ip") is not None
SLURM = ("slurmctld", "slurmd", "munged")

pytestmark = pytest.mark.slow


@pytest.fixture
def network() -> Iterator[Callable[..., None]]:
    """network("cut", 2) and the like, with four nodes."""

    def change(*words: object) -> None:
        subprocess.run(["bash", NETWORK, *map(str, words)], check=True, capture_output=True)

    change("down", 4)  # what a killed test has left
    change("up", 4)
    yield change
    change("down", 4)


def variables(mode: str, node: int, nodes: int) -> dict[str, str]:
    """What a cluster tells a node."""
    common = {"MASTER_ADDR": "10.87.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": str(nodes)}
    if mode == "dlc":
        return common | {"RANK": str(node), "KUBERNETES_CONTAINER_RESOURCE_GPU": "1"}
    return common | {"NODE_RANK": str(node), "NPROC_PER_NODE": "1"}


def start_nodes(workspace: Workspace, output: Path, mode: str, nodes: int, **options: object) -> list:
    """The same command on every node."""
    started = []
    for node in range(nodes):
        words, environment = command(workspace, output, ENV=mode, PYTHON=str(ROOT / ".venv/bin/python"), **options)
        environment |= variables(mode, node, nodes)
        log = output.parent / f"{output.name}.node-{node}"
        with log.open("w") as printed:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"llava-node-{node}", *words], env=environment, stdout=printed, stderr=printed
            )
        started.append((process, log))
    return started


def printed(started: list) -> str:
    return "".join(log.read_text() for _, log in started)


def wait_for_iteration(started: list, iteration: int) -> None:
    deadline = time.monotonic() + 240
    while iteration not in losses(printed(started)):
        assert time.monotonic() < deadline and all(process.poll() is None for process, _ in started), printed(started)
        time.sleep(0.2)


@pytest.mark.skipif(not may_make_networks, reason="network namespaces need root and iproute2")
@pytest.mark.parametrize(("mode", "nodes"), [("dlc", 2), ("multinode", 4)])
def test_a_node_that_is_cut_off_ends_the_job_and_the_restart_loses_nothing(
    mode: str, nodes: int, workspace: Workspace, tmp_path: Path, network: Callable[..., None]
) -> None:
    whole = losses(run(workspace, tmp_path / "whole", NPROC_PER_NODE=nodes, **OPTIONS))
    assert len(whole) == ITERATIONS
    started = start_nodes(workspace, tmp_path / "out", mode, nodes, **OPTIONS)
    wait_for_iteration(started, 15)
    network("cut", nodes - 1)
    cut = time.monotonic()
    codes = [process.wait(timeout=60) for process, _ in started]
    assert time.monotonic() - cut < 60
    assert codes[0] == LOST and all(codes)
    told = started[0][1].read_text()
    assert f"error: node {nodes - 1} has not been heard of for 30 s" in told.splitlines()[-1]
    assert losses(printed(started)).items() <= whole.items()
    network("mend", nodes - 1)
    again = start_nodes(workspace, tmp_path / "out", mode, nodes, **OPTIONS)
    assert [process.wait(timeout=240) for process, _ in again] == [0] * nodes, printed(again)
    after = losses(printed(again))
    assert after.items() <= whole.items() and min(after) > 10 and max(after) == ITERATIONS


@pytest.mark.skipif(not may_make_networks, reason="network namespaces need root and iproute2")
def test_a_node_whose_launcher_is_killed_ends_the_others(
    workspace: Workspace, tmp_path: Path, network: Callable[..., None]
) -> None:
    started = start_nodes(workspace, tmp_path / "out", "dlc", 2, **OPTIONS | {"TRAIN_ITERS": 4000})
    wait_for_iteration(started, 3)
    subprocess.run(["pkill", "-KILL", "-f", f"node_rank 1 .*{tmp_path}"], check=True)
    assert started[0][0].wait(timeout=60) in (LOST, 1)
    assert started[1][0].wait(timeout=60) == -signal.SIGKILL


# ---------------------------------------------------------------- SLURM

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
MpiDefault=none
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """A cluster of this machine; the environment in which SLURM's commands find it."""
    # A job's socket is named after folder, node, job and step; below tmp_path that passes the 107 bytes of its address.
    own = tempfile.TemporaryDirectory(prefix="slurm-")
    folder = Path(own.name)
    folder.chmod(0o755)
    (folder / "localhost").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    with socket.create_server(("", 0)) as first, socket.create_server(("", 0)) as second:
        port, node_port = first.getsockname()[1], second.getsockname()[1]
    host = os.uname().nodename.partition(".")[0]
    values = {"host": host, "folder": folder, "port": port, "node_port": node_port, "cpus": os.cpu_count()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/key"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]

    def says(words: str, text: str) -> bool:
        done = subprocess.run(words.split(), env=environment, capture_output=True, text=True)
        return text in done.stdout

    daemons: list[tuple[list[str], Callable[[], bool]]] = [
        (munge, (folder / "munge.socket").exists),
        (["slurmctld", "-D"], lambda: says("scontrol ping", "is UP")),
        (["slurmd", "-D", "-N", "localhost"], lambda: says("sinfo -h -o %T", "idle")),
    ]
    started = []
    with (folder / "log").open("w") as log:
        for words, is_ready in daemons:
            started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
            wait_until(is_ready, folder / "log", seconds=60)  # a job would wait for ever, and say nothing
    yield environment
    for process in reversed(started):
        process.terminate()
        process.wait(timeout=30)
    own.cleanup()


def job(slurm: dict[str, str], workspace: Workspace, output: Path) -> tuple[str, Path]:
    """Submits a run; its number, and where it prints."""
    words, environment = command(workspace, output, ENV="slurm", PYTHON=str(ROOT / ".venv/bin/python"), **OPTIONS)
    environment |= {"SLURM_CONF": slurm["SLURM_CONF"], "NPROC_PER_NODE": "1"}
    log = output.parent / f"{output.name}.log"
    script = ROOT / "examples/llava_mcore/train_llava.sbatch"
    words = ["sbatch", "--parsable", f"--output={log}", str(script), Path(words[1]).name, *words[2:]]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), log


def wait_until(is_so: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.3)


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, SLURM)), reason="slurmctld, slurmd and munged are not installed"
)
def test_slurm_requeues_a_killed_job_which_goes_on_exactly(
    workspace: Workspace, tmp_path: Path, slurm: dict[str, str]
) -> None:
    whole = losses(run(workspace, tmp_path / "whole", **OPTIONS))
    number, log = job(slurm, workspace, tmp_path / "out")
    wait_until(lambda: log.exists() and 15 in losses(log.read_text()), log)
    subprocess.run(["pkill", "-KILL", "-f", f"pretrain_llava.py.*{tmp_path}/out"], check=True)

    def ended() -> bool:
        asked = subprocess.run(["squeue", "--noheader", "--jobs", number], env=slurm, capture_output=True, text=True)
        return asked.stdout.strip() == ""

    wait_until(lambda: "queued again" in log.read_text(), log)
    wait_until(ended, log)
    assert losses(log.read_text()) == whole
    assert log.read_text().count("queued again") == 1
