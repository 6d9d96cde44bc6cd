"""EVAL_BENCHMARK: at each validation the model gives transformers' answers, however it is cut, and they are scored."""

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_patch.data.conversation import Exchange
from megatron_patch.inference.interface import Request, Sampling
from megatron_patch.inference.transformers_engine import TransformersEngine
from megatron_patch.training import checkpoint_retention
from megatron_patch.training.generation import NEW_TOKENS
from tests.training.launching import Workspace, run
from tests.training.test_sample_generation import STANDING_STILL

QUESTIONS, KNOWN = 7, 4  # the model's own answers are the right ones of so many
LAYOUTS = {
    "one process": {},
    "PP2": {"PP": 2},
    "CP2": {"CP": 2},
    "TP2 + SP, DP2": {"TP": 2, "NPROC_PER_NODE": 4, "DO": "true"},
    "PP2, interleaved, TP2": {"PP": 2, "VIRTUAL_STAGES": 2, "TP": 2},
    "CP2 x PP2, bf16": {"CP": 2, "PP": 2, "PR": "bf16"},
}


@pytest.fixture(scope="module")
def benchmark_file(workspace: Workspace) -> Path:
    """Questions about images and about none, in LLaVA's format; KNOWN of them with transformers' own answer."""
    images = workspace.dataset.parent / "images"
    engine = TransformersEngine(workspace.checkpoint.parent / "hf", torch.float32, "mistral")
    records = []
    for number in range(QUESTIONS):
        image = images / f"{number % 9}.png" if number % 4 else None
        text = f"{'<image>\n' if image else ''}What {'is ' * number}this?"
        request = Request(str(number), (Exchange(text, None),), (image,) if image else ())
        (answer,) = engine.answer([request], Sampling(max_new_tokens=NEW_TOKENS))
        truth = answer.text if number < KNOWN else "another answer"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": truth}]
        records.append({"id": number, "conversations": turns} | ({"image": image.name} if image else {}))
    assert len({record["conversations"][1]["value"] for record in records}) > 2, "all answers are the same"
    file = workspace.checkpoint.parent / "benchmark.json"  # not beside its images
    file.write_text(json.dumps(records))
    return file


def asked(workspace: Workspace, file: Path) -> dict[str, object]:
    images = workspace.dataset.parent / "images"
    return {"EVAL_BENCHMARK": "llava", "EVAL_BENCHMARK_DATA": file, "EVAL_BENCHMARK_IMAGES": images}


def lines_of(output: Path, iteration: int) -> list[dict]:
    text = (output / f"benchmark/iter_{iteration:07d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_scored(layout: str, workspace: Workspace, benchmark_file: Path, tmp_path: Path) -> None:
    options = asked(workspace, benchmark_file) | {"EVAL_INTERVAL": 1}
    printed = run(workspace, tmp_path / "out", TRAIN_ITERS=1, **STANDING_STILL, **options, **LAYOUTS[layout])
    lines = lines_of(tmp_path / "out", 1)
    assert [line["id"] for line in lines] == [f"{number}/0" for number in range(QUESTIONS)]
    right = [line["score"] for line in lines]
    if "bf16" not in layout:  # there another token may be the most likely one
        assert right == [1.0] * KNOWN + [0.0] * (QUESTIONS - KNOWN)
    told = re.search(rf"llava at iteration 1: accuracy ([\d.]+) \({QUESTIONS} questions\)", printed)
    assert told and float(told[1]) == pytest.approx(100 * sum(right) / QUESTIONS, abs=0.01)
    assert (tmp_path / "out/benchmark/answers.png").stat().st_size > 1000


@pytest.mark.slow
def test_some_questions_are_chosen_and_the_best_score_is_kept(
    workspace: Workspace, benchmark_file: Path, tmp_path: Path
) -> None:
    """The model unlearns what were its own answers: the first validation has the best score, the last the best loss."""
    options = asked(workspace, benchmark_file) | {
        "EVAL_BENCHMARK_QUESTIONS": 4,
        "KEEP_BEST": "true",
        "BEST_BY": "score",
    }
    printed = run(workspace, tmp_path / "out", TRAIN_ITERS=1, EVAL_INTERVAL=1, **STANDING_STILL, **options)
    learning = {"LR": "1e-2", "LR_WARMUP_ITERS": 2, "TRAIN_ITERS": 8, "EVAL_INTERVAL": 8}
    printed += run(workspace, tmp_path / "out", **learning, **options)
    scores = {}
    for iteration in (1, 8):
        lines = lines_of(tmp_path / "out", iteration)
        assert [line["id"] for line in lines] == ["0/0", "1/0", "3/0", "5/0"]
        scores[iteration] = 25 * sum(line["score"] for line in lines)
    assert scores[1] == 75 > scores[8]
    losses = {number: float(loss) for number, loss in re.findall(r"at iteration (\d+) .*?loss value: (\S+)", printed)}
    assert losses["8"] < losses["1"], "the best by score is the best by loss too"
    folder = tmp_path / "out/checkpoint"
    assert json.loads((folder / "best.json").read_text()) == {"iteration": 1, "score": 75}
    assert checkpoint_retention.tracked(folder / "best") == 1
    assert checkpoint_retention.read_best(folder, "score") == (1, 75)


def test_another_measure_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "llava").mkdir()
    (tmp_path / checkpoint_retention.folder_name(10)).mkdir()
    checkpoint_retention.record_best(tmp_path, 10, 2.0)
    assert checkpoint_retention.read_best(tmp_path, "score") == (10, float("-inf"))
    checkpoint_retention.record_best(tmp_path, 10, 50.0, "score")
    assert checkpoint_retention.read_best(tmp_path, "loss") == (10, float("inf"))


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        ("[]", {}, "holds no question"),
        ('[{"id": 1, "image": "none.png"}]', {}, "its image none.png is not in"),
        (None, {"DECODER_SEQ_LEN": 100, "EVAL_BENCHMARK": "pope"}, "no such file in it"),
    ],
)
def test_a_benchmark_that_cannot_be_asked_is_refused(
    content: str | None, changes: dict, said: str, workspace: Workspace, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if content is not None:
        (data / "benchmark.json").write_text(content)
    options = {"EVAL_BENCHMARK": "llava", "EVAL_BENCHMARK_DATA": data, "CHECK": "true"} | changes
    printed = run(workspace, tmp_path / "out", expected_exit=2, **options)
    assert said in printed and not (tmp_path / "out").exists()
