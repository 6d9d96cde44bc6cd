"""Commands of the toolkits that are typed outside of the environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.launching import CONVERTER, STAGE_1, TINY, Inputs

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "toolkits").rglob("*.py")
    if "\nimport toolkits.environment" in path.read_text()
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's programs, without an environment beside them."""
    folder = tmp_path_factory.mktemp("outside")
    for name in ("toolkits", "megatron_patch", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def call(folder: Path, command: str) -> subprocess.CompletedProcess:
    """Its --help, by a Python without packages."""
    words = [sys.executable, "-IS", str(folder / command), "--help"]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder)


def test_commands_are_guarded():
    assert len(COMMANDS) >= 20
    assert "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py" in COMMANDS
    assert "toolkits/model_checkpoints_convertor/llava/verify_conversion.py" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_without_an_environment_one_sentence_says_how_to_make_it(copy: Path, command: str):
    result = call(copy, command)
    assert result.returncode == 2 and result.stdout == ""
    setup = copy / "examples/setup_environment.sh"
    assert result.stderr == (
        f"error: {sys.executable} lacks numpy, torch, yaml; set the environment up once, this command finds it then: "
        f"bash {setup}\n"
    )


@pytest.mark.parametrize("command", ["convert", "training", "chat"])
def test_a_launcher_without_an_environment_says_how_to_make_it(copy: Path, tmp_path: Path, command: str):
    inputs = Inputs(tmp_path / "inputs", TINY)
    script, words = {
        "convert": (CONVERTER, inputs.conversion()),
        "training": (STAGE_1, inputs.training(AC="sel")),
        "chat": (ROOT / "examples/llava_mcore/chat_llava.sh", [str(inputs.llm)]),
    }[command]
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    path = f"{bare / 'bin'}:/usr/bin:/bin"
    words = ["bash", str(copy / script.relative_to(ROOT)), *words]
    environment = {"PATH": path, "HOME": "/", "ACCELERATOR": "cpu"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    setup = copy / "examples/setup_environment.sh"
    assert f"has no torch, and there is no environment yet; make it once: bash {setup}" in result.stderr
    assert not inputs.output.exists()


def test_the_environment_is_found(copy: Path, tmp_path: Path):
    """A stand-in of its Python that tells what it is asked to run."""
    python = copy / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "in it: $@"\n')
    python.chmod(0o755)
    command = "toolkits/multimodal_data_preprocessing/inspect_dataset.py"
    assert call(copy, command).stdout == f"in it: {copy / command} --help\n"
    shutil.rmtree(copy / ".venv")
