"""FSDP on several nodes and the memory it takes.  Losses: test_parallelism.py; resumes: test_resume.py and others."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.memory import PROGRAM
from tests.training.launching import Workspace, command, losses, run

SETTINGS = {"TRAIN_ITERS": 8, "SAVE_INTERVAL": 4}
DEEP = {"num_hidden_layers": 14, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 8000}
DEEP |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}


def run_on_two_nodes(workspace: Workspace, output: Path, *words: str) -> list[dict[int, float]]:
    """Losses that each of two launchers printed, of two processes each: nodes of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for node in range(2):
        cluster = {"WORLD_SIZE": 4, "NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        settings = {**SETTINGS, "ENV": "multinode", "NPROC_PER_NODE": 2, "FSDP": "hybrid", **cluster}
        line, environment = command(workspace, output, **settings)
        log = (output.parent / f"{output.name}.{node}.{len(words)}").open("w")
        started.append((subprocess.Popen([*line, *words], env=environment, stdout=log, stderr=log), log))
    for process, log in started:
        assert process.wait(timeout=300) == 0, Path(log.name).read_text()[-3000:]
        log.close()
    return [losses(Path(log.name).read_text()) for _, log in started]


@pytest.mark.slow
def test_nodes_hold_the_weights_once_each(workspace: Workspace, tmp_path: Path) -> None:
    """hybrid: losses of one process, a resume, and a resume of one rank's whole weights from the four ranks' pieces."""
    whole = losses(run(workspace, tmp_path / "whole", **SETTINGS))
    first, found = run_on_two_nodes(workspace, tmp_path / "out", "--exit-interval", "4")
    assert not first and sorted(found) == [1, 2, 3, 4]  # the last node prints
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    found |= run_on_two_nodes(workspace, tmp_path / "out")[1]
    assert sorted(found) == list(range(1, 9))
    assert max(abs(found[i] / whole[i] - 1) for i in found) <= 7e-6
    alone = losses(run(workspace, tmp_path / "copy", **SETTINGS))
    assert max(abs(alone[i] / whole[i] - 1) for i in range(5, 9)) <= 7e-6


@pytest.mark.slow
def test_four_ranks_hold_a_quarter_each(workspace: Workspace, tmp_path: Path) -> None:
    """Peak of a process beside interpreter and libraries, of a run and its save; weights dominate."""
    folder = Path(shutil.copytree(workspace.checkpoint / "llava", tmp_path / "llava"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= DEEP
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"PYTHON": sys.executable, "TOKENIZER_PATH": folder, "MODEL_SIZE": "0.1B", "TRAIN_ITERS": 3}
    (folder / "provenance.json").unlink()  # which says tiny
    settings |= {"NPROC_PER_NODE": 4, "EVAL_ITERS": 0}
    held = {}
    for way in ("false", "full"):
        run(Workspace(Path("none"), workspace.dataset), tmp_path / way, FSDP=way, **settings)
        held[way] = json.loads((tmp_path / way / "summary.json").read_text())["memory_bytes"] - PROGRAM["cpu"]
        shutil.rmtree(tmp_path / way)
    print(f"DP4: {held['false'] / 1e9:.2f} GB in a process, with FSDP {held['full'] / 1e9:.2f} GB")
    assert held["full"] <= 0.45 * held["false"]
