"""LoRA: the same as peft on transformers' model, under every layout; checkpoints of what is trained alone.

Tolerances: losses 1e-5 relative and matrices 1e-4 absolute over 50 iterations of AdamW in fp32, ten times and more
what is seen: sums are taken in other orders, and Adam's division magnifies that where gradients are near zero.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_patch.checkpoint_files import fingerprint
from megatron_patch.conversion import convert_to_huggingface
from megatron_patch.conversion.torch_dist import CheckpointReader
from megatron_patch.geometry import read_geometry_of
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.lora import LoraConfig
from tests.package_cache import installed
from tests.training.launching import ROOT, Workspace, command, losses, run, run_and_kill

JUDGE = Path(__file__).parent / "peft_judge.py"
PACKAGES = ("peft==0.21.2", "accelerate==1.15.0", "psutil==7.2.1")
ITERATIONS = 50
LORA = {"LORA_RANK": 4, "LORA_ALPHA": 12}
SETTINGS = {"FREEZE_VISION_TOWER": "true", "TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": ITERATIONS, "LR": "2e-3", **LORA}
LAYOUTS = {
    "one process": {},
    "TP2": {"TP": 2},
    "TP2 + SP": {"TP": 2},
    "PP2": {"PP": 2},
    "CP2": {"CP": 2},
    "DP2 + distributed optimizer": {"NPROC_PER_NODE": 2, "DO": "true"},
    "recompute full": {"AC": "full"},
    "packed": {"PACKING": "true", "BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 4},
}
DEFAULT = ("one process", "TP2 + SP")
TARGETS = r".*language_model\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Judged:
    """What peft has made of the workspace's model and records."""

    folder: Path
    losses: list[float]

    @property
    def begin(self) -> Path:
        return self.folder / "begin"

    def end(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "end/adapter_model.safetensors")


def judge(*words: object) -> None:
    try:
        packages = installed(*PACKAGES)
    except FileNotFoundError as error:
        pytest.skip(f"peft cannot be installed: {error}")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{packages}", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, str(JUDGE), *map(str, words)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def hub(workspace: Workspace) -> Path:
    """The workspace's checkpoint was made of it."""
    return workspace.checkpoint.parent / "hf"


def words_of(workspace: Workspace, output: Path, **changes: object) -> list[str]:
    """Of our trainer's run, as the launcher would start it."""
    line, environment = command(workspace, output, **changes)
    dry = subprocess.run(line, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    words = dry.stdout.splitlines()
    return words[next(i for i, word in enumerate(words) if word.endswith("pretrain_llava.py")) + 1 :]


@pytest.fixture(scope="module")
def judged(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    folder = tmp_path_factory.mktemp("peft")
    config = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "modules_to_save": ["multi_modal_projector"]}
    (folder / "lora.json").write_text(json.dumps(config))
    judge("begin", hub(workspace), folder, folder / "lora.json")
    (folder / "run.json").write_text(json.dumps(words_of(workspace, folder / "out", **SETTINGS)))
    judge("train", hub(workspace), folder, folder / "run.json")
    return Judged(folder, json.loads((folder / "losses.json").read_text()))


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]
)
def test_training_equals_peft(layout: str, workspace: Workspace, judged: Judged, tmp_path: Path) -> None:
    settings = {**SETTINGS, **LAYOUTS[layout], "LORA_ADAPTER": judged.begin}
    printed = run(workspace, tmp_path / "out", **settings)
    found = losses(printed)
    assert sorted(found) == list(range(1, ITERATIONS + 1))
    assert judged.losses[-1] < 0.8 * judged.losses[0], "a run that does not learn proves little"
    worst = max(abs(found[i + 1] / loss - 1) for i, loss in enumerate(judged.losses))
    print(f"{layout}: losses differ by {worst:.1e} at most")
    if layout != "packed":  # whose steps hold other records
        assert worst <= 1e-5
    ours = exported(workspace, tmp_path / "out/checkpoint", tmp_path / "adapter", "peft")
    mine, theirs = load_file(ours / "adapter_model.safetensors"), judged.end()
    assert mine.keys() == theirs.keys()
    if layout != "packed":
        apart = {name: (mine[name] - theirs[name]).abs().max().item() for name in mine}
        print(f"{layout}: matrices differ by {max(apart.values()):.1e} at most")
        assert max(apart.values()) <= 1e-4


def exported(workspace: Workspace, checkpoint: Path, target: Path, layout: str) -> Path:
    convert_to_huggingface(
        checkpoint, target, model_size="tiny", precision="fp32", hf_checkpoint=hub(workspace), layout=layout
    )
    return target
