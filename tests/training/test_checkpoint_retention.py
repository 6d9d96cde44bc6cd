"""Which checkpoints stay, and that what a kill or a full disk leaves is never taken for one."""

import io
import json
import random
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from megatron_patch.checkpoint_files import TRACKER, newest_iteration
from megatron_patch.conversion import convert_to_huggingface
from megatron_patch.training import checkpoint_retention
from tests.training.launching import Workspace, command, run
from tests.training.stored_checkpoint import assert_same_run

KILLS = 10
END_OF_ARCHIVE = b"PK\x05\x06"  # 22 bytes, the last of a zip file without a comment, as torch writes them


def make(folder: Path, iteration: int, whole: bool = True) -> None:
    for parent in (folder, folder / "data"):
        (parent / checkpoint_retention.folder_name(iteration)).mkdir(parents=True)
    if whole:
        (folder / checkpoint_retention.folder_name(iteration) / ".metadata").touch()
        (folder / TRACKER).write_text(str(iteration))


def names(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("iter_*"))


def test_the_last_the_best_and_the_unfinished_stay(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        make(tmp_path, iteration)
    make(tmp_path, 50, whole=False)  # being written
    assert checkpoint_retention.prune(tmp_path, 0, set()) == []
    assert checkpoint_retention.prune(tmp_path, 2, {10}) == [20]
    assert names(tmp_path) == names(tmp_path / "data") == [10, 30, 40, 50]
    assert checkpoint_retention.prune(tmp_path, 1, set()) == [10, 30]
    (tmp_path / TRACKER).write_text("release")
    assert checkpoint_retention.prune(tmp_path, 1, set()) == []


def test_leftovers_go_and_whole_ones_never(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 30)
    (tmp_path / TRACKER).write_text("10")  # set back by hand: iteration 30 is whole
    make(tmp_path, 20, whole=False)
    (tmp_path / f"{checkpoint_retention.DELETED}iter_0000005").mkdir()
    assert checkpoint_retention.tidy(tmp_path) == ["iter_0000020"]
    assert names(tmp_path) == [10, 30] and not list(tmp_path.glob("deleted_*"))


def test_best_refers_to_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "llava").mkdir()
    for iteration, loss in ((10, 2.0), (20, 1.5)):
        make(tmp_path, iteration)
        checkpoint_retention.record_best(tmp_path, iteration, loss)
        assert newest_iteration(tmp_path / "best") == tmp_path / "best" / checkpoint_retention.folder_name(iteration)
    assert checkpoint_retention.read_best(tmp_path) == (20, 1.5) and names(tmp_path / "best") == [20]
    shutil.copytree(tmp_path, tmp_path / "moved", symlinks=True)
    assert newest_iteration(tmp_path / "moved/best").resolve() == tmp_path / "moved/iter_0000020"


def test_last_and_best_of_a_run_and_export_of_the_best(workspace: Workspace, tmp_path: Path) -> None:
    """LR so high that validation soon gets worse: the best, at an iteration where no save is due, is kept."""
    words = {
        "LR": 0.01,
        "MIN_LR": 0.01,
        "TRAIN_ITERS": 12,
        "SAVE_INTERVAL": 3,
        "EVAL_INTERVAL": 2,
        "LR_WARMUP_ITERS": 11,
    }
    run(workspace, tmp_path / "out", KEEP_LAST=2, KEEP_BEST="true", **words)
    folder = tmp_path / "out/checkpoint"
    best = json.loads((folder / "best.json").read_text())
    assert set(names(folder)) == {9, 12, best["iteration"]} or set(names(folder)) == {10, 12, best["iteration"]}
    assert names(folder / "data") == names(folder)
    convert_to_huggingface(
        folder / "best",
        tmp_path / "exported",
        model_size="tiny",
        precision="fp32",
        hf_checkpoint=workspace.dataset.parents[1] / "hf",
    )
    assert (tmp_path / "exported/model.safetensors").is_file()
    saved = (folder / "iter_0000012/__0_0.distcp").read_bytes()
    first = saved[: saved.index(END_OF_ARCHIVE) + 22]
    assert zipfile.ZipFile(io.BytesIO(first)).testzip() is not None, "time was spent on checksums that nobody reads"


SMALL_DISK = """
mount -t tmpfs -o size=6m none "$OUT/checkpoint" || exit 77
"$@"; echo "first exit $?"; cat "$OUT/checkpoint/latest_checkpointed_iteration.txt"; echo " is tracked"
mount -o remount,size=60m "$OUT/checkpoint"
"$@"; echo "second exit $?"
cp -r "$OUT/checkpoint" "$OUT/copied"
"""


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(workspace: Workspace, tmp_path: Path) -> None:
    """A disk with room for one checkpoint; with more of it the same command goes on."""
    output = tmp_path / "out"
    (output / "checkpoint").mkdir(parents=True)
    words, environment = command(workspace, output, TRAIN_ITERS=4, SAVE_INTERVAL=2, EVAL_ITERS=0, LR_WARMUP_ITERS=1)
    line = ["unshare", "-rm", "bash", "-c", SMALL_DISK, "bash", *words]
    done = subprocess.run(line, env={**environment, "OUT": str(output)}, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr[:20]:
        pytest.skip(f"needs a file system of its own: {done.stderr}")
    assert "first exit 0" not in done.stdout and "2 is tracked" in done.stdout, done.stderr[-3000:]
    sentence = "is full, so the checkpoint of iteration 4 was not written; that of iteration 2 is kept"
    assert sentence in done.stderr, done.stderr[-3000:]
    assert "second exit 0" in done.stdout and "removed iter_0000004" in done.stdout
    assert (output / "copied" / TRACKER).read_text() == "4"


@pytest.mark.slow
def test_killed_ten_times_the_weights_are_the_same(workspace: Workspace, tmp_path: Path) -> None:
    """SIGKILL of everything at random moments, every other time while a checkpoint is being written."""
    steps = {"TRAIN_ITERS": 160, "SAVE_INTERVAL": 3, "EVAL_ITERS": 0, "KEEP_LAST": 3}
    run(workspace, tmp_path / "whole", **steps)
    words, environment = command(workspace, tmp_path / "killed", **steps)
    generator, folder = random.Random(11), tmp_path / "killed/checkpoint"
    during_saves = 0
    for kill in range(KILLS):
        before = checkpoint_retention.tracked(folder) or 0
        with (tmp_path / f"printed{kill}").open("w") as stream:
            process = subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            wanted = before + 3 * generator.randint(1, 4)
            while (checkpoint_retention.tracked(folder) or 0) < wanted:
                assert process.poll() is None, (tmp_path / f"printed{kill}").read_text()[-3000:]
                time.sleep(0.005)
            if kill % 2:
                while not unfinished(folder):
                    time.sleep(0.0005)
            else:
                time.sleep(generator.random() * 0.3)
            # processes.py, its processes and theirs, all by the path in their words
            subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "killed")], check=True)
            process.wait()
        during_saves += bool(unfinished(folder))
    run(workspace, tmp_path / "killed", **steps)
    assert during_saves >= 2, "no kill met a save"
    assert_same_run(tmp_path / "killed", tmp_path / "whole", 160)


def unfinished(folder: Path) -> list[int]:
    """Iterations beyond the tracker's: being written."""
    return [iteration for iteration in names(folder) if iteration > (checkpoint_retention.tracked(folder) or 0)]
