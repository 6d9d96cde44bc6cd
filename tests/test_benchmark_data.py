"""The benchmarks of the data path: what they conclude, what they refuse, and that they measure what training uses."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "toolkits/benchmark"


@pytest.fixture(scope="module")
def loading() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_loading", FOLDER / "benchmark_loading.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_workers_that_a_step_needs(loading: ModuleType) -> None:
    """A worker delivers 40, 20, 10 records a second, 20 in the middle; a quarter more than the average."""
    rates = [loading.Rate("disk", workers, 10.0, 400, 0, 0, 1.0) for workers in (1, 2, 4)]
    assert loading.workers_needed(rates, step_records=32, step_seconds=1.0) == 2
    assert loading.workers_needed(rates, step_records=33, step_seconds=1.0) == 3
    assert loading.Rate("store", 4, 10.0, 400, 1200, 8000, 24.0).row() == "| store | 4 | 120 | 30 | 800 | 200 | 50 |"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "x"], "--dataset and --checkpoint go together"),
        (["--step-records", "8"], "--step-seconds"),
        (
            ["--dataset", "s3://b", "--checkpoint", "x", "--store-latency-ms", "30"],
            "wants a folder on a disk as --dataset",
        ),
    ],
)
def test_half_of_a_pair_is_refused(
    loading: ModuleType, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_loading.py", *words])
    monkeypatch.setattr(loading, "write_photos", lambda *_: pytest.fail("something was made"))
    assert loading.main() == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_loader_is_measured(tmp_path: Path) -> None:
    """From disk, and from a store that answers late: without a worker each batch waits for it."""
    words = ["--images", "24", "--seconds", "1", "--workers", "0", "1", "--step-records", "8", "--step-seconds", "2"]
    words += ["--store-latency-ms", "400"]
    command = [sys.executable, FOLDER / "benchmark_loading.py", *words, "--work", tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:2] for row in found] == [[source, workers] for workers in "01" for source in ("disk", "store")]
    for row in found:
        images, each, tokens = map(int, row[2:5])
        assert images == each and tokens > 0
        assert images == pytest.approx(tokens / (576 + 40), abs=1)
    assert int(found[1][2]) <= 4 / 0.4 < int(found[0][2]), "the store answers at once"
    assert "8 records in 2 s from disk: NUM_WORKERS=" in printed


@pytest.mark.slow
def test_the_order_is_measured_and_rows_that_are_not_packed_are_extrapolated(tmp_path: Path) -> None:
    words = ["--records", "2e4", "1e5", "--pack", "2e4", "--whole-epoch", "2e4", "--work", tmp_path]
    done = subprocess.run([sys.executable, FOLDER / "benchmark_order.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "e" in line][1:]
    kinds = [["2e4", kind] for kind in ("folder", "cyclic", "packed", "modality", "modality_window")]
    kinds += [["1e5", kind] for kind in ("folder", "cyclic", "packed", "modality_window")]
    assert [row[:2] for row in rows] == kinds
    assert all(int(row[2]) < 60 and float(row[3]) < 5 for row in rows)
    assert all(float(cell) < 5 for kind in (1, 2, 3, 4, 6, 7, 8) for cell in rows[kind][4:6])
    assert float(rows[2][9]) > 0 and rows[7][9].startswith("about ")
    assert not list(tmp_path.iterdir())
