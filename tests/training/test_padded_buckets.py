"""The distributed optimizer's state where a buffer has several buckets, with padding between them, which megatron-core
saves shifted (patches/padded_buckets.py).  Small buckets here; PP above 1 and a tied embedding: test_any_resolution.py.

Tolerance as in test_resume_parallelism.py.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_patch.conversion.torch_dist import CheckpointReader
from megatron_patch.patches.padded_buckets import places_without_padding
from tests.training.launching import Workspace, losses, run

SETTINGS = {"TRAIN_ITERS": 8, "SAVE_INTERVAL": 4, "DO": "true"}
SMALL_BUCKETS = ["--overlap-grad-reduce", "--ddp-bucket-size", "3000"]


def test_places_follow_each_other() -> None:
    """Two buckets of 200 and 100 elements, padded to 256 and 128; parameters begin at multiples of 64."""
    buckets = [SimpleNamespace(offset=0, numel_unpadded=200), SimpleNamespace(offset=256, numel_unpadded=100)]
    places = {"a": (0, 100, 0), "b": (128, 200, 0), "c": (256, 300, 1), "d": (320, 356, 1)}
    buffer = SimpleNamespace(buckets=buckets, param_index_map=places)
    assert places_without_padding(buffer) == {
        "a": (0, 100, 0),
        "b": (128, 200, 0),
        "c": (200, 244, 1),
        "d": (264, 300, 1),
    }


@pytest.fixture(scope="module")
def whole(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process that is never stopped, with one bucket."""
    return losses(run(workspace, tmp_path_factory.mktemp("whole") / "out", **SETTINGS))


@pytest.fixture
def stopped(workspace: Workspace, tmp_path: Path) -> Path:
    """Output folder of two ranks with small buckets, that ended after the fourth iteration."""
    words = [*SMALL_BUCKETS, "--exit-interval", "4"]
    assert len(losses(run(workspace, tmp_path / "out", words=words, **SETTINGS, NPROC_PER_NODE=2))) == 4
    return tmp_path / "out"


def test_a_run_with_small_buckets_goes_on(workspace: Workspace, whole: dict[int, float], stopped: Path) -> None:
    rest = losses(run(workspace, stopped, **SETTINGS))
    assert sorted(rest) == [5, 6, 7, 8]
    assert max(abs(rest[step] / whole[step] - 1) for step in rest) <= 6.7e-6


@pytest.mark.slow
def test_a_state_that_is_another_weights_is_refused(
    workspace: Workspace, whole: dict[int, float], stopped: Path
) -> None:
    """As earlier versions have saved it: the weights are whole, and a run goes on from them alone."""
    name = "optimizer.state.param.language_model.decoder.final_layernorm.weight"
    with CheckpointReader(stopped / "checkpoint/iter_0000004") as reader:
        (span,) = reader.spans(name, None, 0, reader.tensors[name].size[0])
        file = os.readlink(f"/proc/self/fd/{span.descriptor}")
    with open(file, "r+b") as saved:
        saved.seek(span.position)
        saved.write(bytes(span.nbytes))
    refused = run(workspace, stopped, expected_exit=2, **SETTINGS)
    assert "optimizer state is another weight's" in refused and "LOAD_OPTIM=false" in refused
    assert not losses(refused)
    rest = losses(run(workspace, stopped, **SETTINGS, LOAD_OPTIM="false"))
    assert rest[5] == pytest.approx(whole[5], rel=6.7e-6)
