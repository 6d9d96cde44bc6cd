"""The command: what it writes, what it refuses, and that interrupted and shared runs end in the same bytes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from examples.llava_mcore import evaluate_llava
from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.conversation import Exchange
from megatron_patch.errors import UserError
from megatron_patch.evaluation import run
from megatron_patch.evaluation.benchmarks import find_benchmark, read_questions
from megatron_patch.evaluation.question import Question, with_other_images
from megatron_patch.evaluation.report import table_text
from megatron_patch.evaluation.source import Source
from megatron_patch.inference import Request, Sampling, open_engine
from megatron_patch.inference.transformers_engine import TransformersEngine
from tests.evaluation.conftest import write_questions
from tests.evaluation.published_formats import IMAGE, MAKERS

ROOT = Path(__file__).parents[2]
RESULT = ("answers.jsonl", "scored.jsonl", "results.json")
BATCH, IMAGES = 8, 12  # 60 questions: seven batches of eight and one of four


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("evaluation") / "data", IMAGES)


def words(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(model), "--data", str(data), "--output", str(output), "--max-new-tokens", "3", *more]
    return given if "--benchmark" in more else ["--benchmark", "llava", *given]


def evaluate(model: Path, data: Path, output: Path, *more: str) -> Path:
    evaluate_llava.evaluate(evaluate_llava.parse_arguments(words(model, data, output, *more)))
    return output


def contents(output: Path) -> list[bytes]:
    return [(output / name).read_bytes() for name in RESULT]


@pytest.fixture(scope="session")
def whole(model, data, tmp_path_factory) -> Path:
    return evaluate(model, data, tmp_path_factory.mktemp("evaluation") / "whole")


@pytest.fixture
def batches_seen(monkeypatch) -> list[list[str]]:
    """Ids of the questions of every batch that a model is asked."""
    seen: list[list[str]] = []
    answer = TransformersEngine.answer

    def spy(self, requests, sampling):
        seen.append([request.id for request in requests])
        return answer(self, requests, sampling)

    monkeypatch.setattr(TransformersEngine, "answer", spy)
    return seen


def ids(lines: Sequence[bytes]) -> list[str]:
    return [json.loads(line)["id"] for line in lines]


def test_answers_are_the_engines_and_every_question_has_one(model, data, whole):
    questions = read_questions(find_benchmark("llava"), Source(data))
    lines = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [question.id for question in questions] and len(lines) == 5 * IMAGES
    with open_engine(model) as engine:
        for question, line in list(zip(questions, lines, strict=True))[::9]:
            text = f"<image>\n{question.text}"
            (answer,) = engine.answer([Request("x", (Exchange(text, None),), question.images)], Sampling(3))
            assert (line["answer"], line["finish_reason"]) == (answer.text, answer.finish_reason)
    results = json.loads((whole / "results.json").read_text())
    exact = sum(line["answer"] == "red" for line in lines) / len(lines)
    assert results["scores"] == {"all": {"questions": 60, "accuracy": 100 * exact}}
    assert (results["questions"], results["failed"], results["left_out"]) == (60, 0, {})


def test_pictures_are_there(whole):
    for name, least in (("results.png", 300), ("answers.png", 1000)):
        with Image.open(whole / name) as image:
            image.load()
            assert image.width > least


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(model, data, whole, tmp_path, batches_seen, monkeypatch):
    """Stopped in its fourth batch, with a line and a half of that batch on the disk as a kill may leave them."""
    ask = TransformersEngine.answer

    def stop_in_the_fourth(self, requests, sampling):
        if len(batches_seen) == 3:
            raise KeyboardInterrupt
        return ask(self, requests, sampling)

    monkeypatch.setattr(TransformersEngine, "answer", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, tmp_path / "out")
    answers = tmp_path / "out/answers.jsonl"
    lines = (whole / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert answers.read_bytes() == b"".join(lines[: 3 * BATCH]) and not (tmp_path / "out/results.json").exists()
    with answers.open("ab") as file:
        file.write(lines[3 * BATCH] + lines[3 * BATCH + 1][:40])

    monkeypatch.setattr(TransformersEngine, "answer", ask)
    batches_seen.clear()
    evaluate(model, data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    # asked in the batches of the run that was never stopped, and none of them twice
    assert batches_seen == [ids(lines[start : start + BATCH]) for start in range(3 * BATCH, 60, BATCH)]


def test_parts_and_their_merge_are_the_whole(model, data, whole, tmp_path, batches_seen):
    out = tmp_path / "out"
    outcome = evaluate_llava.evaluate(evaluate_llava.parse_arguments(words(model, data, out, "--part", "2/2")))
    assert outcome.table is None and outcome.remarks[0].startswith("28 answers; --merge")
    assert not (out / "results.json").exists()
    with pytest.raises(UserError, match=r"parts/1-of-2.jsonl: no such file; ask its questions first"):
        evaluate(model, data, out, "--merge")
    evaluate(model, data, out, "--part", "1/2")
    assert len(batches_seen) == 8 and sorted(map(len, batches_seen)) == [4, *[8] * 7]
    evaluate(model, data, out, "--merge")
    assert contents(out) == contents(whole)
    first = out / "parts/1-of-2.jsonl"
    first.write_bytes(b"".join(first.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"parts/1-of-2.jsonl: holds 31 of 32 answers; give the command"):
        evaluate(model, data, out, "--merge")
    first.rename(out / "parts/1-of-3.jsonl")
    with pytest.raises(UserError, match=r"holds 1-of-3.jsonl, 2-of-2.jsonl; wanted the answers of all parts"):
        evaluate(model, data, out, "--merge")


def test_another_metric_only_scores(model, data, tmp_path, batches_seen, monkeypatch):
    """The model, which may be large, is not even opened."""
    opened, engine_of = [], evaluate_llava.engine_of
    monkeypatch.setattr(evaluate_llava, "engine_of", lambda given: (opened.append(given.model), engine_of(given))[1])
    evaluate(model, data, tmp_path / "out", "--limit", "9")
    assert len(batches_seen) == 2
    evaluate(model, data, tmp_path / "out", "--limit", "9", "--metric", "anls")
    assert len(batches_seen) == 2 and opened == [model]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["metric"] == "anls" and results["questions"] == 9


def test_an_image_that_cannot_be_read_counts_as_wrong_and_is_said(model, tmp_path):
    data = write_questions(tmp_path / "data", 2, 2)
    (data / "images/0.png").write_bytes(IMAGE[:40])
    outcome = evaluate_llava.evaluate(evaluate_llava.parse_arguments(words(model, data, tmp_path / "out")))
    lines = [json.loads(line) for line in (tmp_path / "out/scored.jsonl").read_text().splitlines()]
    assert [line["finish_reason"] == "error" for line in lines] == [True, True, False, False]
    assert lines[0]["score"] == 0 and lines[0]["error"].startswith("r0/0: image ")
    assert outcome.remarks[0].startswith("2 questions could not be asked and count as wrong; the first: r0/0: image ")
    assert json.loads((tmp_path / "out/results.json").read_text())["failed"] == 2


def test_choices_are_asked_in_every_rotation(model, tmp_path, batches_seen):
    MAKERS["ai2d"](tmp_path)
    evaluate(model, tmp_path, tmp_path / "out", "--benchmark", "ai2d", "--circular")
    assert batches_seen == [["0#0", "0#1", "1#0", "1#1"]]
    assert "circular_accuracy" in json.loads((tmp_path / "out/results.json").read_text())["scores"]["all"]
    with pytest.raises(UserError, match="--circular rotates choices, and docvqa has none"):
        MAKERS["docvqa"](tmp_path / "docvqa")
        evaluate(model, tmp_path / "docvqa", tmp_path / "other", "--benchmark", "docvqa", "--circular")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["mme", "scienceqa", "mmmu"])
def test_benchmarks_with_and_without_images_run_to_the_end(model, name, tmp_path):
    expected = MAKERS[name](tmp_path / "data")
    out = evaluate(model, tmp_path / "data", tmp_path / "out", "--benchmark", name)
    results = json.loads((out / "results.json").read_text())
    assert results["questions"] == len(expected) and results["failed"] == 0
    assert list(results["scores"]) == ["all", *dict.fromkeys(task for *_, task in expected)]


def test_images_are_swapped_for_the_control(model, data, whole, tmp_path):
    evaluate(model, data, tmp_path / "out", "--swap-images")
    own, other = (
        [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
        for out in (whole, tmp_path / "out")
    )
    assert [line["id"] for line in own] == [line["id"] for line in other]
    assert sum(one["answer"] != another["answer"] for one, another in zip(own, other, strict=True)) > 10
    with pytest.raises(UserError, match="began differently \\(swap_images was True, is now False\\)"):
        evaluate(model, data, tmp_path / "out")


@pytest.mark.parametrize("count", [2, 3, 50])
def test_swapping_leaves_no_image_in_its_place(count):
    questions = [Question(str(n), "?", ("yes",), (Path(f"{n % count}.png"),)) for n in range(2 * count)]
    swapped = with_other_images(questions)
    pairs = {(one.images[0], other.images[0]) for one, other in zip(questions, swapped, strict=True)}
    assert len(pairs) == count == len({own for own, _ in pairs}) == len({other for _, other in pairs})
    assert all(own != other for own, other in pairs)
    assert [one.id for one in swapped] == [one.id for one in questions]


def test_swapping_one_image_is_refused():
    with pytest.raises(UserError, match="at least two"):
        with_other_images([Question("1", "?", ("yes",), (b"one",)), Question("2", "?", ("no",), (b"one",))])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "4"], "batch_size was 8, is now 4"),
        (["--limit", "3"], "limit was None, is now 3"),
        (["--template", "v0"], "template was None, is now 'v0'"),
        (["--seed", "1"], r"sampling was \{.*'seed': 0\}, is now \{.*'seed': 1\}"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(model, data, whole, more, message):
    before = contents(whole)
    with pytest.raises(UserError, match=rf"whole: began differently \({message}\); name another folder"):
        evaluate(model, data, whole, *more)
    assert contents(whole) == before


def test_new_weights_in_the_same_folder_are_refused(model, data, whole):
    weights = model / "model.safetensors"
    now = weights.stat().st_mtime_ns
    os.utime(weights, ns=(now + 1, now + 1))
    try:
        with pytest.raises(UserError, match=r"began differently \(weights was '\w+', is now '\w+'\)"):
            evaluate(model, data, whole)
    finally:
        os.utime(weights, ns=(now, now))


def test_answers_to_other_questions_are_refused(model, tmp_path):
    data = write_questions(tmp_path / "data", 2)
    evaluate(model, data, tmp_path / "out")
    text = (data / "digits.json").read_text()
    (data / "digits.json").write_text(text.replace("Question 1?", "Which one?", 1))
    with pytest.raises(UserError, match=r"answers.jsonl, line 2: answers 'r0/1', wanted 'r0/1' with its prompt"):
        evaluate(model, data, tmp_path / "out")
    (data / "digits.json").write_text(json.dumps(json.loads(text)[:1]))
    with pytest.raises(UserError, match="holds 10 answers to 5 questions"):
        evaluate(model, data, tmp_path / "out")


def test_a_foreign_folder_is_left_alone(model, data, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and is not the folder of an evaluation; name another one"):
        evaluate(model, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_part_that_another_process_writes_is_refused(model, data, tmp_path):
    out = tmp_path / "out"
    evaluate(model, data, out, "--limit", "9")
    (out / "answers.jsonl").write_bytes(b"")
    with (out / "answers.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"answers.jsonl: another process is writing it"):
            evaluate(model, data, out, "--limit", "9")


NOWHERE = Path("nowhere").absolute()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--benchmark": "vqav2"}, "benchmark is 'vqav2'; wanted one of ai2d, "),
        ({"--metric": "accuracy"}, "metric is 'accuracy'; wanted one of exact_match, "),
        ({"--model": "nowhere"}, "nowhere is no model: wanted an exported Hugging Face folder"),
        ({"--data": "nowhere"}, f"{NOWHERE}: no such file or folder; wanted the benchmark's data"),
        ({"--images": "nowhere"}, f"{NOWHERE}: no such folder; wanted the benchmark's images"),
        ({"--temperature": "-1"}, "temperature is -1.0, wanted 0"),
    ],
)
def test_wrong_input_ends_with_code_2_and_creates_nothing(model, data, changes, message, tmp_path, capsys):
    given = words(model, data, tmp_path / "out")
    for name, value in changes.items():
        given += [name, value]
    arguments = evaluate_llava.parse_arguments(given)
    assert evaluate_llava.exit_code(lambda: evaluate_llava.evaluate(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(model, data, part, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate_llava.parse_arguments(words(model, data, tmp_path, "--part", part))
    assert stop.value.code == 2 and f"argument --part: invalid part value: '{part}'" in capsys.readouterr().err


def test_the_launcher_refuses_before_anything_is_created(model, data, tmp_path):
    done = launch(model, data, tmp_path / "out", "--benchmark", "vqav2")
    assert done.returncode == 2 and done.stderr.startswith("error: benchmark is 'vqav2'") and not done.stdout
    assert not list(tmp_path.iterdir())


def test_parts_take_turns_and_share_everything_out():
    batches = run.batches_of([*range(50)], 4)
    shares = [run.Part(number, 3).of(batches) for number in (1, 2, 3)]
    assert sorted(number for share in shares for batch in share for number in batch) == [*range(50)]
    assert [len(share) for share in shares] == [5, 4, 4] and shares[1][0] == [4, 5, 6, 7]


def test_the_table_leaves_out_what_a_row_lacks():
    table = {"all": {"questions": 12, "perception": 325.25}, "OCR": {"questions": 4, "score": 125.0}}
    assert table_text(table).splitlines() == [
        "task  questions  perception  score",
        "all          12       325.2       ",
        "OCR           4              125.0",
    ]


# ---------------------------------------------------------------- real processes


def launch(model: Path, data: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(_command(model, data, output, *more), capture_output=True, text=True, env=_environment())


def _command(*given) -> list[str]:
    return ["bash", str(ROOT / "examples/llava_mcore/evaluate_llava.sh"), *words(*given)]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_500_questions_killed_and_shared_out_end_in_the_same_bytes(model, tmp_path):
    data = write_questions(tmp_path / "data", 100)
    done = launch(model, data, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen(_command(model, data, killed), env=_environment(), stderr=subprocess.DEVNULL)
    try:
        while not (killed / "answers.jsonl").is_file() or (killed / "answers.jsonl").read_bytes().count(b"\n") < 200:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 200 <= (killed / "answers.jsonl").read_bytes().count(b"\n") < 500
    for output, calls in (
        (killed, [()]),
        (tmp_path / "shared", [("--part", "1/2"), ("--part", "2/2"), ("--merge",)]),
    ):
        for more in calls:
            done = launch(model, data, output, *more)
            assert done.returncode == 0, done.stderr
        assert contents(output) == contents(tmp_path / "whole")
    assert len((tmp_path / "whole/answers.jsonl").read_text().splitlines()) == 500


@pytest.mark.slow
def test_two_ranks_end_in_the_same_bytes(model, data, whole, tmp_path):
    """A Megatron checkpoint in one process and in two (TP2); its answers are those of the exported folder."""
    checkpoint = tmp_path / "checkpoint"
    convert_to_megatron(model, None, checkpoint, precision="fp32", model_size="tiny")
    for output, more in ((tmp_path / "one", ()), (tmp_path / "two", ("--tensor-parallel", "2"))):
        done = launch(checkpoint, data, output, *more)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "one/answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
