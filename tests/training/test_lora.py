"""LoRA: the same as peft on transformers' model, under every layout; checkpoints of what is trained alone.

Tolerances: losses 3e-5 relative and matrices 1e-4 absolute over 50 iterations of AdamW in fp32, three times and more
what is seen (1e-8 in the first iteration, 1e-5 in the 21st): sums are taken in other orders, and Adam's division
magnifies that where gradients are near zero.
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

from megatron_patch.checkpoint_files import NOT_WEIGHTS, fingerprint
from megatron_patch.conversion import convert_to_huggingface
from megatron_patch.conversion.torch_dist import CheckpointReader
from megatron_patch.errors import UserError
from megatron_patch.geometry import read_geometry_of
from megatron_patch.lora import LoraConfig
from megatron_patch.step_flop import Frozen
from megatron_patch.training.adapters import lora_of
from megatron_patch.training.config import frozen_parts, parse_own_arguments, read_config
from tests.package_cache import installed
from tests.training.launching import ROOT, Workspace, command, losses, run, run_and_kill
from tests.training.stored_checkpoint import assert_same_run
from tests.warm import interpreter

JUDGE = Path(__file__).parent / "peft_judge.py"
PACKAGES = ("peft==0.21.2", "accelerate==1.15.0", "psutil==7.2.1")
ITERATIONS = 50
LORA = {"LORA_RANK": 4, "LORA_ALPHA": 12}
SETTINGS = {"FREEZE_VISION_TOWER": "true", "TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": ITERATIONS, "LR": "2e-3", **LORA}
LAYOUTS = {
    "one process": {},
    "TP2 + SP": {"TP": 2},
    "PP2": {"PP": 2},
    "CP2": {"CP": 2},
    "DP2 + distributed optimizer": {"NPROC_PER_NODE": 2, "DO": "true"},
    "FSDP": {"NPROC_PER_NODE": 2, "FSDP": "full"},
    "recompute full": {"AC": "full"},
    "packed": {"PACKING": "true", "BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 4},
}
TARGETS = r".*language_model\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Judged:
    """What peft has made of the workspace's model and records."""

    losses: list[float]
    end: dict[str, torch.Tensor]


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


def refusal(workspace: Workspace, output: Path, **changes: object) -> str:
    """Why a run does not start, which is said before anything is made."""
    with pytest.raises(UserError) as refused:
        read_config(words_of(workspace, output, **changes))
    return str(refused.value)


@pytest.fixture(scope="module")
def begin(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters to begin with, as peft saves them."""
    folder = tmp_path_factory.mktemp("peft")
    config = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "modules_to_save": ["multi_modal_projector"]}
    (folder / "lora.json").write_text(json.dumps(config))
    judge("begin", hub(workspace), folder, folder / "lora.json")
    return folder / "begin"


@pytest.fixture(scope="module")
def judged(workspace: Workspace, begin: Path) -> Judged:
    folder = begin.parent
    (folder / "run.json").write_text(json.dumps(words_of(workspace, folder / "out", **SETTINGS)))
    judge("train", hub(workspace), folder, folder / "run.json")
    end = load_file(folder / "end/adapter_model.safetensors")
    return Judged(json.loads((folder / "losses.json").read_text()), end)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_peft(layout: str, workspace: Workspace, begin: Path, judged: Judged, tmp_path: Path) -> None:
    settings = {**SETTINGS, **LAYOUTS[layout], "LORA_ADAPTER": begin}
    printed = run(workspace, tmp_path / "out", **settings)
    found = losses(printed)
    assert sorted(found) == list(range(1, ITERATIONS + 1))
    assert judged.losses[-1] < 0.8 * judged.losses[0], "a run that does not learn proves little"
    worst = max(abs(found[i + 1] / loss - 1) for i, loss in enumerate(judged.losses))
    print(f"{layout}: losses differ by {worst:.1e} at most")
    if layout != "packed":  # whose steps hold other records
        assert worst <= 3e-5
    ours = exported(workspace, tmp_path / "out/checkpoint", tmp_path / "adapter", "peft")
    mine, theirs = load_file(ours / "adapter_model.safetensors"), judged.end
    assert mine.keys() == theirs.keys()
    if layout != "packed":
        apart = {name: (mine[name] - theirs[name]).abs().max().item() for name in mine}
        print(f"{layout}: matrices differ by {max(apart.values()):.1e} at most")
        assert max(apart.values()) <= 1e-4


def exported(workspace: Workspace, checkpoint: Path, target: Path, layout: str) -> Path:
    name = "openai/none" if layout == "original_lora" else None
    options = {"model_size": "tiny", "precision": "fp32", "hf_checkpoint": hub(workspace), "tower_name": name}
    convert_to_huggingface(checkpoint, target, layout=layout, **options)
    return target


def test_options_reach_the_model(workspace: Workspace, tmp_path: Path) -> None:
    """Each option is another than its default; what they do to logits and gradients: tests/model/test_adapters.py."""
    options = {"LORA_RANK": 3, "LORA_ALPHA": 7.5, "LORA_DROPOUT": 0.25, "LORA_TARGETS": "q_proj,fc2,linear_1"}
    options |= {"LORA_PARTS": "projector,vision_tower,language_model", "LORA_RSLORA": "true"}
    words = words_of(workspace, tmp_path / "out", **options)
    wanted = LoraConfig(
        3, 7.5, 0.25, ("q_proj", "fc2", "linear_1"), ("language_model", "vision_tower", "projector"), True
    )
    assert frozen_parts(parse_own_arguments(words)) == Frozen(True, True, True, wanted)
    assert read_config(words).lora.config == wanted
    assert lora_of(parse_own_arguments(words_of(workspace, tmp_path / "out", LORA_RANK=3))).alpha == 6.0


@pytest.mark.slow
def test_everything_frozen_but_adapters_learns(workspace: Workspace, tmp_path: Path) -> None:
    """Recomputed layers, no trained weight below them: their input must ask for a gradient all the same."""
    frozen = {f"FREEZE_{part}": "true" for part in ("LANGUAGE_MODEL", "VISION_TOWER", "PROJECTOR")}
    found = losses(run(workspace, tmp_path / "out", **frozen, AC="full", LORA_RANK=8, LR="5e-3"))
    assert found[20] < 0.9 * found[1]


# ---------------------------------------------------------------- what a checkpoint holds


SHORT = {"FREEZE_VISION_TOWER": "true", "TRAIN_ITERS": 12, "SAVE_INTERVAL": 4, **LORA}


@pytest.fixture(scope="module")
def trained(workspace: Workspace, begin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run over 12 iterations from peft's adapters, never stopped."""
    output = tmp_path_factory.mktemp("trained") / "out"
    before = fingerprint(workspace.checkpoint / "release")
    run(workspace, output, **SHORT, LORA_ADAPTER=begin)
    assert fingerprint(workspace.checkpoint / "release") == before
    return output


def test_a_checkpoint_holds_what_is_trained_alone(workspace: Workspace, trained: Path) -> None:
    iteration = trained / "checkpoint/iter_0000012"
    with CheckpointReader(iteration) as reader:
        weights = {
            name: tuple(entry.size) for name, entry in reader.tensors.items() if not name.startswith(NOT_WEIGHTS)
        }
    adapters = LoraConfig(4, 12.0).shapes(read_geometry_of(hub(workspace)))
    projector = {name for name in weights if name.startswith("vision_projection.")}
    assert weights.keys() == adapters.keys() | projector and len(projector) == 4
    assert {name: weights[name] for name in adapters} == adapters
    record = json.loads((trained / "checkpoint/llava/lora.json").read_text())
    assert record["base"] == str(workspace.checkpoint) and record["iteration"] == "release"
    assert record["sha256"] == fingerprint(workspace.checkpoint / "release")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one process", "DP2 + distributed optimizer"])
def test_kill_and_resume(layout: str, workspace: Workspace, begin: Path, tmp_path: Path) -> None:
    settings = {**SHORT, **LAYOUTS[layout], "LORA_ADAPTER": begin}
    expected = losses(run(workspace, tmp_path / "whole", **settings))
    killed = run_and_kill(workspace, tmp_path / "killed", at_iteration=6, **settings)
    again = losses(run(workspace, tmp_path / "killed", **settings))
    assert max(killed) < 12 and min(again) > 1
    assert {i: loss for i, loss in (killed | again).items() if loss != expected[i]} == {}
    assert_same_run(tmp_path / "killed", tmp_path / "whole", 12)


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(workspace: Workspace, trained: Path, begin: Path, tmp_path: Path) -> None:
    """Adapters and their optimizer's state of two ranks' halves, on one."""
    settings = {**SHORT, "DO": "true"}
    output = tmp_path / "out"
    run(workspace, output, words=["--exit-interval", "4"], **settings, TP=2, LORA_ADAPTER=begin)
    found = losses(run(workspace, output, **settings))
    expected = losses(run(workspace, tmp_path / "whole", **settings, LORA_ADAPTER=begin))
    assert min(found) == 5
    assert max(abs(found[i] / expected[i] - 1) for i in found) <= 7e-6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"LORA_ALPHA": 8}, "LORA_ALPHA is 8, wanted 12"),
        ({"LORA_TARGETS": "q_proj,v_proj"}, "LORA_TARGETS is q_proj,v_proj, wanted all"),
        ({"FREEZE_PROJECTOR": "true"}, "it holds the weights of projector, and this run trains those of no part"),
        ({"LORA_RANK": 0, "LORA_ALPHA": ""}, "holds adapters, and LORA_RANK is 0; set LORA_RANK=4"),
    ],
)
def test_a_resume_with_other_adapters_is_refused(
    changes: dict[str, object], sentence: str, workspace: Workspace, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    assert sentence in refusal(workspace, tmp_path / "out", **{**SHORT, "TRAIN_ITERS": 16, **changes})


def test_a_resume_on_another_base_is_refused(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    """The same model, one bit of one weight is another."""
    shutil.copytree(workspace.checkpoint, tmp_path / "base")
    weights = next((tmp_path / "base/release").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out/run.json").unlink(missing_ok=True)  # which names the base's folder, and is asked first
    other = Workspace(tmp_path / "base", workspace.dataset)
    printed = refusal(other, tmp_path / "out", **{**SHORT, "TRAIN_ITERS": 16})
    assert f"PRETRAIN_CHECKPOINT_PATH {tmp_path / 'base'}: its release is not the base that the adapters" in printed
    assert f"which was release of {workspace.checkpoint}" in printed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"LORA_RANK": 8, "LORA_ALPHA": 12}, "its rank is 4, the run's 8; set LORA_RANK=4"),
        ({"LORA_TARGETS": "q_proj"}, "does not hold the adapters that the run asks for"),
    ],
)
def test_adapters_that_do_not_fit_the_run_are_refused(
    changes: dict[str, object], sentence: str, workspace: Workspace, begin: Path, tmp_path: Path
) -> None:
    settings = {**SHORT, "LORA_ADAPTER": begin, **changes}
    assert sentence in refusal(workspace, tmp_path / "out", **settings)
    assert not (tmp_path / "out/checkpoint").exists()


def test_a_checkpoint_of_adapters_is_no_start(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    start = Workspace(trained / "checkpoint", workspace.dataset)
    printed = run(start, tmp_path / "out", expected_exit=2, TRAIN_ITERS=3)
    assert "must hold whole weights, and it holds adapters" in printed


@pytest.mark.slow
def test_dropout_is_of_training_alone(workspace: Workspace, begin: Path, tmp_path: Path) -> None:
    """The first step's loss is another, validation's before any step is not."""
    settings = {**SHORT, "TRAIN_ITERS": 3, "SAVE_INTERVAL": 3, "LORA_ADAPTER": begin, "LR": "1e-12", "MIN_LR": 0}
    printed = [run(workspace, tmp_path / f"out{dropout}", **settings, LORA_DROPOUT=dropout) for dropout in ("0", "0.5")]
    first, second = (losses(text)[1] for text in printed)
    assert abs(second / first - 1) > 1e-4
    validated = [text.partition("lm loss value: ")[2].split()[0] for text in printed]
    assert validated[0] == validated[1]


# ---------------------------------------------------------------- exports


@pytest.mark.slow
def test_peft_and_the_merged_export_answer_alike(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    adapter = exported(workspace, trained / "checkpoint", tmp_path / "adapter", "peft")
    merged = exported(workspace, trained / "checkpoint", tmp_path / "merged", "hub")
    assert not (merged / "lora.json").exists()
    judge("compare", hub(workspace), adapter, merged, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["logits"] <= 1e-5 and found["moved"] > 1e-2 and not found["silent"]
    assert found["tokens"][0] == found["tokens"][1] and len(found["tokens"][0]) == 64
    # and from peft's folder a run begins where this one ended
    printed = run(workspace, tmp_path / "out", **{**SHORT, "TRAIN_ITERS": 3, "LORA_ADAPTER": adapter})
    saved = tmp_path / "again"
    exported(workspace, tmp_path / "out/checkpoint", saved, "peft")
    assert "adapters: from" in printed
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, saved))
    assert before.keys() == after.keys() and max((before[n] - after[n]).abs().max() for n in before) < 4e-3


def test_the_original_layout_has_its_two_files(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    """Names as the original code's loader strips them: base_model. of all, then model. of what it finds twice."""
    folder = exported(workspace, trained / "checkpoint", tmp_path / "original", "original_lora")
    peft = exported(workspace, trained / "checkpoint", tmp_path / "peft", "peft")
    whole = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    stripped = {name.removeprefix("base_model.").removeprefix("model."): value for name, value in whole.items()}
    matrices, same = (load_file(place / "adapter_model.safetensors") for place in (folder, peft))
    assert stripped.keys() == {f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    name = "base_model.model.model.multi_modal_projector.linear_1.weight"
    assert torch.equal(stripped["model.mm_projector.0.weight"], same[name])
    for name, value in matrices.items():
        assert name.startswith("base_model.model.model.layers.")
        assert torch.equal(value, same[name.replace("model.model.layers", "model.model.language_model.layers")])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert json.loads((folder / "config.json").read_text())["mm_projector_type"] == "mlp2x_gelu"


def test_an_export_without_its_base_is_refused(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    note = tmp_path / "checkpoint/llava/lora.json"
    note.write_text(note.read_text().replace(str(workspace.checkpoint), str(tmp_path / "gone")))
    options = {"model_size": "tiny", "precision": "fp32", "hf_checkpoint": hub(workspace)}
    with pytest.raises(UserError, match="their base is not there: no whole checkpoint in"):
        convert_to_huggingface(tmp_path / "checkpoint", tmp_path / "export", **options)
    assert not (tmp_path / "export").exists()
    convert_to_huggingface(tmp_path / "checkpoint", tmp_path / "export", base=workspace.checkpoint, **options)
    right = exported(workspace, trained / "checkpoint", tmp_path / "right", "hub")
    assert (tmp_path / "export/model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_checkpoint_answers_as_the_merged_export(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    merged = exported(workspace, trained / "checkpoint", tmp_path / "merged", "hub")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "1", "prompt": "What is three plus four?"}) + "\n")
    answers = []
    for model in (merged, trained / "checkpoint"):
        output = tmp_path / f"{model.name}.jsonl"
        script = ROOT / "examples/llava_mcore/run_inference_llava.sh"
        words = ["--model", model, "--prompts", prompts, "--output", output, "--max-new-tokens", 24]
        environment = os.environ | {"PYTHON": interpreter.python(), "OMP_NUM_THREADS": "1", "ACCELERATOR": "cpu"}
        done = subprocess.run(["bash", str(script), *map(str, words)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append([json.loads(line)["answer"] for line in output.read_text().splitlines()])
    assert answers[0] == answers[1] and answers[0][0]
