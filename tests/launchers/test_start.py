"""The real start: exit status, signals, logs and several nodes, a small program in the entry's place."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_patch import device
from megatron_patch.geometry import read_geometry
from megatron_patch.launch import processes as launching
from megatron_patch.model_sizes import size_name
from tests.launchers.launching import ROOT, TINY, Inputs

ENTRY = """
import os, signal, sys, time
from megatron_patch.launch import processes as launch
def end(number, _):
    print("saved by rank", os.environ["RANK"])
    sys.exit(3 if "ENDS_BADLY" in os.environ else 0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, end)
if launch.must_check():
    print("checked by rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
    time.sleep(float(os.environ["SECONDS_TO_CHECK"]))
    if code := int(os.environ["CODE_OF_CHECK"]):
        if "WORKER" in os.environ and os.fork() == 0:  # a worker that is not ended: it has the check's descriptors
            time.sleep(20)
        os._exit(code)
    launch.check_has_passed()
elif "CODE_OF_OTHERS" in os.environ:
    sys.exit(int(os.environ["CODE_OF_OTHERS"]))
launch.wait_for_check()
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "device", repr(os.environ["CUDA_VISIBLE_DEVICES"]))
print("warning of rank", os.environ["RANK"], file=sys.stderr)
if "DEATHS" in os.environ and os.environ["RANK"] == "1":
    tracker = os.environ["TRACKER"]
    os.makedirs(os.path.dirname(tracker), exist_ok=True)
    done = int(open(tracker).read()) if os.path.exists(tracker) else 0
    if os.environ["SAVES"] == "1":
        open(tracker, "w").write(str(done + 1))
    if done < int(os.environ["DEATHS"]):
        print(os.environ.get("LAST_WORDS", ""), file=sys.stderr, flush=True)
        code = int(os.environ["EXIT_CODE"])
        os._exit(code) if code else os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)
elif "DEATHS" in os.environ:
    sys.exit(0)
time.sleep(float(os.environ["SECONDS_TO_RUN"]))
sys.exit(int(os.environ["EXIT_CODE"]))
"""


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Of a model whose checkpoints fit on any disk."""
    return Inputs(tmp_path / "inputs", TINY)


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
    return {"/".join(path.parts[-2:]): path.read_text() for path in output.glob("log/*/attempt_0/*/*.log")}


def test_output_reaches_console_and_files(copy: Path, inputs: Inputs):
    process = launch(copy, inputs.training(TP="2", AC="sel", PR="fp32"), 0, 0)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ["rank 0 of 2 device ''", "rank 1 of 2 device ''"]  # without a prefix
    assert sorted(err.splitlines()) == ["warning of rank 0", "warning of rank 1"]
    found = logs(inputs.output)
    assert found["1/stdout.log"] == "rank 1 of 2 device ''\n" and found["0/stderr.log"] == "warning of rank 0\n"


def test_a_run_that_cannot_fit_is_warned_of(copy: Path, tmp_path: Path):
    """All of it is trained in fp32, 16 bytes a parameter, which are a tenth more than this machine's memory."""
    rows = int(1.1 * device.kind("cpu").memory() / 16 / TINY["text_config"]["hidden_size"])
    wide = TINY | {"text_config": TINY["text_config"] | {"vocab_size": rows, "tie_word_embeddings": True}}
    inputs = Inputs(tmp_path / "wide", wide)
    size = size_name(read_geometry(wide).language.parameters)
    words = inputs.training(TP="1", AC="sel", PR="fp32", MODEL_SIZE=size)
    made = subprocess.run(
        ["bash", copy / "examples/llava_mcore/run_mcore_llava.sh", *words],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "ACCELERATOR": "cpu", "CHECK": "false"}
        | {"SECONDS_TO_RUN": "0", "EXIT_CODE": "0", "FREEZE_LANGUAGE_MODEL": "false", "HOME": "/"},
        capture_output=True,
        text=True,
        cwd=copy,
    )
    if "room for two checkpoints" in made.stderr:
        pytest.skip("two checkpoints of this size do not fit the disk")
    assert made.returncode == 0, made.stderr
    assert "note: weights, gradients and Adam's state are " in made.stderr and "will not fit" in made.stderr


def test_a_failure_is_the_exit_status(copy: Path, inputs: Inputs):
    process = launch(copy, inputs.training(TP="1", AC="sel"), 0, 3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.splitlines()[-1].startswith("rank 0 ended with exit code 3, and the run with it; its log: ")
    assert "warning of rank 0" in Path(err.splitlines()[-1].partition("its log: ")[2]).read_text()


@pytest.mark.parametrize(("code", "more"), [(0, {}), (2, {}), (2, {"WORKER": "1"})])
def test_nothing_starts_before_the_check_has_passed(copy: Path, inputs: Inputs, code: int, more: dict):
    check = {"CHECK": "true", "SECONDS_TO_CHECK": "1", "CODE_OF_CHECK": str(code)} | more
    process = launch(copy, inputs.training(TP="2", AC="sel"), 0, 0, **check)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    first, *others = out.splitlines()
    assert first == "checked by rank 0 of 2" and len(others) == (2 if code == 0 else 0)
    assert inputs.output.exists() == (code == 0)
    assert code or logs(inputs.output)["0/stdout.log"].startswith(first), "what came before there was a folder"


@pytest.mark.parametrize(("code", "ends"), [(2, 2), (0, 3)])
def test_another_process_that_dies_during_the_check_is_told_after_it(copy: Path, inputs: Inputs, code: int, ends: int):
    check = {
        "CHECK": "true",
        "SECONDS_TO_CHECK": "0.5",
        "CODE_OF_CHECK": str(code),
        "CODE_OF_OTHERS": "3",
        "WORKER": "1",
    }
    process = launch(copy, inputs.training(TP="2", AC="sel"), 20, 0, **check)
    _, err = process.communicate(timeout=15)  # within the 20 seconds of the first process and of the check's worker
    assert process.returncode == ends, err
    assert ("rank 1 ended with exit code 3, and the run with it" in err) == (code == 0)


def test_without_arguments_processes_meet_and_leave_nothing(tmp_path: Path):
    names = "os.environ['RANK'], os.environ['MASTER_PORT'], str('TORCHELASTIC_RUN_ID' in os.environ)"
    program = f"import os; os.write(1, ' '.join(({names})).encode() + b'\\n')"  # whole: both write to one pipe
    (tmp_path / "program.py").write_text(f"{program}; raise SystemExit(5 * int(os.environ['RANK']))")
    words = [
        sys.executable,
        "-m",
        "megatron_patch.launch.processes",
        "--nproc_per_node",
        "2",
        tmp_path / "program.py",
        "--nnodes",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "that of a torchrun around it"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 5 and done.stderr == "rank 1 ended with exit code 5, and the run with it\n"
    (first, *second), (other, *same) = (line.split() for line in sorted(done.stdout.splitlines()))
    assert (first, other) == ("0", "1") and second == same and int(second[0]) > 0 and second[1] == "False"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.py"]


def test_a_process_whose_starter_has_died_does_not_begin(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    os.close(write)
    monkeypatch.setenv(launching.CHECK, str(read))
    with pytest.raises(SystemExit):
        launching.wait_for_check()
    os.close(read)


def test_the_cause_is_neither_who_was_ended_nor_who_lost_its_peer(tmp_path: Path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/stderr.log").write_text("RuntimeError: Connection closed by peer\n")

    def died(rank: int, code: int, ended_by_us: bool) -> SimpleNamespace:
        return SimpleNamespace(rank=rank, exit_code=code, ended_by_us=ended_by_us, log=f"{rank}/stderr.log")

    failed = [died(0, 1, False), died(1, -signal.SIGKILL, True), died(2, -signal.SIGTERM, True), died(3, 3, True)]
    assert launching._cause(failed, tmp_path).rank == 3


def test_a_signal_during_the_check_ends_everything(copy: Path, inputs: Inputs):
    check = {"CHECK": "true", "SECONDS_TO_CHECK": "100", "CODE_OF_CHECK": "0"}
    process = launch(copy, inputs.training(TP="1", AC="sel"), 0, 0, **check)
    assert process.stdout.readline() == "checked by rank 0 of 1\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)  # the end of its output: the check has ended too, and at once
    assert process.returncode == 128 + signal.SIGTERM
    assert not inputs.output.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_process_and_is_no_failure(copy: Path, inputs: Inputs, number: signal.Signals):
    process = launch(copy, inputs.training(TP="2", AC="sel"), 60, 0)
    wait_for_ranks(inputs.output, 2)
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
        (log,) = inputs.output.glob(f"log/*-node{rank}/attempt_0/0/stdout.log")
        assert log.read_text() == text


@pytest.mark.slow
def test_a_node_whose_launcher_is_killed_ends_the_others(copy: Path, inputs: Inputs):
    cluster = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "KUBERNETES_CONTAINER_RESOURCE_GPU": "1"}
    cluster["MASTER_PORT"] = str(20000 + os.getpid() % 10000)
    words = inputs.training(ENV="dlc", TP="2", AC="sel")
    nodes = [launch(copy, words, 60, 0, RANK=rank, **cluster) for rank in ("0", "1")]
    wait_for_ranks(inputs.output, 2)
    time.sleep(2)  # until they have heard of each other
    nodes[1].kill()
    _, err = nodes[0].communicate(timeout=30)
    assert nodes[0].returncode == launching.LOST, err
    assert "error: node 1 has gone without a word" in err.splitlines()[-1]
    nodes[1].communicate(timeout=30)  # its process ends with it: see end_with_parent()


def wait_for_ranks(output: Path, count: int) -> None:
    """Until so many have written their first lines to both files."""
    deadline = time.monotonic() + 40
    while sum("rank" in text for text in logs(output).values()) < 2 * count and time.monotonic() < deadline:
        time.sleep(0.1)


def test_ctrl_c_ends_everything_at_once(copy: Path, inputs: Inputs):
    process = launch(copy, inputs.training(TP="2", AC="sel"), 60, 0)
    wait_for_ranks(inputs.output, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 128 + signal.SIGINT and err.count("KeyboardInterrupt") == 2


def test_neither_a_closed_console_nor_a_hangup_under_nohup_ends_a_run(copy: Path, inputs: Inputs):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup; it is inherited
    process = launch(copy, inputs.training(TP="1", AC="sel"), 3, 0)
    signal.signal(signal.SIGHUP, before)
    process.stdout.close()  # as `| head`
    wait_for_ranks(inputs.output, 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0, process.stderr.read()
    assert logs(inputs.output)["0/stdout.log"] == "rank 0 of 1 device ''\n"
    process.stderr.close()


def test_a_rollback_starts_again_without_a_check(copy: Path, inputs: Inputs):
    check = {"CHECK": "true", "SECONDS_TO_CHECK": "0", "CODE_OF_CHECK": "0", "MAX_ROLLBACKS": "1"}
    process = launch(copy, inputs.training(TP="2", AC="sel"), 0, launching.ROLL_BACK, **check)
    out, err = process.communicate(timeout=60)
    assert process.returncode == launching.ROLL_BACK, err
    assert out.count("checked by rank 0 of 2") == 1
    assert "rollbacks left: 0" in err and "MAX_ROLLBACKS are used up" in err
    assert len(list(inputs.output.glob("log/*/attempt_[01]/1/stdout.log"))) == 2
    # the first process that ends may end the other before that has printed anything
    for attempt in (0, 1):
        logs_of_attempt = inputs.output.glob(f"log/*/attempt_{attempt}/*/stdout.log")
        assert any("of 2 device" in log.read_text() for log in logs_of_attempt)


@pytest.mark.parametrize(
    ("restarts", "changes", "code", "attempts", "line"),
    [
        ("2", {"DEATHS": "2"}, 0, 3, "restarts left: 0"),
        ("1", {"DEATHS": "2"}, 137, 2, "it is not started again: MAX_RESTARTS are used up"),
        ("0", {"DEATHS": "1"}, 137, 1, "and the run with it; its log: "),
        ("5", {"DEATHS": "2", "SAVES": "0"}, 137, 1, "again: no checkpoint has been saved since its start"),
        ("5", {"DEATHS": "1", "EXIT_CODE": "2"}, 2, 1, "it is not started again: it would end there again"),
        ("5", {"DEATHS": "1", "EXIT_CODE": "75", "MAX_ROLLBACKS": "0"}, 75, 1, "it would end there again"),
        ("5", {"DEATHS": "1", "EXIT_CODE": "1"}, 0, 2, "rank 1 ended with exit code 1, and the run with it"),
        ("5", {"DEATHS": "1", "EXIT_CODE": "1", "LAST_WORDS": "error: iteration 3"}, 1, 1, "it would end there again"),
    ],
)
def test_a_run_that_has_saved_starts_again_after_a_death(
    copy: Path, inputs: Inputs, restarts: str, changes: dict, code: int, attempts: int, line: str
):
    tracker = inputs.output / "checkpoint/latest_checkpointed_iteration.txt"
    told = {"MAX_RESTARTS": restarts, "SAVES": "1", "TRACKER": str(tracker)} | changes
    process = launch(copy, inputs.training(TP="2", AC="sel"), 0, 0, **told)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and line in err, err
    assert len(list(inputs.output.glob("log/*/attempt_*"))) == attempts


def test_a_run_that_was_asked_to_end_does_not_start_again(copy: Path, inputs: Inputs):
    """Although its processes fail while they end."""
    tracker = inputs.output / "checkpoint/latest_checkpointed_iteration.txt"
    told = {"MAX_RESTARTS": "5", "ENDS_BADLY": "1"}
    process = launch(copy, inputs.training(TP="2", AC="sel"), 60, 0, **told)
    wait_for_ranks(inputs.output, 2)
    tracker.parent.mkdir(parents=True)
    tracker.write_text("7")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    assert "started again" not in err and len(list(inputs.output.glob("log/*/attempt_*"))) == 1
