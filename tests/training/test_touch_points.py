"""The layers around Megatron's training loop in a real run, and a start with a Megatron that lacks one of them."""

import importlib.util
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_patch.patches.touch_points import LOOP, TOUCH_POINTS
from tests.programs import in_warm_process
from tests.training.launching import Workspace, command, run

# Trains as the launcher would, then tells the files that each symbol leads through, from the outermost inwards.
PROGRAM = """
import importlib, sys
from megatron_patch import device
device.install()
from megatron_patch.training.pretrain import train_llava
train_llava()
training = importlib.import_module("megatron.training.training")
print()
for name in {names}:
    function, files = getattr(training, name), []
    while hasattr(function, "__wrapped__"):
        files.append(function.__code__.co_filename)
        function = function.__wrapped__
    print("LAYERS", name, *files, function.__code__.co_filename)
"""


def test_layers_lie_as_listed_in_a_run(workspace: Workspace, tmp_path: Path) -> None:
    options = {"TRAIN_ITERS": 2, "LR_WARMUP_ITERS": 0, "EMA_DECAY": "0.9", "PROFILE": "1-2", "LORA_RANK": 2}
    words, environment = command(workspace, tmp_path / "out", **options, DRY_RUN=1)
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    start = next(number for number, word in enumerate(printed) if word.endswith("pretrain_llava.py"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = dict(word.split("=", 1) for word in printed[1:start] if re.match(r"[A-Z_]+=", word))
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    listed = {
        point.symbol: [layer.place for layer in point.layers]
        for point in TOUCH_POINTS
        if point.module == LOOP and any(layer.place.startswith("training.") for layer in point.layers)
    }
    assert len(listed) == 10
    said = in_warm_process(PROGRAM.format(names=list(listed)), *printed[start + 1 :], **variables)
    found = {}
    for line in said.splitlines():
        if line.startswith("LAYERS "):
            _, name, *files = line.split()
            assert "/megatron/" in files.pop()
            found[name] = [".".join(Path(file).with_suffix("").parts[-2:]) for file in reversed(files)]
    assert found == listed


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH: the installed megatron, whose train_step has another name."""
    installed = Path(next(iter(importlib.util.find_spec("megatron.core").submodule_search_locations))).parent
    folder = tmp_path_factory.mktemp("renamed")
    (folder / "megatron/training").mkdir(parents=True)
    for source in (*installed.iterdir(), *(installed / "training").iterdir()):
        target = folder / "megatron" / source.relative_to(installed)
        if not target.exists():
            target.symlink_to(source)
    changed = folder / "megatron/training/training.py"
    text = changed.read_text()
    changed.unlink()
    changed.write_text(text.replace("def train_step(", "def step("))
    return folder


@pytest.mark.parametrize("check", ["true", "false"], ids=["preflight", "start"])
def test_a_missing_symbol_is_refused_before_anything_is_created(
    check: str, renamed: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(renamed), os.environ.get("PYTHONPATH")])))
    said = run(workspace, tmp_path / "out", expected_exit=2, CHECK=check)
    sentence = (
        r"error: megatron\.training\.training\.train_step does not exist in the installed Megatron, and "
        r"megatron_patch\.training\.\w+ needs it: .*; run `pip install .*megatron-core==0\.19\.2`"
    )
    assert re.search(sentence, said) and "Traceback" not in said
    left = {path.name for path in (tmp_path / "out").rglob("*")} if (tmp_path / "out").exists() else set()
    assert not left & {"checkpoint", "tensorboard", "summary.json"}
    assert check == "false" or not left
