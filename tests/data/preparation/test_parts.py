"""A conversion in parts: the bytes of the local one, whatever dies; what does not belong together is refused."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.data.preparation.parts import Part
from megatron_patch.data.preparation.pipeline import Options, PreparationReport, prepare
from megatron_patch.data.preparation.sources import LlavaSource
from megatron_patch.errors import UserError
from megatron_patch.sight import differences, look
from tests.data.factories import make_records
from tests.data.preparation.test_pipeline import CONVERTER, ROOT, files_of
from tests.data.torture import make_torture
from tests.launchers.test_nodes import SLURM, slurm, wait_until  # noqa: F401

ALL = [Part(number, 3) for number in (1, 2, 3)]


def convert(root: Path, output: Path, **changes: object) -> PreparationReport:
    options = Options(**{"ratio": (3, 1, 1), "samples_per_shard": 4, "keep_going": True, "workers": 0} | changes)
    return prepare(LlavaSource(root / "data.json", [root / "images"]), output, options)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The torture folder, and what its conversion gives."""
    root = tmp_path_factory.mktemp("odd")
    make_torture(root)
    convert(root, root / "once")
    return root, files_of(root / "once")


@pytest.fixture
def done(odd, tmp_path) -> Path:
    """Output of three parts that have ended; the source beside it."""
    root = tmp_path / "in"
    shutil.copytree(odd[0], root, ignore=shutil.ignore_patterns("once"))
    for part in ALL:
        convert(root, tmp_path / "wds", part=part)
    return tmp_path / "wds"


def partial(output: Path) -> Path:
    return output.with_name("wds.partial")


def test_each_shard_is_made_by_one_part_and_all_together_are_the_local_ones(odd, tmp_path) -> None:
    root, expected = odd
    made: list[set[str]] = []
    for part in reversed(ALL):
        report = convert(root, tmp_path / "wds", part=part, workers=2)
        assert report.records_in == 100 and report.of_other_parts > 0 < sum(report.written.values())
        found = {path.name for path in partial(tmp_path / "wds").glob("*.tar")}
        made.append(found - set().union(*made))
        assert made[-1] and not (tmp_path / "wds").exists()
    ledger = convert(root, tmp_path / "wds", join=True)
    assert ledger.records_in == 100 and ledger.of_other_parts == 0
    assert files_of(tmp_path / "wds") == expected and max(map(len, made)) - min(map(len, made)) <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["wds"]


def in_process(work: Callable[[], object]) -> int:
    """The number of a process of its own that does the work and ends with 0."""
    process = os.fork()
    if process == 0:
        with contextlib.redirect_stderr(None):
            work()
        os._exit(0)
    return process


@pytest.mark.parametrize("seed", range(2))
def test_parts_at_once_one_of_them_killed_and_repeated(odd, tmp_path, seed: int) -> None:
    root, expected = odd
    generator = random.Random(seed)
    running = {part: in_process(lambda part=part: convert(root, tmp_path / "wds", part=part)) for part in ALL}
    time.sleep(generator.uniform(0.005, 0.06))
    os.kill(running[ALL[seed]], signal.SIGKILL)
    codes = {part: os.waitpid(process, 0)[1] for part, process in running.items()}
    assert {part for part, code in codes.items() if code} <= {ALL[seed]}
    joined = False
    if codes[ALL[seed]]:
        try:
            convert(root, tmp_path / "wds", join=True)
            joined = True  # it was killed after its part had ended
        except UserError as error:
            assert re.search(rf"part {ALL[seed]} has not (begun|ended); give the command of .*--resume", str(error))
    if not joined:
        convert(root, tmp_path / "wds", part=ALL[seed], resume=True)
        convert(root, tmp_path / "wds", join=True)
    assert files_of(tmp_path / "wds") == expected


def test_a_join_that_was_killed_is_repeated(odd, done, monkeypatch) -> None:
    from megatron_patch.data.preparation import pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "reopen", lambda folder: os._exit(9))
        process = in_process(lambda: convert(done.parent / "in", done, join=True))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    (partial(done) / "train-000777.tar.part-0123").write_bytes(b"left behind")
    convert(done.parent / "in", done, join=True)
    assert files_of(done).keys() == odd[1].keys()


def test_finished_shards_of_a_part_are_not_written_again(done) -> None:
    shards = sorted(partial(done).glob("*.tar"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    shards[0].write_bytes(shards[0].read_bytes()[:-512])
    with pytest.raises(UserError, match=rf"{shards[0].name} of part \d/3 is missing or damaged; give the command of"):
        convert(done.parent / "in", done, join=True)
    for part in ALL:
        convert(done.parent / "in", done, part=part, resume=True)
    assert [path for path, time in before.items() if path.stat().st_mtime_ns == time] == shards[1:]
    assert convert(done.parent / "in", done, join=True).records_in == 100


def change_source(done: Path) -> None:
    """A record more, of the same length in bytes as before."""
    file = done.parent / "in/data.json"
    file.write_text(file.read_text().replace("rgb.jpg", "rgb.png"))


def remove(number: int) -> Callable[[Path], None]:
    return lambda done: (partial(done) / f"journal-{number}-of-3.jsonl").unlink()


def cut_end(done: Path) -> None:
    """The last line of part 2 was never written."""
    journal = partial(done) / "journal-2-of-3.jsonl"
    journal.write_text("".join(line + "\n" for line in journal.read_text().splitlines()[:-1]))


@pytest.mark.parametrize(
    ("before", "words", "message"),
    [
        (remove(2), {"join": True}, r"part 2/3 has not begun; give the command of each with --part and --resume"),
        (cut_end, {"join": True}, r"part 2/3 has not ended; give the command of each with --part and --resume"),
        (None, {"join": True, "samples_per_shard": 5}, r"part 1/3: began differently \(samples_per_shard was 4, is"),
        (
            None,
            {"join": True, "ratio": (2, 1)},
            r"part 1/3: began differently \(split was \[3, 1, 1\], is now",
        ),
        (change_source, {"join": True}, r"are not those it was written from; the source has changed"),
        (remove(3), {"part": Part(3, 3), "samples_per_shard": 5}, r"part 1/3: began differently \(samples_per_shard"),
        (None, {"part": Part(3, 3)}, r"part 3/3 was interrupted or is done; give --resume"),
        (None, {"part": Part(3, 4)}, r"was begun in 3 parts, --part 3/4 is of 4; give I/3, or remove it"),
        (None, {"resume": True}, r"holds parts of a conversion \(1/3, 2/3, 3/3\); give --join"),
        (
            lambda done: shutil.rmtree(partial(done)),
            {"join": True},
            r"holds the parts none, wanted 1/N to N/N of",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_and_left(done, before, words, message: str) -> None:
    if before is not None:
        before(done)
    there = files_of(done.parent)
    with pytest.raises(UserError, match=message):
        convert(done.parent / "in", done, **words)
    found = files_of(done.parent)
    found.pop("wds.partial/rejected.jsonl.part", None)  # of a join that got so far; the next one removes it
    assert found == there


def test_parts_and_a_whole_conversion_do_not_share_a_folder(odd, done, monkeypatch) -> None:
    from megatron_patch.data.preparation import pipeline

    root = done.parent / "in"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Preparation, "_fill_train", lambda self: os._exit(9))
        os.waitpid(in_process(lambda: convert(root, done, overwrite=True)), 0)
    assert [path.name for path in partial(done).glob("journal*")] == ["journal.jsonl"]
    with pytest.raises(UserError, match="is a conversion that is not in parts; go on with it without --part"):
        convert(root, done, part=ALL[0], resume=True)
    convert(root, done, resume=True)
    assert files_of(done).keys() == odd[1].keys()


@pytest.mark.parametrize("way", ["the other part", "the join", "the part itself"])
def test_a_machine_without_the_pictures_is_refused(tmp_path, way: str) -> None:
    """An empty folder where the pictures are mounted elsewhere: without a look, all records would be rejected."""
    root = make_records(tmp_path / "in", 60)
    hidden = root / "hidden"
    hidden.mkdir()

    def hide() -> None:
        (root / "images").rename(hidden / "images")
        (root / "images").mkdir()

    def show() -> None:
        (root / "images").rmdir()
        (hidden / "images").rename(root / "images")

    one, two = ({"part": Part(number, 2)} for number in (1, 2))
    if way == "the join":
        hide()
        convert(root, tmp_path / "wds", **one)
        partial(tmp_path / "wds").rename(tmp_path / "aside")  # part 2 begins at the same time and does not see it yet
        show()
        convert(root, tmp_path / "wds", **two)
        for path in (tmp_path / "aside").iterdir():
            path.rename(partial(tmp_path / "wds") / path.name)
        (tmp_path / "aside").rmdir()
        with pytest.raises(UserError, match=r"part 1/2 saw other files .*is here and not there"):
            convert(root, tmp_path / "wds", join=True)
        convert(root, tmp_path / "wds", **one, overwrite=True)
    else:
        convert(root, tmp_path / "wds", **one)
        hide()
        with pytest.raises(UserError, match=r"part 1/2 saw other files .*png is there and not here"):
            convert(root, tmp_path / "wds", **(two if way == "the other part" else one), resume=True)
        show()
        convert(root, tmp_path / "wds", **two)
    convert(root, tmp_path / "wds", join=True)
    convert(root, tmp_path / "once")
    assert files_of(tmp_path / "wds") == files_of(tmp_path / "once")


def test_other_outputs_beside_the_pictures_come_and_go(tmp_path) -> None:
    """Image names may start from a folder that holds outputs, too."""
    root = make_records(tmp_path / "in", 12)
    before = look([root])
    convert(root, root / "other")
    (root / "wds.partial").mkdir()
    (root / "images/more").mkdir()
    assert (
        look([root]) == before == {str(root): str(root / "data.json"), str(root / "images"): before[f"{root}/images"]}
    )
    assert before[f"{root}/images"].startswith(f"{root}/images/") and differences(before, look([root])) == []
    (root / "more").mkdir()
    assert differences(before, look([root])) == [f"{root}/more is here and not there"]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "1/0", "-1/3", "1/3/5", "a/b"])
def test_a_part_is_one_of_n(text: str) -> None:
    with pytest.raises(UserError, match=r"wanted I/N, the I-th of N parts from 1"):
        Part.parse(text)


def test_part_and_join_exclude_each_other() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        Options(part=Part(1, 2), join=True)


# --- The command lines


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    line = list(map(str, words))
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def test_the_commands_of_parts_and_join(tmp_path) -> None:
    root = make_records(tmp_path / "in", 40)
    for number in (1, 2):
        done = run(sys.executable, CONVERTER, root, "--part", f"{number}/2")
        assert done.returncode == 0 and f"part {number}/2: 40 records in = " in done.stdout, done.stderr
        assert "the same command with --join" in done.stdout
        early = run(sys.executable, CONVERTER, root, "--join") if number == 1 else None
        assert early is None or (early.returncode == 2 and "part 2/2 has not begun" in early.stderr)
    done = run(sys.executable, CONVERTER, root, "--join")
    assert done.returncode == 0 and "40 records in = 40 written" in done.stdout, done.stderr
    convert(root, root / "once", ratio=(9, 1, 0), samples_per_shard=1000)
    assert files_of(root / "wds") == files_of(root / "once")
    wrong = run(sys.executable, CONVERTER, root, "--overwrite", "--part", "3/2")
    assert wrong.returncode == 2 and "--part 3/2: wanted I/N" in wrong.stderr
    assert json.loads((root / "wds/ledger.json").read_text())["records_in"] == 40


SBATCH = ROOT / "examples/llava_mcore/convert_data.sbatch"


def test_the_array_script_gives_the_words_of_part_and_join(tmp_path) -> None:
    """As SLURM starts it, but for a converter that prints its words."""
    (tmp_path / "toolkits/multimodal_data_preprocessing").mkdir(parents=True)
    (tmp_path / "toolkits/multimodal_data_preprocessing/show.py").write_text("import sys\nprint(sys.argv[1:])")
    place = {"SLURM_SUBMIT_DIR": str(tmp_path)}
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "16"}
    words = ("show.py", "my data.json", "--output", "out")
    assert run("bash", SBATCH, *words, **place, **array).stdout == f"{[*words[1:], '--part', '3/16', '--resume']}\n"
    again = run("bash", SBATCH, *words, **place, **array | {"SLURM_ARRAY_TASK_MAX": "3"}, PARTS="16")
    assert again.stdout == f"{[*words[1:], '--part', '3/16', '--resume']}\n"
    assert run("bash", SBATCH, *words, **place).stdout == f"{[*words[1:], '--join']}\n"
    wrong = run("bash", SBATCH, "absent.py", **place)
    assert wrong.returncode == 2 and "absent.py: no such file; submit from the folder" in wrong.stderr
    checker = Path(sys.executable).with_name("shellcheck")
    assert run(checker, SBATCH).stdout == ""


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, SLURM)), reason="slurmctld, slurmd and munged are not installed"
)
def test_an_array_of_slurm_one_part_killed_and_repeated(tmp_path, slurm) -> None:  # noqa: F811
    root = make_records(tmp_path / "in", 3000)
    words = ["convert_llava_pretrain_to_wds.py", root, "--samples-per-shard", "5", "--workers", "1"]
    assert run(sys.executable, CONVERTER, *words[1:], "--output", root / "once").returncode == 0

    def submit(*options: str) -> str:
        line = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/log-%j", *options, SBATCH, *words]
        done = subprocess.run(list(map(str, line)), env=slurm, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def states(number: str) -> list[str]:
        return run("squeue", "-h", "-t", "all", "-r", "-o", "%T", "-j", number, **slurm).stdout.split()

    journal = root / "wds.partial/journal-2-of-3.jsonl"
    parts = submit("--array=1-3")
    wait_until(lambda: journal.is_file() and journal.read_text().count("\n") > 5, tmp_path / "log")
    run("scancel", "--full", "--signal=KILL", f"{parts}_2", **slurm)
    wait_until(lambda: not {"PENDING", "RUNNING", "COMPLETING"} & set(states(parts)), tmp_path / "log")
    assert sorted(states(parts)) == ["CANCELLED", "COMPLETED", "COMPLETED"] and '"end"' not in journal.read_text()
    early = submit()
    wait_until(lambda: states(early) == ["FAILED"], tmp_path / "log")
    assert "part 2/3 has not ended" in (tmp_path / f"log-{early}").read_text() and not (root / "wds").exists()
    again = submit("--array=2", "--export=ALL,PARTS=3")
    join = submit(f"--dependency=afterok:{again}")
    wait_until(lambda: states(join) == ["COMPLETED"], tmp_path / f"log-{join}")
    assert files_of(root / "wds") == files_of(root / "once")
