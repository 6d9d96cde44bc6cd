"""Runs of the launcher's own command line with Transformer Engine's layers."""

import os
import subprocess
from pathlib import Path

from tests.training.launching import ROOT, Workspace, command

ENTRY = ROOT / "tests/transformer_engine/pretrain_llava.py"


def run(
    workspace: Workspace,
    output: Path,
    files: Path,
    words: tuple[str, ...] = (),
    fused_adam: bool = False,
    **changes: object,
) -> str:
    """As tests/training/launching.py's run(); `files` are Transformer Engine's, and so is Adam with `fused_adam`.

    Returns what it printed.
    """
    line, environment = command(workspace, output, **changes)
    dry = subprocess.run([*line, *words], env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    line = dry.stdout.splitlines()
    script = next(number for number, word in enumerate(line) if word.endswith("pretrain_llava.py"))
    line[script] = str(ENTRY)
    products = output.parent / f"{output.name}.products"
    products.mkdir(exist_ok=True)
    settings = {"TRANSFORMER_ENGINE_FILES": str(files), "PRODUCTS": str(products)}
    settings["FUSED_ADAM"] = str(fused_adam).lower()
    done = subprocess.run(line, env={**os.environ, **settings}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr
