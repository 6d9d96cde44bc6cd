"""Wrong input ends in one sentence and exit code 2, and leaves nothing behind."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.conversion.output import check_disk, staged_folder
from megatron_patch.errors import UserError
from tests.conversion.conftest import SCRIPT
from tests.tiny_models import make_tiny_llm


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(str(folder / "model.safetensors"))
    change(weights)
    save_file(weights, str(folder / "model.safetensors"))


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def forward(llm, clip, target, *words):
    base = ["--source-llm", llm, "--source-clip", clip, "--target", target, "--model-size", "tiny"]
    return [*base, "--precision", "fp32", *words]


@pytest.fixture
def refused(command, tmp_path):
    """Run the command line on `target` (below tmp_path/out): exit 2, all texts in the message, nothing made."""
    out = tmp_path / "out"
    out.mkdir()

    def check(*texts: str, words) -> str:
        code, _, err = command(*words)
        assert code == 2, err
        for text in texts:
            assert text in err, err
        assert list(out.iterdir()) == []
        return err

    check.target = out / "ckpt"
    return check


LAYER = "model.layers.1.mlp.up_proj.weight"
TENSORS = {
    "missing": (lambda w: w.pop(LAYER), ["missing (1): language_model." + LAYER, "unknown (0)", "left over (0)"]),
    "unknown": (lambda w: w.update({"model.adapter.weight": torch.ones(2)}), ["unknown (1): model.adapter.weight"]),
    "left over": (
        lambda w: w.update({"model.layers.4.mlp.up_proj.weight": torch.ones(176, 64)}),
        ["left over (1): model.layers.4.mlp.up_proj.weight"],
    ),
    "another shape": (lambda w: w.update({LAYER: torch.ones(64, 176)}), [f"{LAYER} is [64, 176]", "[176, 64]"]),
    "unknown dtype": (lambda w: w.update({LAYER: w[LAYER].to(torch.int8)}), [LAYER + " is torch.int8", "bfloat16"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_names_that_do_not_fit(hub, tmp_path, refused, case):
    change, texts = TENSORS[case]
    llm = copied(hub("llama"), tmp_path / "llm")
    edit_weights(llm, change)
    refused(*texts, words=forward(llm, hub("clip"), refused.target))


def test_tower_names_that_do_not_fit(hub, tmp_path, refused):
    clip = copied(hub("clip"), tmp_path / "clip")
    edit_weights(clip, lambda weights: weights.pop("vision_model.pre_layrnorm.bias"))
    refused("missing (1)", "pre_layrnorm.bias", words=forward(hub("llama"), clip, refused.target))


def test_unknown_families(hub, tmp_path, refused):
    llm, clip = copied(hub("llama"), tmp_path / "llm"), copied(hub("clip"), tmp_path / "clip")
    edit_json(llm / "config.json", model_type="gpt2")
    refused("'gpt2'", "known: llama, mistral, qwen2, qwen3", words=forward(llm, clip, refused.target))
    edit_json(llm / "config.json", model_type="llama", attention_bias=True)
    refused("attention_bias", words=forward(llm, clip, refused.target))
    edit_json(clip / "config.json", model_type="dinov2")
    refused("'dinov2'", "clip_vision_model, siglip_vision_model", words=forward(hub("llama"), clip, refused.target))


def test_cut_off_files(hub, tmp_path, refused):
    llm = copied(hub("llama"), tmp_path / "llm")
    words = forward(llm, hub("clip"), refused.target)
    whole = (llm / "model.safetensors").read_bytes()
    for count in (1, len(whole) // 2, len(whole) - 100, len(whole) - 4):
        cut(llm / "model.safetensors", count)
        refused("model.safetensors is not a whole safetensors file", words=words)
        (llm / "model.safetensors").write_bytes(whole)
    (llm / "model.safetensors").unlink()
    refused("neither model.safetensors nor pytorch_model.bin", words=words)
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("model-00002-of-00002.safetensors", "not there", words=words)
    (llm / "config.json").write_text("{")
    refused("config.json cannot be read as JSON", words=words)
    refused("is not a folder", words=forward(tmp_path / "absent", hub("clip"), refused.target))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_pickles_run_no_code(hub, tmp_path, refused, command):
    llm = copied(hub("llama"), tmp_path / "llm")
    (llm / "model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "ran")}, llm / "pytorch_model.bin")
    refused("weights_only", words=forward(llm, hub("clip"), refused.target))

    convert_to_megatron(hub("llama"), hub("clip"), tmp_path / "c", model_size="tiny", precision="fp32")
    (tmp_path / "c/release/.metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    words = [*forward(tmp_path / "c", "none", refused.target), "--mg2hf"]
    refused("which no checkpoint needs", words=words)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--model-size", "7B"], ["MODEL_SIZE 7B", "5 to 7.8 billion", "pass tiny"]),
        (["--model-size", "7b"], ["'7b'", "0.5B", "72B"]),
        (["--tensor-model-parallel-size", "3"], ["TP 3", "num_attention_heads of the LLM is 4"]),
        (["--tensor-model-parallel-size", "4"], ["TP 4", "num_key_value_heads of the LLM is 2"]),
        (["--tensor-model-parallel-size", "0"], ["TP 0 is no degree"]),
        (["--tensor-model-parallel-size", "four"], ["four"]),
        (["--pipeline-model-parallel-size", "3"], ["PP 3", "4 layers"]),
        (["--precision", "bf61"], ["bf61", "fp16"]),
        (["--source-clip", "none"], ["without a tower"]),
    ],
)
def test_wrong_words(hub, refused, words, texts):
    refused(*texts, words=forward(hub("mistral"), hub("clip"), refused.target, *words))


def test_a_llava_brings_its_own_tower(hub, refused):
    refused("whole LLaVA", words=forward(hub("llava_llama"), hub("clip"), refused.target))


# Every option of the command line and the conversions that take it: parts (LLM and tower), llava (a whole one), hub and
# original (exports).  The others refuse it, with words of the last column in their sentence; what a row's value is
# checked against, such as TP, is no ignored argument.
EVERY = "parts llava hub original"
OPTIONS = {
    "--model-size": (["tiny"], EVERY, ""),
    "--source-llm": ([], EVERY, ""),
    "--source-clip": ([], "parts", "--source-clip|own tower"),
    "--target": ([], EVERY, ""),
    "--tensor-model-parallel-size": (["2"], EVERY, ""),
    "--pipeline-model-parallel-size": (["2"], EVERY, ""),
    "--mg2hf": ([], "hub original", ""),
    "--precision": (["fp32"], EVERY, ""),
    "--hf-checkpoint": ([], "hub original", "--hf-checkpoint"),
    "--projector": (["mlp2x_gelu"], "parts", "--projector|kind mlp2x_gelu"),
    "--mm-projector": ([], "parts", "--mm-projector|own projector"),
    "--add-tokens": (["<box>"], "parts llava", "--add-tokens"),
    "--vision-feature-layer": (["-1"], "parts", "--vision-feature-layer|feature layer -1"),
    "--model-kind": (["llava"], "parts", "--model-kind|leave the kind llava out"),
    "--seed": (["1234"], "parts", "--seed|seed 1234"),
    "--format": (["torch_dist"], "parts llava", "--format"),
    "--layout": (["original"], "hub original", "--layout"),
    "--vision-tower-name": (["x/clip"], "original", "--vision-tower-name|tower's name 'x/clip'"),
    "--base-checkpoint": (["base"], "", "--base-checkpoint|holds whole weights"),
    "--no-progress": ([], EVERY, ""),
}
DIRECTIONS = EVERY.split()


@pytest.fixture(scope="module")
def sources(hub, tmp_path_factory):
    """(direction -> arguments that are enough, option -> its value): a conversion of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    convert_to_megatron(hub("llama"), hub("clip"), folder / "ckpt", model_size="tiny", precision="fp32")
    text, tower = json.loads((hub("llama") / "config.json").read_text()), 48
    projector = {
        f"model.mm_projector.{name}": torch.ones(shape)
        for name, shape in {
            "0.weight": (text["hidden_size"], tower),
            "0.bias": (text["hidden_size"],),
            "2.weight": (text["hidden_size"], text["hidden_size"]),
            "2.bias": (text["hidden_size"],),
        }.items()
    }
    torch.save(projector, folder / "mm_projector.bin")
    back = ["--source-llm", folder / "ckpt", "--mg2hf"]
    enough = {
        "parts": ["--source-llm", hub("llama"), "--source-clip", hub("clip")],
        "llava": ["--source-llm", hub("llava_llama")],
        "hub": back,
        "original": [*back, "--layout", "original", "--vision-tower-name", "x/clip"],
    }
    values = {
        "--source-clip": hub("clip"),
        "--hf-checkpoint": hub("llama"),
        "--mm-projector": folder / "mm_projector.bin",
    }
    return {name: [*words, "--model-size", "tiny", "--precision", "fp32"] for name, words in enough.items()}, values


def test_the_table_of_options_is_whole(command):
    _, out, _ = command("--help")
    assert set(re.findall(r"^  (--[a-z0-9-]+)", out, re.MULTILINE)) == OPTIONS.keys()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("option", [name for name, (_, taken, _) in OPTIONS.items() if taken != EVERY])
def test_an_option_is_taken_or_refused(sources, refused, command, option, direction):
    enough, values = sources
    value, taken, sentence = OPTIONS[option]
    if option == "--mg2hf":
        return  # chooses the direction
    words = [*enough[direction], "--target", refused.target, option, *([values[option]] if option in values else value)]
    if direction in taken.split():
        code, _, err = command(*words)
        assert code == 0, err
        return
    err = refused("error: ", words=words)
    assert err.count("\n") == 1 and any(part in err for part in sentence.split("|")), err


def test_a_seed_draws_nothing_beside_a_projector(sources, refused):
    enough, values = sources
    words = [*enough["parts"], "--target", refused.target, "--mm-projector", values["--mm-projector"], "--seed", 7]
    refused("mm_projector.bin is no new projector", "leave the seed 7 out", words=words)


def test_existing_targets(hub, tmp_path, command):
    for name, make in {"folder": lambda p: (p.mkdir(), (p / "x").touch()), "file": lambda p: p.touch()}.items():
        target = tmp_path / name
        make(target)
        before = sorted(tmp_path.rglob("*"))
        code, _, err = command(*forward(hub("llama"), hub("clip"), target))
        # before anything is read: the folder that is made in the end would be refused later, for another reason
        assert code == 2 and re.search(f"{target} (exists and is not empty|is a file)", err)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    code, out, err = command(*forward(hub("llama"), hub("clip"), tmp_path / "empty"))
    assert code == 0, err
    assert "next:" in out and (tmp_path / "empty/release/.metadata").is_file()


def test_fp16_overflow(hub, tmp_path, refused):
    """Found while writing: what was staged is gone."""
    llm = copied(hub("llama"), tmp_path / "llm")
    edit_weights(llm, lambda weights: weights[LAYER].mul_(1e6))
    words = forward(llm, hub("clip"), refused.target, "--precision", "fp16")
    refused(LAYER, "fp16 cannot hold", words=words)


def test_tied_head_that_differs(hub, tmp_path, refused):
    llm = make_tiny_llm(tmp_path / "llm", "qwen2")
    edit_weights(llm, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}))
    refused("lm_head.weight", "differ", words=forward(llm, hub("clip"), refused.target))


def test_checkpoints_that_are_not_whole(hub, tmp_path, refused):
    convert_to_megatron(hub("llama"), hub("clip"), tmp_path / "c", model_size="tiny", precision="fp32")
    words = [*forward(tmp_path / "c", "none", refused.target), "--mg2hf"]
    refused("num_key_value_heads is 2, not 4", words=[*words, "--hf-checkpoint", hub("mistral")])
    refused("MODEL_SIZE 13B", words=[*words, "--model-size", "13B"])

    data = tmp_path / "c/release/__0_0.distcp"
    whole = data.read_bytes()
    cut(data, 1000)
    refused("__0_0.distcp", "promises", words=words)
    data.write_bytes(whole)

    carried = tmp_path / "c/llava/untrained_tower.safetensors"
    carried.rename(tmp_path / "aside")
    refused("untrained_tower.safetensors is not there", words=words)
    (tmp_path / "aside").rename(carried)

    edit_text = json.loads((tmp_path / "c/llava/config.json").read_text())
    edit_text["text_config"]["model_type"] = "qwen2"
    (tmp_path / "c/llava/config.json").write_text(json.dumps(edit_text))
    refused("missing (1): language_model.decoder.layers.self_attention.linear_qkv.bias", words=words)

    tracker = tmp_path / "c/latest_checkpointed_iteration.txt"
    tracker.write_text("20")
    refused("iter_0000020", words=words)
    tracker.write_text("last")
    refused("'last'", words=words)
    tracker.unlink()
    refused("is no Megatron checkpoint", words=words)


def test_the_target_appears_meanwhile(tmp_path):
    target = tmp_path / "t"
    with pytest.raises(UserError, match="appeared"), staged_folder(target) as stage:
        (stage / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["t", "theirs"]


def test_too_little_disk(tmp_path):
    with pytest.raises(UserError, match=r"1\d{3}\.\d\d GB; free some space"):
        check_disk(tmp_path / "a/b", 10**15 // 700)
    check_disk(tmp_path / "a/b", 10**6)


@pytest.mark.slow
def test_full_disk_and_kill(hub, tmp_path):
    """A write that fails leaves nothing; after kill -9 only TARGET.tmp-<pid> is there, which nobody loads."""
    words = [str(word) for word in forward(hub("llama"), hub("clip"), tmp_path / "c", "--no-progress")]
    code = (
        "import resource, signal, sys, os, runpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.argv = sys.argv[1:]\n"
        "import megatron_patch.conversion.torch_dist as room\n"
        "if os.environ['HOW'] == 'full': resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "else: room.CheckpointWriter.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    runs = {
        how: subprocess.Popen(
            [sys.executable, "-c", code, str(SCRIPT), *words],
            stderr=subprocess.PIPE,
            text=True,
            cwd=SCRIPT.parents[3],
            env=os.environ | {"HOW": how, "OMP_NUM_THREADS": "1"},
        )
        for how in ("full", "kill")
    }
    errors = {how: run.communicate()[1] for how, run in runs.items()}
    assert runs["full"].returncode == 2 and "File too large" in errors["full"], errors["full"]
    assert runs["kill"].returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [f"c.tmp-{runs['kill'].pid}"]
