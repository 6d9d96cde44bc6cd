"""Where a run starts: both formats give the same losses; what is not whole is refused in one sentence."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from tests import tiny_models
from tests.conversion.conftest import tensors_of
from tests.training.launching import Workspace, command, losses, run

ITERATIONS = 2


def run_with(workspace: Workspace, output: Path, words: list[str], expected_exit: int = 0, **changes: object) -> str:
    """A run with Megatron's own words after the 23rd argument; returns what it printed."""
    line, environment = command(workspace, output, TRAIN_ITERS=ITERATIONS, LR_WARMUP_ITERS=1, **changes)
    done = subprocess.run([*line, *words], env=environment, capture_output=True, text=True, timeout=300)
    printed = done.stdout + done.stderr
    assert done.returncode == expected_exit, f"exit {done.returncode}\n{printed[-4000:]}"
    if expected_exit:
        assert printed.count("error: ") == 1, printed[-4000:]
        assert "/megatron/training/" not in printed.partition("error: ")[2]
    return printed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA that the workspace's checkpoint was converted from: same arguments, same bytes."""
    return tiny_models.make_tiny_llava(tmp_path_factory.mktemp("source") / "hf", "mistral")


@pytest.fixture(scope="module")
def distributed(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses from the format torch_dist in one process."""
    printed = run(workspace, tmp_path_factory.mktemp("dist") / "out", TRAIN_ITERS=ITERATIONS, LR_WARMUP_ITERS=1)
    assert "weights: 30 loaded from" in printed and "0 skipped, 0 newly initialised" in printed
    return losses(printed)


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)], ids=["TP2", "PP2", "TP2xPP2"])
def test_rank_files_train_like_torch_dist(tensor, pipeline, workspace, source, distributed, tmp_path):
    """Megatron's own loader of `--ckpt-format torch`; what it saves in that format exports to the source."""
    made = tmp_path / "checkpoint"
    convert_to_megatron(
        source,
        None,
        made,
        model_size="tiny",
        precision="fp32",
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        checkpoint_format="torch",
    )
    names = sorted(path.name for path in (made / "release").iterdir())
    assert names[-1] == f"mp_rank_{tensor - 1:02d}" + (f"_{pipeline - 1:03d}" if pipeline > 1 else "")
    printed = run_with(
        Workspace(made, workspace.dataset),
        tmp_path / "out",
        ["--ckpt-format", "torch"],
        TP=tensor,
        PP=pipeline,
        SAVE_INTERVAL=ITERATIONS,
        LR="1e-30",
        MIN_LR="1e-30",
    )
    assert "load_return" not in printed, "Megatron fell back to a load that is not strict"
    found = losses(printed)
    assert found[1] == pytest.approx(distributed[1], rel=1e-5)

    # With this learning rate nothing moves, so what Megatron saved is the source.
    saved = tmp_path / "out/checkpoint"
    assert sorted(path.name for path in (saved / "iter_0000002").glob("mp_rank_*")) == names
    report = convert_to_huggingface(saved, tmp_path / "hf", model_size="tiny", precision="fp32")
    assert "iter_0000002" in report.notes[0]
    before, after = tensors_of(source), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def test_rank_files_of_another_layout_are_refused(workspace, source, tmp_path):
    made = tmp_path / "checkpoint"
    convert_to_megatron(
        source, None, made, model_size="tiny", precision="fp32", tensor_parallel=2, checkpoint_format="torch"
    )
    printed = run_with(Workspace(made, workspace.dataset), tmp_path / "out", ["--ckpt-format", "torch"], 2)
    assert "TP 2 x PP 1, this run is TP 1 x PP 1" in printed


def edit_metadata(iteration: Path, change) -> None:
    metadata = FileSystemReader(iteration).read_metadata()
    change(metadata)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "case",
    ["missing", *(pytest.param(f"extra state{more}", marks=pytest.mark.slow) for more in ("", " not written"))],
)
def test_weights_are_strict_and_extra_states_are_not(case, workspace, tmp_path):
    made = tmp_path / "checkpoint"
    shutil.copytree(workspace.checkpoint, made)
    like = "vision_projection.encoder.linear_fc2._extra_state/shard_0_1"
    key = {"missing": "vision_projection.encoder.linear_fc2.weight", "extra state not written": like}.get(
        case, "spare.linear._extra_state/shard_0_1"
    )

    def change(metadata):
        if case != "extra state":
            del metadata.state_dict_metadata[key]
        else:
            metadata.state_dict_metadata[key] = metadata.state_dict_metadata[like]

    edit_metadata(made / "release", change)
    printed = run_with(Workspace(made, workspace.dataset), tmp_path / "out", [], 2 * (case == "missing"), TP=2)
    if case == "missing":
        assert f"missing (1): {key}" in printed and "unknown (0)" in printed
        assert not list((tmp_path / "out").rglob("iter_*"))


def test_stage_2_wants_a_trained_projector(workspace, tmp_path):
    made = tmp_path / "checkpoint"
    shutil.copytree(workspace.checkpoint, made)
    provenance = made / "llava/provenance.json"
    value = json.loads(provenance.read_text())
    value["projector"]["origin"] = "new"
    provenance.write_text(json.dumps(value))
    fresh = Workspace(made, workspace.dataset)
    printed = run_with(fresh, tmp_path / "out", [], 2, script="run_sft_mcore_llava.sh")
    assert "has a new projector" in printed and "--allow-fresh-projector" in printed
    run_with(fresh, tmp_path / "stage1", [])
