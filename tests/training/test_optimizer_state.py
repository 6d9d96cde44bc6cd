"""The distributed optimizer's state, of which each rank saves and loads what it owns (patches/own_optimizer_state.py).

Also where a buffer has several buckets with padding between them, which megatron-core saves shifted.  Small buckets
here; PP above 1 and a tied embedding: test_any_resolution.py.  Other layouts: test_resume_parallelism.py.

Tolerance as there.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_patch.conversion.torch_dist import CheckpointReader
from megatron_patch.patches.own_optimizer_state import boxes
from tests.programs import in_warm_process
from tests.training.launching import Workspace, losses, run

SETTINGS = {"TRAIN_ITERS": 8, "SAVE_INTERVAL": 4, "DO": "true"}
SMALL_BUCKETS = ["--overlap-grad-reduce", "--ddp-bucket-size", "3000"]


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_are_the_elements_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for begin in range(whole.numel()):
        for end in range(begin + 1, whole.numel() + 1):
            found = list(boxes(shape, begin, end))
            cut = [whole[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))] for box in found]
            assert torch.cat([part.flatten() for part in cut]).tolist() == list(range(begin, end))
            assert len(found) <= 2 * len(shape) - 1


PARTS = """
from megatron_patch import device
device.install()
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron_patch.patches.own_optimizer_state import parts
# half of a gated MLP: rows 4 to 8 of 8 in the third of three layers; in its parameter it begins at element 12
piece = ShardedTensor.from_rank_offsets("w", torch.zeros(4, 3), (0, 2, 3), (1, 1, 2), prepend_axis_num=1)
for begin in range(30):
    for end in range(begin + 1, 31):
        saved = torch.full((3, 8, 3), -1)
        for part in parts(piece, 12, range(begin, end), torch.arange(begin, end), key="name", replica_id=(0, 0, 0)):
            part.validate_metadata_integrity()
            assert (part.key, part.global_shape, part.dtype) == ("name", (3, 8, 3), torch.int64)
            where = tuple(slice(start, start + size) for start, size in zip(part.global_offset, part.local_shape))
            assert (saved[where] == -1).all()
            saved[where] = part.data
        wanted = torch.full((3, 8, 3), -1)
        inside = range(max(begin, 12), min(end, 24))
        wanted[2, 4:].view(-1)[[number - 12 for number in inside]] = torch.tensor(list(inside), dtype=torch.int64)
        assert torch.equal(saved, wanted), (begin, end)
"""


def test_parts_lie_where_their_parameter_does() -> None:
    in_warm_process(PARTS)


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


def test_each_rank_saves_its_own_and_a_run_goes_on(
    workspace: Workspace, whole: dict[int, float], stopped: Path
) -> None:
    bytes_of: dict[str, int] = {}
    for index, where in FileSystemReader(stopped / "checkpoint/iter_0000004").read_metadata().storage_data.items():
        if index.fqn.startswith("optimizer.state."):
            rank = where.relative_path.split("_")[2]
            bytes_of[rank] = bytes_of.get(rank, 0) + where.length
    assert sorted(bytes_of) == ["0", "1"]
    assert max(bytes_of.values()) < 1.2 * min(bytes_of.values()), bytes_of
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
        span, *_ = reader.spans(name, None, 0, reader.tensors[name].size[0])
        file = os.readlink(f"/proc/self/fd/{span.descriptor}")
    with open(file, "r+b") as saved:
        saved.seek(span.position)
        saved.write(bytes(span.nbytes))
    refused = run(workspace, stopped, expected_exit=2, **SETTINGS)
    assert "optimizer state is another weight's" in refused and "LOAD_OPTIM=false" in refused
    assert not losses(refused)
    rest = losses(run(workspace, stopped, **SETTINGS, LOAD_OPTIM="false"))
    assert rest[5] == pytest.approx(whole[5], rel=6.7e-6)
