"""Training from object storage: the losses of the same run from a disk, to the last printed digit, whatever the network
does; a run moves between the two; nobody reads a credential in a log.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.object_store import KEY, SECRET, Store
from tests.training.launching import ROOT, Workspace, command, losses, run, run_and_kill

URL = "msc://store/pretrain/wds"
TOOL = ROOT / "toolkits/multimodal_data_preprocessing/cache_tower_features.py"
OUTAGE_S = 60.0
LIMIT_S = 1200.0


@pytest.fixture(scope="module")
def store(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The workspace's dataset, stored."""
    store = Store(tmp_path_factory.mktemp("store"))
    store.put(workspace.dataset, "pretrain/wds")
    yield store
    store.close()


@pytest.fixture(autouse=True)
def environment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def stored(workspace: Workspace) -> Workspace:
    return Workspace(workspace.checkpoint, URL)


def assert_no_credentials(*places: Path) -> None:
    """In none of the files below."""
    for file in (file for place in places for file in [place, *place.rglob("*")] if file.is_file()):
        data = file.read_bytes()
        assert KEY.encode() not in data and SECRET.encode() not in data, file


def run_with(workspace: Workspace, output: Path, events: dict[int, Callable[[], None]], **changes: object) -> str:
    """Run to the end; when an iteration has been printed, do what belongs to it.  Returns what was printed."""
    words, environment = command(workspace, output, **changes)
    printed = output.parent / f"{output.name}.printed"
    with printed.open("w") as stream:
        process = subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        end = time.monotonic() + LIMIT_S
        while process.poll() is None:
            assert time.monotonic() < end, printed.read_text()[-4000:]
            reached = max(losses(printed.read_text()), default=0)
            for iteration in [known for known in events if known <= reached]:
                events.pop(iteration)()
            time.sleep(0.02)
    assert process.returncode == 0, printed.read_text()[-4000:]
    assert not events, f"the run was over before {events}"
    return printed.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_losses_of_a_run_from_disk_whatever_the_network_does(
    workers: int, workspace: Workspace, stored: Workspace, store: Store, tmp_path: Path
) -> None:
    settings = {"TRAIN_ITERS": 60, "NUM_WORKERS": workers, "EVAL_INTERVAL": 30}
    wanted = losses(run(workspace, tmp_path / "disk", **settings))
    faults, times, struck = store.faults, {}, []

    def outage() -> None:
        store.proxy.down()
        times["outage"] = time.monotonic()
        threading.Timer(OUTAGE_S, store.proxy.up).start()

    def refuse_half() -> None:
        assert time.monotonic() - times["outage"] > OUTAGE_S, "steps were made without data"
        faults.answer, faults.every = b"503 Service Unavailable", 2

    def cut_bodies() -> None:
        struck.append(faults.struck)
        faults.answer, faults.cut_after, faults.every = b"", 700, 3

    def restart() -> None:
        struck.append(faults.struck)
        faults.cut_after, faults.every = 0, 1
        store.proxy.down()
        store.kill()
        store.start()
        store.put(workspace.dataset, "pretrain/wds")  # moto keeps all in memory
        store.proxy.up()

    events = {5: outage, 20: refuse_half, 30: cut_bodies, 40: restart}
    printed = run_with(stored, tmp_path / "stored", events, CHECK="true", **settings)
    assert losses(printed) == wanted and len(wanted) == 60
    assert 0 < struck[0] < struck[1], "no fault met a request"
    assert "asking again for up to 1200 s" in printed and "kept 480 | truncated 0 | skipped 0" in printed
    assert_no_credentials(tmp_path)


@pytest.mark.slow
def test_a_run_is_killed_and_goes_on_from_disk_and_back(
    workspace: Workspace, stored: Workspace, tmp_path: Path
) -> None:
    settings = {"TRAIN_ITERS": 40, "SAVE_INTERVAL": 5, "NUM_WORKERS": 2}
    wanted = losses(run(workspace, tmp_path / "whole", **settings))
    output = tmp_path / "moved"
    found = run_and_kill(stored, output, at_iteration=8, **settings)
    on_disk = run_and_kill(workspace, output, at_iteration=20, **settings)
    back = losses(run(stored, output, **settings))
    assert min(found) == 1 and min(on_disk) > 5 and min(back) > 15, "no run went on from a checkpoint"
    assert found | on_disk | back == wanted
    assert all(part[i] == wanted[i] for part in (found, on_disk, back) for i in part)
    assert_no_credentials(tmp_path)


@pytest.mark.parametrize(
    ("path", "answer", "told"),
    [
        (URL, b"403 AccessDenied", "must be readable (msc://store/pretrain/wds/.nv-meta/split.yaml: access is denied"),
        ("msc://absent/pretrain/wds", b"", "must be readable (msc://absent/pretrain/wds: MSC has no profile 'absent'"),
        pytest.param(
            "s3://absent/pretrain/wds",
            b"",
            "must be readable (s3://absent/pretrain/wds/.nv-meta/split.yaml: there is no such bucket)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "msc://store/pretrain",
            b"",
            "must be an energon dataset (it has no .nv-meta/split.yaml)",
            marks=pytest.mark.slow,
        ),
        ("s3://key:hidden@bucket/wds", b"", "credentials are no part of the URL"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_starts(
    path: str, answer: bytes, told: str, workspace: Workspace, store: Store, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with store.fault(answer=answer):
        printed = run(
            workspace, output, expected_exit=2, DATASET_PATH=path, VALID_DATASET_PATH=workspace.dataset, CHECK="false"
        )
    assert printed.startswith("error: 1 wrong or missing; nothing was started or written\n  argument 18 DATASET_PATH=")
    assert told in printed and printed.count("\n") == 3, printed
    assert not output.exists()
    assert KEY not in printed and SECRET not in printed and "hidden" not in printed


def test_checkpoints_are_not_kept_in_object_storage(workspace: Workspace, tmp_path: Path, monkeypatch) -> None:
    """A path would be made of the URL, beside whoever starts the run."""
    monkeypatch.chdir(tmp_path)
    printed = run(workspace, "msc://store/output", expected_exit=2)
    assert "OUTPUT_BASEPATH='msc://store/output' must be a folder to write into" in printed
    assert "it is in object storage: only data is read from there" in printed
    assert not list(tmp_path.iterdir())


def test_a_split_that_is_absent_is_refused(stored: Workspace, store: Store, tmp_path: Path) -> None:
    split = "pretrain/wds/.nv-meta/split.yaml"
    text = store.get(split)
    store.client.put_object(Bucket=store.bucket, Key=split, Body=text.replace(b"  val:", b"  validation:"))
    try:
        printed = run(stored, tmp_path / "out", expected_exit=2)
    finally:
        store.client.put_object(Bucket=store.bucket, Key=split, Body=text)
    assert "VALID_DATASET_PATH='msc://store/pretrain/wds' must have the split val" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_features_are_cached_from_a_store(workspace: Workspace, tmp_path: Path) -> None:
    """The bytes of those of the folder on a disk."""

    def cache(dataset: object, *words: object) -> subprocess.CompletedProcess:
        line = [sys.executable, TOOL, dataset, "--checkpoint", workspace.checkpoint, "--precision", "fp32", *words]
        return subprocess.run(list(map(str, line)), capture_output=True, text=True)

    refused = cache(URL)
    assert refused.returncode == 2 and "is in object storage; say with --output where the features go" in refused.stderr
    files = []
    for dataset, output in ((workspace.dataset, tmp_path / "local"), (URL, tmp_path / "stored")):
        done = cache(dataset, "--output", output)
        assert done.returncode == 0, done.stderr
        files.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert files[0] == files[1] and len(files[0]) > 3
    assert_no_credentials(tmp_path)
