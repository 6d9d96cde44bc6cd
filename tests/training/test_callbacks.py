"""What a run tells: lines, TensorBoard, W&B, bar, sample answers, traces, summary; from three runs of the launcher."""

import gzip
import importlib.util
import json
import os
import pty
import re
import signal
import subprocess
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.loader import build_train_loader
from megatron_patch.data.loading.prompts import Prompts
from megatron_patch.errors import UserError
from megatron_patch.geometry import read_geometry_of
from megatron_patch.step_flop import Frozen, Work, step_flop
from megatron_patch.tokenizer_files import load_tokenizer
from megatron_patch.training.config import read_config
from megatron_patch.training.progress import ProgressBar
from megatron_patch.training.timer import Timer, as_clock
from tests.training.launching import Workspace, command, losses, run
from tests.training.test_config import argv

ITERATIONS, STEP_RECORDS, LOG_INTERVAL = 20, 8, 2
SETTINGS = {"TRAIN_ITERS": ITERATIONS, "EVAL_INTERVAL": 10, "EVAL_ITERS": 1}
TOLD = {**SETTINGS, "SAMPLE_ANSWERS": 2, "PROFILE": "3-4"}
HAVE_WANDB = importlib.util.find_spec("wandb") is not None
KEY = "0123456789" * 4
LINE = re.compile(
    r"samples/s: ([\d.]+) \| per device: ([\d.]+) \| tokens/s: (\d+) \| trained: (\d+) \| "
    r"TFLOP/s per device: ([\d.e-]+) \| ([\d.]+) GiB at most \| (\d\d:\d\d:\d\d) left"
)


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    printed: str
    output: Path
    on_terminal: str = ""

    @property
    def summary(self) -> dict:
        return json.loads((self.output / "summary.json").read_text())

    def answers(self, iteration: int) -> list[dict]:
        lines = (self.output / f"answers/iter_{iteration:07d}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def told(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One process with everything on, started from a terminal."""
    output = tmp_path_factory.mktemp("told") / "out"
    words, environment = command(workspace, output, **TOLD)
    if HAVE_WANDB:
        environment |= {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "WANDB_SILENT": "true"}
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    seen: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                seen.append(os.read(master, 65536))
            except OSError:  # the last one who had it open is gone
                return

    reader = threading.Thread(target=drain)
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    reader.start()
    printed = process.communicate(timeout=300)[0]
    reader.join()
    os.close(master)
    on_terminal = b"".join(seen).decode()
    assert process.returncode == 0, printed[-2000:] + on_terminal[-4000:]
    return Done(printed, output, on_terminal)


@pytest.fixture(scope="module")
def stopped(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The same run without answers, traces and terminal, stopped by SIGTERM behind its first validation."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    words, environment = command(workspace, output, **SETTINGS)
    where = output.parent / "printed"
    with where.open("w") as stream:
        process = subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 240
        while 11 not in losses(where.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, where.read_text()[-4000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, where.read_text()[-4000:]
    return Done(where.read_text(), output)


@pytest.fixture(scope="module")
def two_ranks(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two data-parallel ranks, a line every second iteration."""
    output = tmp_path_factory.mktemp("two") / "out"
    changes = {**SETTINGS, "EVAL_INTERVAL": ITERATIONS, "SAMPLE_ANSWERS": 2, "NPROC_PER_NODE": 2}
    return Done(run(workspace, output, LOG_INTERVAL=LOG_INTERVAL, **changes), output)


@pytest.fixture(scope="module")
def counted(workspace: Workspace) -> Work:
    """What the run trains on, counted from batches of one record, which hold no padding."""
    settings = read_config(argv(workspace, micro_batch_size="1", num_workers="0"))
    loader = build_train_loader(settings.train_dataset_path, settings.data, 0, 1)
    found = [0, 0, 0, 0]
    for _, batch in zip(range(ITERATIONS * STEP_RECORDS), loader, strict=False):
        length = batch["tokens"].shape[1]
        pairs = sum(range(1, length + 1))
        labels = int((batch["labels"] >= 0).sum())
        found = [a + b for a, b in zip(found, (length, labels, len(batch["pixels"]), pairs), strict=True)]
    return Work(ITERATIONS * STEP_RECORDS, *found)


@pytest.mark.slow
def test_summary_counts_what_was_trained_on(told: Done, two_ranks: Done, counted: Work) -> None:
    for done in (told, two_ranks):
        assert done.summary["samples"] == counted.records == done.summary["records"]["kept"]
        assert done.summary["tokens"] == counted.tokens
        assert done.printed.count("\nsummary\n") == 1


def test_summary_says_how_it_ended_and_what_is_next(told: Done) -> None:
    summary, found = told.summary, losses(told.printed)
    assert (summary["ending"], summary["iteration"], summary["train_iters"]) == ("complete", ITERATIONS, ITERATIONS)
    assert summary["loss"] == pytest.approx(found[ITERATIONS], rel=1e-6)
    validation = re.findall(r"validation loss at .*?lm loss value: ([\d.E+-]+)", told.printed)
    assert summary["validation_loss"] == pytest.approx(float(validation[-1]), rel=1e-6)
    assert summary["checkpoint"] == str(told.output / f"checkpoint/iter_{ITERATIONS:07d}")
    assert any(
        f"tiny {told.output}/checkpoint none {told.output}/hf 1 1 true fp32" in words for words in summary["next"]
    )
    seconds = summary["seconds"]
    assert set(seconds) == {"total", "starting", "training", "evaluating", "saving"} and min(seconds.values()) > 0
    assert 2 * seconds["total"] == pytest.approx(sum(seconds.values()), rel=0.01)


@pytest.mark.slow
def test_a_stopped_run_is_summed_up_too(stopped: Done) -> None:
    summary, last = stopped.summary, max(losses(stopped.printed))
    assert 11 <= last < ITERATIONS
    assert (summary["ending"], summary["iteration"]) == ("stopped before the end", last)
    assert summary["checkpoint"] == str(stopped.output / f"checkpoint/iter_{last:07d}")
    assert summary["samples"] == last * STEP_RECORDS
    assert summary["seconds"]["saving"] > 0
    assert "the same command again" in summary["next"][0]


@pytest.mark.slow
def test_throughput_is_useful_work_by_time(told: Done, two_ranks: Done, counted: Work, workspace: Workspace) -> None:
    flop = step_flop(read_geometry_of(workspace.checkpoint / "llava"), Frozen(), counted) / counted.records
    for done, devices, lines in ((told, 1, ITERATIONS - 1), (two_ranks, 2, ITERATIONS // LOG_INTERVAL)):
        rates = done.summary["throughput"]
        samples, per_device = rates["samples per second"], rates["samples per second and device"]
        assert samples == pytest.approx(devices * per_device)
        # the first step is left out: 1/20 of the records, of other lengths
        assert rates["TFLOP per second and device"] * 1e12 / per_device == pytest.approx(flop, rel=0.02)
        assert rates["tokens per second"] / samples == pytest.approx(counted.tokens / counted.records, rel=0.02)
        assert rates["trained tokens per second"] / samples == pytest.approx(counted.labels / counted.records, rel=0.03)
        found = LINE.findall(done.printed)
        assert len(found) == lines
        assert [line[6] for line in found][-1] == "00:00:00"
        assert all(float(line[0]) == pytest.approx(devices * float(line[1]), abs=0.02) for line in found)
        assert 0.2 < float(found[-1][5]) < 20, "resident memory of a process, GiB"


def test_tensorboard_has_it_all(told: Done) -> None:
    events = EventAccumulator(str(told.output / "tensorboard"), {"images": 0, "tensors": 0}).Reload()
    names = {f"throughput/{name}" for name in told.summary["throughput"]}
    names |= {"memory/peak GiB", "records/kept", "lm loss", "lm loss validation", "grad-norm", "learning-rate"}
    assert names <= set(events.Tags()["scalars"])
    assert len(events.Scalars("throughput/tokens per second")) == ITERATIONS - 1
    assert events.Scalars("lm loss validation")[-1].value == pytest.approx(told.summary["validation_loss"])
    assert "answers/1" in events.Tags()["images"]
    texts = events.Tensors("answers/1/text_summary")
    assert {event.step for event in texts} == {10, 20}
    assert told.answers(20)[0]["reference"] in texts[-1].tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_sample_answers(told: Done, two_ranks: Done, workspace: Workspace) -> None:
    assert sorted(path.name for path in (told.output / "answers").iterdir()) == [
        f"iter_{iteration:07d}.jsonl" for iteration in (10, 20)
    ]
    found = told.answers(20)
    dataset = Dataset(str(workspace.dataset), "val")
    records = [json.loads(dataset[index]["json"]) for index in range(2)]
    assert [answer["record"] for answer in found] == [record["id"] for record in records]
    assert [answer["reference"] for answer in found] == [record["conversations"][1]["value"] for record in records]
    assert told.answers(10) != found, "the model has learnt in between"
    assert two_ranks.answers(20) == found


@pytest.mark.slow
def test_answering_and_tracing_change_nothing(told: Done, stopped: Done) -> None:
    with_answers, without = losses(told.printed), losses(stopped.printed)
    assert max(without) > 10, "no validation lies before the last loss"
    assert {i: with_answers[i] for i in without} == without


def test_trace_of_the_chosen_iterations(told: Done) -> None:
    traces = list((told.output / "profile").iterdir())
    assert [trace.name for trace in traces] == ["rank_000_iterations_3-4.json.gz"]
    with gzip.open(traces[0]) as stream:
        found = [event["name"] for event in json.load(stream)["traceEvents"] if "name" in event]
    assert sum("Optimizer.step" in name for name in found) == 2


def test_bar_only_on_a_terminal(told: Done, two_ranks: Done) -> None:
    assert f"{ITERATIONS}/{ITERATIONS} [" in told.on_terminal and "\x1b[2Ktraining" in told.on_terminal
    assert "\x1b[2K" not in two_ranks.printed and "training:" not in two_ranks.printed


@pytest.mark.skipif(not HAVE_WANDB, reason="the package wandb is not installed")
def test_wandb_offline(told: Done) -> None:
    written = b"".join(path.read_bytes() for path in (told.output / "wandb").rglob("*.wandb"))
    for name in ("throughput/samples per second", "records/kept", "lm loss validation"):
        assert name.encode() in written


@pytest.mark.skipif(HAVE_WANDB, reason="the package wandb is installed")
def test_wandb_without_its_package_is_refused(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="wandb is not installed; run `pip install wandb`, or set WANDB_MODE=disabled"):
        read_config(argv(workspace, wandb_project="llava"))


def test_the_key_is_nowhere(told: Done, workspace: Workspace, tmp_path: Path) -> None:
    everything = [told.printed, told.on_terminal]
    for path in told.output.rglob("*"):
        if path.is_file():
            everything.append(path.read_bytes().decode("latin-1"))
    words, environment = command(workspace, tmp_path / "out", DRY_RUN=1, WANDB_API_KEY=KEY, WANDB_PROJECT="ours")
    dry = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert "--wandb-project\nours\n--wandb-exp-name\nout\n" in dry
    assert not [text for text in (*everything, dry) if KEY in text]


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [{"TP": 2}, {"PP": 2}, {"CP": 2}, {"PP": 2, "VIRTUAL_STAGES": 2}])
def test_every_layout_counts_records_once(parallelism: dict, told: Done, workspace: Workspace, tmp_path: Path) -> None:
    answers = {"SAMPLE_ANSWERS": 2} if parallelism == {"TP": 2} else {}
    done = Done(run(workspace, tmp_path / "out", **SETTINGS, **parallelism, **answers), tmp_path / "out")
    for name in ("samples", "tokens", "records"):
        assert done.summary[name] == told.summary[name]
    assert done.summary["loss"] == pytest.approx(told.summary["loss"], rel=1e-4)
    if answers:
        assert done.answers(10) == told.answers(10)


def test_work_of_a_packed_row_is_that_of_its_records(workspace: Workspace) -> None:
    words = argv(workspace, micro_batch_size="1", num_workers="0")
    settings = read_config([*words, "--packing"])
    loader = build_train_loader(settings.train_dataset_path, settings.data, 0, 1)
    records = pairs = 0
    for _, batch in zip(range(20), loader, strict=False):
        lengths = batch["cu_seqlens"].diff().tolist()
        records += len(lengths)
        pairs += sum(length * (length + 1) // 2 for length in lengths)
    assert records > 20 and (loader.work["records"], loader.work["pairs"]) == (records, pairs)


def test_template_without_ending_ends_at_the_newline(workspace: Workspace) -> None:
    settings = read_config(argv(workspace, conversation_template="plain"))
    plain = Prompts(str(workspace.dataset), settings.data, 1)
    tokenizer = load_tokenizer(settings.data.tokenizer_path)
    newline, red = (tokenizer(text, add_special_tokens=False).input_ids for text in ("\n", "red"))
    assert not plain.reader.is_complete(red) and not plain.reader.is_complete(newline)
    assert plain.reader.is_complete([*red, *newline]) and plain.reader.text([*red, *newline, *red]) == "red"
    mistral = Prompts(str(workspace.dataset), read_config(argv(workspace)).data, 1)
    assert not mistral.reader.is_complete([*red, *newline]) and mistral.reader.is_complete(
        [*red, tokenizer.eos_token_id]
    )


def test_stopwatch_takes_side_jobs_out() -> None:
    watch = Timer()
    assert watch.seconds_left(3) is None
    for slow in (False, True, False, False):
        if slow:
            with watch.side_job("saving"), watch.side_job("evaluating"):
                time.sleep(0.2)
        time.sleep(0.01)
        watch.step_done()
    assert watch.aside.keys() == {"saving"} and watch.aside["saving"] == pytest.approx(0.2, abs=0.05)
    assert watch.training() == pytest.approx(watch.total() - watch.aside["saving"], abs=1e-3)
    assert watch.seconds_left(10) == pytest.approx(0.1, abs=0.05)
    assert as_clock(3725.4) == "01:02:05" and as_clock(360000) == "100:00:00"


def test_no_terminal_no_bar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    for terminal, rank in (("", 0), ("/nonexistent/terminal", 0), ("/dev/null", 1)):
        monkeypatch.setenv("LLAVA_TERMINAL", terminal)
        bar = ProgressBar(10, rank)
        bar.show(1)
        bar.close()
    assert capfd.readouterr() == ("", "")
