"""compare_answers.py: equal models are equal, a changed one is found at its first token, with its probabilities."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_patch.data.conversation import Exchange
from megatron_patch.inference import Request, Sampling, open_engine
from megatron_patch.inference.compare import compare, first_difference
from tests.inference.conftest import Folders
from tests.warm import interpreter

SCRIPT = Path(__file__).resolve().parents[2] / "examples/llava_mcore/compare_answers.py"


def changed(folders: Folders, folder: Path) -> Path:
    """The export with another head."""
    shutil.copytree(folders.exported, folder)
    weights = load_file(folder / "model.safetensors")
    head = weights["language_model.lm_head.weight"]
    head += 0.02 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_where_two_answers_first_differ():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_the_first_difference_and_its_probabilities(folders: Folders, tmp_path: Path):
    other = changed(folders, tmp_path / "other")
    requests = [
        Request(str(number), (Exchange("<image>\nWhat is this?", None),), (folders.images / f"{number}.png",))
        for number in range(4)
    ]
    models = [partial(open_engine, folder) for folder in (folders.exported, other, folders.exported)]
    found = compare(models, requests, Sampling(max_new_tokens=30), batch_size=3)
    assert found.answers[0] == found.answers[2] != found.answers[1]
    assert {difference.model for difference in found.differences} == {1}
    difference = found.differences[0]
    ours, theirs = (found.answers[model][difference.prompt].token_ids for model in (0, 1))
    place = difference.position
    assert ours[:place] == theirs[:place] and ours[place] != theirs[place]
    assert [choice.token_id for choice in difference.choices] == [ours[place], theirs[place]]
    for choice in difference.choices:  # the most likely token is the chosen one
        assert 1 > choice.probability > choice.of_the_other > 0
    with open_engine(folders.exported) as engine:
        image = (folders.images / f"{difference.prompt}.png",)
        begun = Request("begun", (Exchange("<image>\nWhat is this?", None),), image)
        alone = engine.probabilities(engine.prepare(begun), ours[:place])
    assert abs(float(alone[ours[place]]) - difference.choices[0].probability) < 1e-6


def call(*words: object) -> subprocess.CompletedProcess:
    environment = os.environ | interpreter.ENVIRONMENT
    command = [interpreter.python(), str(SCRIPT), *map(str, words), "--max-new-tokens", "20"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command(folders: Folders, tmp_path: Path):
    """The checkpoint beside the export and beside another."""
    lines = [{"image": f"{number}.png", "prompt": "What is this?"} for number in range(4)] + [{"image": "0.png"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--prompts", tmp_path / "p.jsonl", "--image-root", folders.images, "--template", "mistral")
    same = call(folders.checkpoint, folders.exported, *words, "--output", tmp_path / "ids.jsonl")
    assert same.returncode == 0, same.stderr
    assert same.stdout == f"{folders.exported}: 4 of 4 answers have the tokens of {folders.checkpoint}\n"
    assert "left out: line 5: malformed" in same.stderr
    for line in map(json.loads, (tmp_path / "ids.jsonl").read_text().splitlines()):
        assert line[str(folders.checkpoint)] == line[str(folders.exported)] and len(line) == 3
    other = changed(folders, tmp_path / "other")
    differs = call(folders.checkpoint, other, *words)
    assert differs.returncode == 1, differs.stderr
    assert "differs\n  " in differs.stdout and " with probability 0." in differs.stdout
    alone = call(folders.checkpoint, *words)
    assert alone.returncode == 2 and alone.stderr.startswith("error: wanted two models or more")
