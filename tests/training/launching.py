"""Runs of the public launcher on tiny models, and what they printed."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[2]
LOSS = re.compile(r"iteration +(\d+)/ +\d+ .*lm loss: ([0-9.E+-]+)")


@dataclass(frozen=True)
class Workspace:
    """A converted tiny checkpoint and an energon folder."""

    checkpoint: Path
    dataset: Path


def command(workspace: Workspace, output: Path, **changes: object) -> tuple[list[str], dict[str, str]]:
    """Words and environment of a run; `changes` are arguments by name or environment options."""
    arguments = {
        "ENV": "dsw",
        "MODEL_SIZE": "tiny",
        "BATCH_SIZE": 2,
        "GLOBAL_BATCH_SIZE": 8,
        "LR": "1e-3",
        "MIN_LR": "1e-4",
        "SEQ_LEN": 16,
        "DECODER_SEQ_LEN": 128,
        "PR": "fp32",
        "TP": 1,
        "PP": 1,
        "CP": 1,
        "DO": "false",
        "FL": "false",
        "AC": "false",
        "OPTIMIZER_OFFLOAD": "false",
        "SAVE_INTERVAL": 1000,
        "DATASET_PATH": workspace.dataset,
        "VALID_DATASET_PATH": workspace.dataset,
        "PRETRAIN_CHECKPOINT_PATH": workspace.checkpoint,
        "TRAIN_ITERS": 20,
        "LR_WARMUP_ITERS": 2,
        "OUTPUT_BASEPATH": output,
    }
    options = {
        "CONVERSATION_TEMPLATE": "mistral",
        "FREEZE_LANGUAGE_MODEL": "false",
        "FREEZE_VISION_TOWER": "false",
        "LOG_INTERVAL": 1,
        "EVAL_INTERVAL": 1000,
        "EVAL_ITERS": 1,
        "NUM_WORKERS": 0,
        "ACCELERATOR": "cpu",
        "CHECK": "false",  # the refusals are tested with it
        "PYTHON": interpreter.python(),  # PYTHON=sys.executable: a start as a user's
    }
    script = changes.pop("script", "run_mcore_llava.sh")
    for name, value in changes.items():
        (arguments if name in arguments else options)[name] = value
    words = ["bash", str(ROOT / "examples/llava_mcore" / script), *map(str, arguments.values())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in options.items()}}
    return words, environment


def run(
    workspace: Workspace,
    output: Path,
    expected_exit: int = 0,
    words: list[str] | None = None,
    limit_s: float = 300,
    **changes: object,
) -> str:
    """Run to the end, for `limit_s` at most, `words` behind the 23 arguments; returns what it printed."""
    line, environment = command(workspace, output, **changes)
    done = subprocess.run([*line, *(words or [])], env=environment, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == expected_exit, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def losses(printed: str) -> dict[int, float]:
    """`lm loss` by iteration."""
    return {int(number): float(loss) for number, loss in LOSS.findall(printed)}


def run_until(
    workspace: Workspace, output: Path, at_iteration: int, act: Callable[[], object], **changes: object
) -> tuple[int, str]:
    """Start a run and act once it has printed `at_iteration`; its exit code, and all that it printed."""
    words, environment = command(workspace, output, **changes)
    printed = output.parent / f"{output.name}.printed"
    with printed.open("w") as stream:
        process = subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 240
        while at_iteration not in losses(printed.read_text()):
            assert process.poll() is None, printed.read_text()[-4000:]
            assert time.monotonic() < deadline, printed.read_text()[-4000:]
            time.sleep(0.02)
        act()
        process.wait(timeout=240)
    return process.returncode, printed.read_text()


def run_and_kill(workspace: Workspace, output: Path, at_iteration: int, **changes: object) -> dict[int, float]:
    """Start a run, SIGKILL all its processes once it has printed `at_iteration`; returns its losses."""

    def kill() -> None:
        # processes.py, its processes and theirs, all by the path in their words: nobody gets a chance to save
        subprocess.run(["pkill", "-KILL", "-f", str(output)], check=True)

    return losses(run_until(workspace, output, at_iteration, kill, **changes)[1])
