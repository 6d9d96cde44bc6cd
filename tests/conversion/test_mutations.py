"""Everything that can go wrong ends in a sentence and leaves the target absent or whole.

Names, shapes and cut-off sources are in test_refusals.py, wrong values in test_verify.py; here are checkpoints that
are not what they seem, full disks, kills at any moment, and two conversions into one target.
"""

import ctypes
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.checkpoint_files import RANK_FILE, read_metadata
from megatron_patch.conversion import convert as room
from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.errors import UserError
from tests.conversion.conftest import tensors_of

FORK = multiprocessing.get_context("fork")
SIZES = {"model_size": "tiny", "precision": "fp32"}
FC2 = "language_model.decoder.layers.mlp.linear_fc2.weight"


def equal(one: Path, other: Path) -> bool:
    before, after = tensors_of(one), tensors_of(other)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def edit_metadata(checkpoint: Path, change) -> None:
    metadata = read_metadata(checkpoint / "release")
    change(metadata.state_dict_metadata)
    (checkpoint / "release/.metadata").write_bytes(pickle.dumps(metadata))


def edit_rank(checkpoint: Path, change) -> None:
    path = checkpoint / "release/mp_rank_01_000" / RANK_FILE
    state = torch.load(path, weights_only=True)
    change(state["model"])
    torch.save(state, path)


LAYER = "language_model.decoder.layers.1.mlp.linear_fc2.weight"  # of the first of two stages
CHECKPOINTS = {
    "a weight less": ("torch_dist", lambda c: edit_metadata(c, lambda m: m.pop(FC2)), [f"missing (1): {FC2}"]),
    "a weight more": (
        "torch_dist",
        lambda c: edit_metadata(c, lambda m: m.update({"language_model.adapter.weight": m[FC2]})),
        ["unknown (1): language_model.adapter.weight"],
    ),
    "a chunk less": (
        "torch_dist",
        lambda c: edit_metadata(c, lambda m: m[FC2].chunks.pop()),
        [FC2, "is incomplete"],
    ),
    "a rank less": (
        "torch",
        lambda c: shutil.rmtree(c / "release/mp_rank_01_001"),
        ["is not whole", "TP 2 x PP 2", "mp_rank_01_001 are missing"],
    ),
    "a rank's file cut off": (
        "torch",
        lambda c: os.truncate(c / "release/mp_rank_01_000" / RANK_FILE, 20000),
        ["mp_rank_01_000", "is no whole file"],
    ),
    "a rank's layer less": (
        "torch",
        lambda c: edit_rank(c, lambda model: model.pop(LAYER)),
        ["is not whole", f"stage 0 lacks {LAYER}"],
    ),
    "a rank's weight more": (
        "torch",
        lambda c: edit_rank(c, lambda model: model.update({"vision_model.adapter": torch.ones(2)})),
        ["unknown (1): vision_model.adapter"],
    ),
    "a rank's part of another size": (
        "torch",
        lambda c: edit_rank(c, lambda model: model.update({LAYER: model[LAYER][:, :10].clone()})),
        ["the ranks hold", LAYER, "different shapes"],
    ),
    "folders of two layouts": (
        "torch",
        lambda c: shutil.copytree(c / "release/mp_rank_00_000", c / "release/mp_rank_00"),
        ["mixes mp_rank_XX and mp_rank_XX_YYY"],
    ),
}


@pytest.fixture(scope="module")
def checkpoints(hub, tmp_path_factory):
    """One checkpoint of each format, TP 2 x PP 2."""
    root = tmp_path_factory.mktemp("checkpoints")
    for form in ("torch_dist", "torch"):
        layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "checkpoint_format": form}
        convert_to_megatron(hub("llava_mistral"), None, root / form, **SIZES, **layout)
    return root


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_are_not_what_they_seem(case, checkpoints, tmp_path):
    form, change, texts = CHECKPOINTS[case]
    changed = Path(shutil.copytree(checkpoints / form, tmp_path / "c"))
    change(changed)
    with pytest.raises(UserError) as caught:
        convert_to_huggingface(changed, tmp_path / "out/hf", **SIZES)
    for text in texts:
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rank_files_run_no_code(checkpoints, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'ran'}'",)

    changed = Path(shutil.copytree(checkpoints / "torch", tmp_path / "c"))
    path = changed / "release/mp_rank_01_000" / RANK_FILE
    state = torch.load(path, weights_only=True)
    torch.save(state | {"args": Evil()}, path)
    convert_to_huggingface(changed, tmp_path / "hf", **SIZES)  # the trainer's arguments lie there too: not looked at
    assert not (tmp_path / "ran").exists()


def test_padding_in_the_source_is_not_taken_for_tokens(hub, tmp_path):
    """An embedding with Megatron's padding left on: more rows than its config says."""
    llm = Path(shutil.copytree(hub("llama"), tmp_path / "llm"))
    weights = load_file(str(llm / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(64, weights[name].shape[1])])
    save_file(weights, str(llm / "model.safetensors"))
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[384, 64\], the config says \[320, 64\]"):
        convert_to_megatron(llm, hub("clip"), tmp_path / "out/c", **SIZES)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- full disks


def mount_small_disk(folder: Path) -> None:
    """A tmpfs of 600 kB on a folder, seen by this process alone (new user and mount namespaces)."""
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=600k"):
        raise OSError(ctypes.get_errno(), "mount")


def fill_in_child(source: Path, disk: Path, form: str, back: bool, report: Path) -> None:
    """What was said, then the names left on the disk, into `report`."""
    torch.set_num_threads(1)
    try:
        mount_small_disk(disk)
    except OSError as error:
        report.write_text(f"no disk: {error}")
        os._exit(0)
    room.check_disk = lambda *_: None  # someone else fills the disk after the look at it
    try:
        if back:
            convert_to_huggingface(source, disk / "out", **SIZES)
        else:
            convert_to_megatron(source, None, disk / "out", **SIZES, checkpoint_format=form, tensor_parallel=2)
        said = "nothing"
    except UserError as error:
        said = str(error)
    report.write_text(f"{said}\n{os.listdir(disk)}")
    os._exit(0)


@pytest.mark.parametrize("direction", ["torch_dist", "torch", "back"])
def test_a_disk_that_fills_up(direction, hub, checkpoints, tmp_path):
    """ENOSPC in the middle of writing, in every format and direction; what was staged is gone."""
    back, disk, report = direction == "back", tmp_path / "disk", tmp_path / "report"
    disk.mkdir()
    source = checkpoints / "torch_dist" if back else hub("llava_mistral")
    child = FORK.Process(target=fill_in_child, args=(source, disk, direction, back, report))
    child.start()
    child.join()
    said, _, left = report.read_text().rpartition("\n")
    if not said:
        pytest.skip(f"needs a file system of its own: {left}")
    assert "No space left on device" in said and "nothing was left behind" in said
    assert left == "[]"


# ---------------------------------------------------------------- kills and races


def convert_in_child(source: Path, target: Path, form: str, back: bool, ready=None) -> None:
    """Exit code 0, or 2 for a refusal."""
    torch.set_num_threads(1)
    if ready is not None:
        ready.wait()
    try:
        if back:
            convert_to_huggingface(source, target, **SIZES)
        else:
            convert_to_megatron(source, None, target, **SIZES, checkpoint_format=form)
    except UserError:
        os._exit(2)
    os._exit(0)


@pytest.mark.parametrize("direction", ["torch_dist", "torch", "back"])
def test_killed_at_any_moment(direction, hub, checkpoints, tmp_path):
    """SIGKILL at moments spread over a conversion: the target is absent, or whole and equal to the source."""
    source = checkpoints / "torch_dist" if direction == "back" else hub("llava_mistral")

    def start(target: Path):
        child = FORK.Process(target=convert_in_child, args=(source, target, direction, direction == "back"))
        child.start()
        return child

    began = time.monotonic()
    start(tmp_path / "whole").join()
    seconds = time.monotonic() - began
    absent = 0
    generator = random.Random(1)
    for number in range(8):
        target = tmp_path / f"target{number}"
        child = start(target)
        time.sleep(generator.random() * seconds * 1.1)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        if not target.exists():
            absent += 1
            left = list(tmp_path.glob(f"{target.name}*"))
            assert all(path.name == f"{target.name}.tmp-{child.pid}" for path in left), left
            continue
        exported = target
        if direction != "back":
            exported = tmp_path / f"hf{number}"
            convert_to_huggingface(target, exported, **SIZES)
        assert equal(exported, hub("llava_mistral"))
    assert absent >= 2, "no kill came in time"


def test_two_conversions_into_one_target(hub, tmp_path):
    """One wins, the other is refused in a sentence; the target is whole and nothing else is left."""
    target = tmp_path / "out/c"
    ready = FORK.Barrier(2)
    children = [
        FORK.Process(target=convert_in_child, args=(hub("llava_mistral"), target, form, False, ready))
        for form in ("torch_dist", "torch")
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sorted(child.exitcode for child in children) == [0, 2]
    assert [path.name for path in target.parent.iterdir()] == ["c"]
    convert_to_huggingface(target, tmp_path / "hf", **SIZES)
    assert equal(tmp_path / "hf", hub("llava_mistral"))
