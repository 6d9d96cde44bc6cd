"""Files of prompts: every line accounted for, and a run that was cut off gives the same file."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_patch.data.conversation import Exchange
from megatron_patch.errors import UserError
from megatron_patch.inference import Engine, Request, Sampling
from megatron_patch.inference.run import Job, check_job, merge, run
from tests.inference.conftest import Folders
from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/llava_mcore/run_inference_llava.sh"
SHORT = Sampling(max_new_tokens=6)

# A line of the file, and what its error says.
BAD_LINES = {
    b"{": "not JSON",
    b"": "the line is empty",
    b"\xff\xfe": "not JSON in UTF-8",
    b"[1]": "wanted a JSON object",
    b"null": "wanted a JSON object",
    b'{"image": "0.png"}': "wanted one of prompt, text and conversations",
    b'{"image": "0.png", "prompt": ""}': "the prompt is empty",
    b'{"image": "0.png", "prompt": " <image>\\n "}': "the prompt is empty",
    b'{"image": "0.png", "prompt": 5}': "prompt is int, wanted str",
    b'{"image": 5, "prompt": "x"}': "image is int, wanted str or list",
    b'{"image": ["0.png", null], "prompt": "x"}': "images are not all file names",
    b'{"image": "none.png", "prompt": "x"}': "image missing: none.png",
    b'{"image": "../images/0.png", "prompt": "x"}': "points outside",
    b'{"image": "broken.png", "prompt": "x"}': "image truncated",
    b'{"image": "text.png", "prompt": "x"}': "not an image",
    b'{"image": "0.png", "prompt": "<image> or <image>?", "id": "two"}': None,  # marks of one image are one mark
    b'{"images": ["0.png", "1.png"], "prompt": "<image> <image> <image>"}': "3 <image> marks, 2 images",
    b'{"prompt": "<image>\\nWhat?"}': "1 <image> marks, 0 images",
    b'{"prompt": "x", "id": {"a": 1}}': "id is dict, wanted str or int",
    b'{"prompt": "x", "text": "y"}': "both prompt and text",
    b'{"conversations": []}': "got no turn",
    b'{"conversations": [{"from": "gpt", "value": "x"}]}': "turn 1 is of gpt",
    b'{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}': "got an answer",
    b'{"conversations": [{"from": "human"}]}': "a turn is not {from, value}",
    b'{"prompt": "\\ud800"}': "not Unicode",
    b'{"prompt": "' + 600 * b"long " + b'"}': "wanted fewer than 512",
    b'{"prompt": "x", "images": [' + b", ".join([b'"0.png"'] * 40) + b"]}": "wanted fewer than 512",
}
GOOD_LINES = [
    b'{"image": "0.png", "prompt": "What is this?"}',
    b'{"prompt": "What colour?", "id": 7}',
    b'{"question_id": 8, "image": "1.png", "text": "What is in the picture?"}',
    b'{"images": ["2.png", "3.png"], "prompt": "Which is red? <image> or <image>"}',
    b'{"id": "talk", "image": "3.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, '
    b'{"from": "gpt", "value": "It is a nine."}, {"from": "human", "value": "What colour?"}]}',
]


@pytest.fixture(scope="module")
def images(folders: Folders) -> Path:
    """The images, and two that are none."""
    (folders.images / "broken.png").write_bytes((folders.images / "0.png").read_bytes()[:900])
    (folders.images / "text.png").write_text("no image")
    return folders.images


@pytest.fixture
def job(images: Path, tmp_path: Path) -> Job:
    """Good lines between the bad ones."""
    lines = []
    for number, line in enumerate(BAD_LINES):
        lines += [line, GOOD_LINES[number % len(GOOD_LINES)]]
    (tmp_path / "prompts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return Job(tmp_path / "prompts.jsonl", images, tmp_path / "answers.jsonl", SHORT, 4, {"model": "m"})


def told(job: Job) -> list[dict]:
    return [json.loads(line) for line in job.output.read_text().splitlines()]


def test_every_line_is_accounted_for_in_order(job: Job, engine: Engine):
    summary = run(job, engine)
    found = told(job)
    assert len(found) == summary.lines == 2 * len(BAD_LINES)
    for number, (answer, (line, error)) in enumerate(zip(found[::2], BAD_LINES.items(), strict=True)):
        if error is None:
            assert answer["finish_reason"] in ("stop", "length")
        else:
            assert error in answer["error"], (line[:80], answer)
            assert answer["id"] == str(2 * number + 1) and "answer" not in answer
    assert [answer["id"] for answer in found[1:11:2]] == ["2", "7", "8", "8", "talk"]
    # each as asked alone, by the request that it stands for
    bytes_of = [(job.image_root / f"{number}.png").read_bytes() for number in range(4)]
    (alone,) = engine.answer(
        [Request("2", (Exchange("<image>\nWhat is this?", None),), (bytes_of[0],))],
        SHORT,
    )
    assert found[1]["answer"] == alone.text and found[1]["prompt_tokens"] == alone.prompt_tokens > 16
    turns = (Exchange("<image>\nWhat is this?", "It is a nine."), Exchange("What colour?", None))
    (talk,) = engine.answer([Request("talk", turns, (bytes_of[3],))], SHORT)
    assert found[9] == {
        "id": "talk",
        "answer": talk.text,
        "finish_reason": talk.finish_reason,
        "prompt_tokens": talk.prompt_tokens,
        "completion_tokens": talk.completion_tokens,
    }
    wrong = sum(error is not None for error in BAD_LINES.values())
    assert len(summary.errors) == wrong >= 20
    assert summary.errors[0].startswith("line 1 (1): malformed: not JSON")
    assert sorted(path.name for path in job.output.parent.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


class Interrupted(Exception):
    pass


class DyingEngine:
    """Answers so many batches."""

    def __init__(self, engine: Engine, batches: int) -> None:
        self.engine, self.batches, self.prepare = engine, batches, engine.prepare

    def answer(self, requests, sampling):
        self.batches -= 1
        if self.batches < 0:
            raise Interrupted
        return self.engine.answer(requests, sampling)


@pytest.mark.parametrize("torn", [b"", b'{"id": "7", "answ'])
def test_an_interrupted_run_goes_on_where_it_was(job: Job, engine: Engine, tmp_path: Path, torn: bytes):
    run(job, engine)
    other = dataclasses.replace(job, output=tmp_path / "again.jsonl")
    for batches in (2, 0, 3):
        with pytest.raises(Interrupted):
            run(other, DyingEngine(engine, batches))
        assert not other.output.exists()
        with other.partial.open("ab") as file:
            file.write(torn)
        check_job(other)
    begun = other.partial.read_bytes().count(b"\n")
    assert 0 < begun < 2 * len(BAD_LINES)
    counted = DyingEngine(engine, 1000)
    summary = run(other, counted)
    assert other.output.read_bytes() == job.output.read_bytes()
    assert 1000 - counted.batches <= 1 + (2 * len(BAD_LINES) - begun) // 4, "answered again"
    assert len(summary.errors) == sum(error is not None for error in BAD_LINES.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parts_one_of_them_interrupted_give_the_same_file(job: Job, engine: Engine, tmp_path: Path, temperature: float):
    job = dataclasses.replace(job, sampling=Sampling(max_new_tokens=6, temperature=temperature))
    whole = run(job, engine)
    other = dataclasses.replace(job, output=tmp_path / "shared.jsonl")
    parts = [dataclasses.replace(other, part=(number, 3)) for number in (1, 2, 3)]
    assert [line for part in parts for line in part.lines()] == list(range(2 * len(BAD_LINES)))
    with pytest.raises(Interrupted):
        run(parts[1], DyingEngine(engine, 1))
    for part in (parts[0], parts[2], parts[1]):
        check_job(part)
        run(part, engine)
        assert not other.output.exists()
    again = run(parts[1], DyingEngine(engine, 0))  # it is done: nothing is asked
    assert again.lines == len(parts[1].lines()) and again.errors == [
        error for error in whole.errors if int(error.split()[1]) - 1 in parts[1].lines()
    ]
    assert merge(other) == whole
    assert other.output.read_bytes() == job.output.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl", "shared.jsonl"]


def test_parts_that_do_not_belong_together_are_refused(job: Job, engine: Engine):
    one, two = (dataclasses.replace(job, part=(number, 2)) for number in (1, 2))
    with pytest.raises(UserError, match="wanted beside it the parts of one number, got nothing"):
        merge(job)
    run(one, engine)
    with pytest.raises(UserError, match="part 2/2 is not answered; give its command, then --merge"):
        merge(job)
    for part in ((1, 3), (1, 1)):
        with pytest.raises(UserError, match="was begun in 2 parts; give --part I/2, --merge"):
            check_job(dataclasses.replace(job, part=part))
    with pytest.raises(UserError, match="was begun with other settings"):
        check_job(dataclasses.replace(one, model={"model": "n"}))
    run(two, engine)
    with pytest.raises(UserError, match="was begun with other settings"):
        merge(dataclasses.replace(job, sampling=Sampling(max_new_tokens=7)))
    content = two.target.read_bytes()
    two.target.write_bytes(content.splitlines(True)[0])
    with pytest.raises(UserError, match="holds 1 lines, wanted"):
        merge(job)
    two.target.write_bytes(content)
    assert not job.output.exists() and merge(job).lines == 2 * len(BAD_LINES)
    job.output.unlink()
    job.partial.write_bytes(b"")
    with pytest.raises(UserError, match="was begun without --part"):
        check_job(one)


def test_a_run_with_other_settings_is_refused(job: Job, engine: Engine):
    with pytest.raises(Interrupted):
        run(job, DyingEngine(engine, 1))
    check_job(dataclasses.replace(job, batch_size=1))
    for change, said in (
        ({"sampling": Sampling(max_new_tokens=7)}, "max_new_tokens 6, now 7"),
        ({"model": {"model": "n"}}, "model 'm', now 'n'"),
        ({"image_root": job.prompts.parent}, "image_root"),
    ):
        with pytest.raises(UserError, match=said):
            check_job(dataclasses.replace(job, **change))
    job.prompts.write_bytes(job.prompts.read_bytes() + b"{}\n")
    with pytest.raises(UserError, match="prompts_sha256"):
        check_job(job)
    job.settings.unlink()
    with pytest.raises(UserError, match="exists without"):
        check_job(job)


def test_what_cannot_work_is_refused_before_anything_is_made(job: Job):
    for change, said in (
        ({"prompts": job.prompts.with_name("none")}, "no such file; wanted the prompts"),
        ({"image_root": job.prompts}, "no such folder"),
        ({"output": job.prompts}, "exists; name another file"),
        ({"output": job.prompts.parent / "no" / "a.jsonl"}, "no such folder; make it"),
        ({"batch_size": 0}, "batch size is 0"),
    ):
        with pytest.raises(UserError, match=said):
            check_job(dataclasses.replace(job, **change))
    assert [path.name for path in job.prompts.parent.iterdir()] == ["prompts.jsonl"]


def command(job: Job, model: Path, *words: object) -> list[str]:
    return [
        *("bash", str(SCRIPT), "--model", str(model), "--prompts", str(job.prompts)),
        *("--image-root", str(job.image_root), "--output", str(job.output), "--max-new-tokens", "6", *map(str, words)),
    ]


def call(words: list[str], python: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": python or interpreter.python(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)


def test_the_command(job: Job, folders: Folders, engine: Engine, tmp_path: Path):
    done = call(command(job, folders.exported, "--batch-size", 4))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "could not be answered:\n  line 1 (1): malformed: not JSON" in done.stderr
    assert "and 16 more, see the lines with `error`" in done.stderr
    in_process = dataclasses.replace(job, output=tmp_path / "in_process.jsonl")
    run(in_process, engine)
    assert job.output.read_bytes() == in_process.output.read_bytes()
    again = call(command(job, folders.exported))
    assert again.returncode == 2 and again.stderr == f"error: {job.output} exists; name another file, or remove it\n"
    job.output.unlink()
    for words in (("--part", "1/2"), ("--part", "2/2"), ("--merge",)):
        done = call(command(job, folders.exported, "--batch-size", 4, *words))
        assert done.returncode == 0, done.stderr
    assert job.output.read_bytes() == in_process.output.read_bytes()
    alone = call([*command(job, folders.exported)[:4], "--prompt", "x", "--part", "1/2"])
    assert alone.returncode == 2 and "--part and --merge belong to --prompts" in alone.stderr


def test_one_prompt_on_the_command_line(folders: Folders, engine: Engine):
    image = folders.images / "0.png"
    words = ["bash", str(SCRIPT), "--model", str(folders.exported), "--max-new-tokens", "6"]
    done = call([*words, "--image", str(image), "--prompt", "What is this?"])
    assert done.returncode == 0, done.stderr
    (answer,) = engine.answer([Request("prompt", (Exchange("What is this?", None),), (image,))], SHORT)
    assert done.stdout == answer.text + "\n"
    missing = call([*words, "--image", "none.png", "--prompt", "What is this?"])
    assert missing.returncode == 2
    assert missing.stderr == "error: none.png: no such image\n"
    frames = call([*words, "--video", str(folders.images), "--prompt", "What is this?"])  # of a LLaVA-1.5
    assert frames.returncode == 2 and "error: prompt: video: 1 videos for this model" in frames.stderr


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_file(job: Job, folders: Folders, tmp_path: Path):
    other = dataclasses.replace(job, output=tmp_path / "killed.jsonl")
    words = command(other, folders.exported, "--batch-size", 1)
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    while not (other.partial.exists() and other.partial.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not other.output.exists() and other.partial.exists()
    assert call(words, sys.executable).returncode == 0
    assert call(command(job, folders.exported, "--batch-size", 1), sys.executable).returncode == 0
    assert other.output.read_bytes() == job.output.read_bytes()
