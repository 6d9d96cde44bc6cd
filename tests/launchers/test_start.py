"""The real start: torchrun's exit status, signals, logs and several nodes, a small program in the entry's place."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from tests.launchers.launching import ROOT, Inputs

ENTRY = """
import os, signal, sys, time
def end(number, _):
    print("saved by rank", os.environ["RANK"])
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, end)
if sys.argv[1] == "--check-only":
    print("checked as rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
    time.sleep(float(os.environ["SECONDS_TO_CHECK"]))
    sys.exit(int(os.environ["CODE_OF_CHECK"]))
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "device", repr(os.environ["CUDA_VISIBLE_DEVICES"]))
print("warning of rank", os.environ["RANK"], file=sys.stderr)
time.sleep(float(os.environ["SECONDS_TO_RUN"]))
sys.exit(int(os.environ["EXIT_CODE"]))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The launchers beside another pretrain_llava.py."""
    repository = tmp_path / "a copy"
    (repository / "examples/llava_mcore").mkdir(parents=True)
    for name in ("launcher.sh", "llava_mcore/run_mcore_llava.sh"):
        shutil.copy(ROOT / "examples" / name, repository / "examples" / name)
    (repository / "examples/llava_mcore/pretrain_llava.py").write_text(ENTRY)
    (repository / "megatron_patch").symlink_to(ROOT / "megatron_patch")
    return repository


def launch(copy: Path, words: list[str], seconds: float, code: int, **environment: str) -> subprocess.Popen:
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable}
    clean |= {"ACCELERATOR": "cpu", "CHECK": "false", "SECONDS_TO_RUN": str(seconds), "EXIT_CODE": str(code)}
    command = ["sh", str(copy / "examples/llava_mcore/run_mcore_llava.sh"), *words]
    return subprocess.Popen(
        command, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=copy
    )


def logs(output: Path) -> dict[str, str]:
    """Text of every log file by `RANK/STREAM.log`."""
    return {"/".join(path.parts[-2:]): path.read_text() for path in output.glob("log/*/*/attempt_0/*/*.log")}


def test_output_reaches_console_and_files(copy: Path, inputs: Inputs):
    process = launch(copy, inputs.training(TP="2", AC="sel"), 0, 0)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ["rank 0 of 2 device ''", "rank 1 of 2 device ''"]  # without a prefix
    assert sorted(err.splitlines()) == ["warning of rank 0", "warning of rank 1"]
    found = logs(inputs.output)
    assert found["1/stdout.log"] == "rank 1 of 2 device ''\n" and found["0/stderr.log"] == "warning of rank 0\n"


def test_a_failure_is_the_exit_status(copy: Path, inputs: Inputs):
    process = launch(copy, inputs.training(TP="1", AC="sel"), 0, 3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.splitlines()[-1].startswith("rank 0 ended with exit code 3, and the run with it; its log: ")
    assert "warning of rank 0" in Path(err.splitlines()[-1].partition("its log: ")[2]).read_text()


@pytest.mark.parametrize("code", [0, 2])
def test_nothing_starts_before_the_check_has_passed(copy: Path, inputs: Inputs, code: int):
    check = {"CHECK": "true", "SECONDS_TO_CHECK": "0", "CODE_OF_CHECK": str(code)}
    process = launch(copy, inputs.training(TP="2", AC="sel"), 0, 0, **check)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    first, *others = out.splitlines()
    assert first == "checked as rank 0 of 1" and len(others) == (2 if code == 0 else 0)
    assert inputs.output.exists() == (code == 0)


def test_a_signal_during_the_check_ends_everything(copy: Path, inputs: Inputs):
    check = {"CHECK": "true", "SECONDS_TO_CHECK": "100", "CODE_OF_CHECK": "0"}
    process = launch(copy, inputs.training(TP="1", AC="sel"), 0, 0, **check)
    assert process.stdout.readline() == "checked as rank 0 of 1\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # the end of its output: the check has ended too
    assert process.returncode == 128 + signal.SIGTERM
    assert not inputs.output.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_process_and_is_no_failure(copy: Path, inputs: Inputs, number: signal.Signals):
    process = launch(copy, inputs.training(TP="2", AC="sel"), 60, 0)
    deadline = time.monotonic() + 40
    while sum("rank" in text for text in logs(inputs.output).values()) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "saved by rank 0\n" in out and "saved by rank 1\n" in out


def test_two_nodes_of_a_cluster_job_meet(copy: Path, inputs: Inputs):
    cluster = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "KUBERNETES_CONTAINER_RESOURCE_GPU": "1"}
    cluster["MASTER_PORT"] = str(20000 + os.getpid() % 10000)
    words = inputs.training(ENV="dlc", TP="2", AC="sel")
    nodes = [launch(copy, words, 0, 0, RANK=rank, **cluster) for rank in ("0", "1")]
    answers = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], answers
    printed = ["rank 0 of 2 device ''\n", "rank 1 of 2 device ''\n"]
    assert [out for out, _ in answers] == printed
    # On a shared disk a node finds its own logs, not those of the other's process of the same local rank.
    for rank, text in enumerate(printed):
        (log,) = inputs.output.glob(f"log/*-node{rank}/*/attempt_0/0/stdout.log")
        assert log.read_text() == text


def test_the_oldest_torch_knows_the_arguments_of_launch_py():
    """torchrun has --signals-to-handle from torch 2.9 on (pytorch/pytorch#160690); 2.8 ends in its argument parser."""
    launch = (ROOT / "megatron_patch/launch.py").read_text()
    assert '"--signals-to-handle"' in launch, "not used any more: lower the bound in requirements.txt"
    (line,) = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch"))
    accepted = Requirement(line).specifier
    assert "2.8.0" not in accepted and "2.9.0" in accepted and metadata.version("torch") in accepted
    assert "--signals-to-handle" in get_args_parser().format_help()
