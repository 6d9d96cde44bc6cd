"""Models on a Ray cluster of two nodes: the files of the local commands, whatever dies."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models
from tests.data.factories import convert_records, image_bytes, make_records
from tests.evaluation.conftest import write_questions
from tests.ray_nodes import Nodes, kill, succeed, two_nodes, wait_until

ROOT = Path(__file__).resolve().parents[1]
INFERENCE, EVALUATE = (ROOT / f"examples/llava_mcore/{name}.sh" for name in ("run_inference_llava", "evaluate_llava"))
CACHE = ROOT / "toolkits/multimodal_data_preprocessing/cache_tower_features.py"
LINES, QUESTIONS, RECORDS = 400, 300, 300


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes."""
    yield from two_nodes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model: exported, checkpoint: converted; prompts.jsonl, questions, records/wds."""
    root = tmp_path_factory.mktemp("ray")
    tiny_models.make_tiny_llava(root / "model", "mistral")
    convert_to_megatron(root / "model", None, root / "checkpoint", precision="fp32", model_size="tiny")
    (root / "images").mkdir()
    for number in range(7):
        (root / f"images/{number}.png").write_bytes(image_bytes(number))
    # of 7 kinds, so that batches differ; one line in 100 is none, and one wants an image that no node has
    lines = [
        {"id": n, "prompt": "What is this?" + " Say more." * (n % 5), "image": f"{n % 7}.png"} for n in range(LINES)
    ]
    lines[50]["image"] = "none.png"
    texts = [json.dumps(line) if n % 100 != 99 else "{" for n, line in enumerate(lines)]
    (root / "prompts.jsonl").write_text("\n".join(texts) + "\n")
    write_questions(root / "questions", QUESTIONS // 5)
    make_records(root / "records", RECORDS)
    convert_records(root / "records", samples_per_shard=10, keep_going=True)
    return root


def answers(root: Path, output: str) -> list[object]:
    """The command that answers the file of prompts."""
    words = ["--model", root / "checkpoint", "--prompts", root / "prompts.jsonl", "--image-root", root / "images"]
    return ["bash", INFERENCE, *words, "--output", root / output, "--max-new-tokens", 6, "--batch-size", 1]


def evaluation(root: Path, output: str) -> list[object]:
    """The command that asks a benchmark."""
    words = ["--model", root / "model", "--benchmark", "llava", "--data", root / "questions"]
    return ["bash", EVALUATE, *words, "--output", root / output, "--max-new-tokens", 3, "--batch-size", 2]


def features(root: Path, output: str) -> list[object]:
    """The command that caches features."""
    words = [root / "records/wds", "--checkpoint", root / "checkpoint", "--precision", "fp32", "--workers", 1]
    return [sys.executable, CACHE, *words, "--output", root / output, "--batch-size", 3]


def lines_of(file: Path) -> int:
    """That are whole; 0 where there is no file."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def shards_of(folder: Path) -> int:
    """Shards of features that are there."""
    return len(list(folder.glob("*.tar.json")))


def contents(output: Path) -> dict[str, bytes]:
    """Files of an output; pictures tell no more than these."""
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files if path.suffix != ".png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "begun", "done"),
    [
        (answers, lambda folder, name: folder / f"{name}.partial", lines_of),
        (evaluation, lambda folder, name: folder / name / "answers.jsonl", lines_of),
        (features, lambda folder, name: folder / f"{name}.partial", shards_of),
    ],
)
def test_a_node_dies_and_the_driver_is_killed_and_resumed(
    command: Callable, begun: Callable, done: Callable, nodes: Nodes, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    local = subprocess.run([*map(str, command(folder, "local"))], env=nodes.environment, capture_output=True, text=True)
    assert local.returncode == 0, local.stderr
    expected = contents(folder / "local")
    (folder / "local").rename(folder / "wanted")

    growing = begun(folder, "ray")
    running = nodes.begin(command(folder, "ray"))
    wait_until(running, lambda: done(growing) >= 4)
    nodes.tell("kill")
    at_death = done(growing)
    succeed(running)
    assert contents(folder / "ray") == expected
    remove(folder / "ray")

    nodes.tell("add")
    running = nodes.begin(command(folder, "ray"))
    wait_until(running, lambda: done(growing) >= 4)
    kill(running)
    killed_at = done(growing)
    assert len(list(folder.glob("ray*.ray"))) == 1  # what a killed command leaves; the next one takes it away
    succeed(nodes.begin(command(folder, "ray")))
    assert contents(folder / "ray") == expected
    assert not list(folder.glob("ray*.ray"))
    total = done(folder / "ray" / growing.name if growing.parent.name == "ray" else folder / "ray")
    assert 0 < at_death < total and 0 < killed_at < total
    remove(folder / "ray")
    remove(folder / "wanted")
    with capsys.disabled():
        print(
            f"\n{command.__name__}: {at_death} when the node died, {killed_at} when the command was killed, of {total}"
        )


def remove(output: Path) -> None:
    """A file or a folder."""
    output.unlink() if output.is_file() else shutil.rmtree(output)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_images_is_refused(nodes: Nodes, folder: Path) -> None:
    """Last, for the node stays."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    nodes.tell(f"blind {folder / 'images'}")
    there = sorted(path.name for path in folder.iterdir())
    running = nodes.begin(answers(folder, "other"))
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 2 and "png is there and not here" in errors and "Traceback" not in errors, errors
    assert "wanted model, prompts, images, output and" in errors
    assert sorted(path.name for path in folder.iterdir()) == there
