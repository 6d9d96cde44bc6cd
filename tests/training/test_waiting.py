"""Steps that wait for data are told of, with the share of the time that was lost."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_patch.data.loading import build_train_loader
from megatron_patch.step_flop import Work
from megatron_patch.training.config import read_config
from megatron_patch.training.record_counters import Totals, waiting_sentence, waiting_share
from tests.training.conftest import write_dataset
from tests.training.launching import ROOT, Workspace, run
from tests.training.test_config import argv

TOLD = re.compile(r"^ waiting for data: (\d+)% of the time, .*raise NUM_WORKERS \((\d+)\)", re.MULTILINE)


def totals(*waited_s: float) -> Totals:
    return Totals({}, Work(), 0, waited_s)


def test_the_share_is_that_of_the_rank_that_waited_most() -> None:
    assert waiting_share(totals(3.0, 11.0, 20.0), totals(1.0, 10.0, 19.5), 8.0) == 0.25
    assert waiting_share(totals(0.0, 0.0), totals(0.0, 0.0), 8.0) == 0


def test_a_small_share_is_not_told() -> None:
    assert waiting_sentence(0.099, 2) is None
    assert TOLD.search(waiting_sentence(0.104, 4)).groups() == ("10", "4")


def test_time_without_a_batch_is_counted_and_no_other(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_config(argv(workspace, micro_batch_size="1", num_workers="0"))
    loader = build_train_loader(settings.train_dataset_path, settings.data, 0, 1)
    assert loader.waited_s == 0
    dataset = type(loader._batches.dataset)
    read = dataset.__getitem__
    monkeypatch.setattr(dataset, "__getitem__", lambda self, index: (time.sleep(0.1), read(self, index))[1])
    began = time.perf_counter()
    for _ in range(3):
        next(loader)
    waited, passed = loader.waited_s, time.perf_counter() - began
    assert 0.3 <= waited <= passed
    time.sleep(0.2)
    assert loader.waited_s == waited


@pytest.mark.slow
def test_a_run_whose_images_are_large_says_so_once_an_interval(workspace: Workspace, tmp_path: Path) -> None:
    write_dataset(tmp_path / "records", 24)
    for image in (tmp_path / "records/images").iterdir():
        Image.new("RGB", (4000, 4000), (90, 30, 160)).save(image)
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    words = [sys.executable, str(converter), str(tmp_path / "records"), "--split", "1,0,0"]
    subprocess.run(words, check=True, capture_output=True)
    hungry = Workspace(workspace.checkpoint, tmp_path / "records/wds")
    changes = {"VALID_DATASET_PATH": workspace.dataset, "EVAL_ITERS": 0, "TRAIN_ITERS": 6, "LOG_INTERVAL": 2}
    printed = run(hungry, tmp_path / "out", **changes)
    shares = [int(share) for share, _ in TOLD.findall(printed)]
    assert len(shares) == printed.count("samples/s: ") == 3
    assert all(50 <= share <= 100 for share in shares), shares
    events = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload().Scalars("data/waiting share")
    assert [round(100 * event.value) for event in events] == shares
