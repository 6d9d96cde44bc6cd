"""mm_projector.bin: in (stage 2's start) and out (stage 1's product), by its own commands."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.conversion.torch_dist import CheckpointReader
from tests.conversion.conftest import SCRIPT
from tests.conversion.original_folders import projector_weights
from tests.conversion.test_refusals import Evil, forward
from tests.conversion.test_round_trip import same_bytes

KEYS = {
    "model.mm_projector.0.weight": "vision_projection.encoder.linear_fc1.weight",
    "model.mm_projector.0.bias": "vision_projection.encoder.linear_fc1.bias",
    "model.mm_projector.2.weight": "vision_projection.encoder.linear_fc2.weight",
    "model.mm_projector.2.bias": "vision_projection.encoder.linear_fc2.bias",
    "model.mm_projector.weight": "vision_projection.encoder.weight",
    "model.mm_projector.bias": "vision_projection.encoder.bias",
}


@pytest.fixture
def extract(monkeypatch, capsys):
    """The command that takes the projector out: words -> (exit code, stdout, stderr)."""
    script = SCRIPT.with_name("mm_projector.py")
    spec = importlib.util.spec_from_file_location("mm_projector_command", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
        capsys.readouterr()
        code = module.main()
        return code, *capsys.readouterr()

    return run


def load_projector(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("linear", [False, True])
def test_in_and_out(hub, tmp_path, command, extract, linear):
    """The kind is told by the names; the checkpoint starts with these bytes and gives them back."""
    before = projector_weights(linear=linear)
    torch.save(before, tmp_path / "mm_projector.bin")
    words = forward(hub("llama"), hub("clip"), tmp_path / "ckpt", "--mm-projector", tmp_path / "mm_projector.bin")
    code, out, err = command(*words)
    assert code == 0 and "from mm_projector.bin" in out, err
    with CheckpointReader(tmp_path / "ckpt/release") as reader:
        for name, tensor in before.items():
            key = KEYS[name]
            assert same_bytes(reader.read(key, tuple(0 for _ in tensor.shape), tuple(tensor.shape)), tensor), name
    code, out, err = extract(tmp_path / "ckpt", tmp_path / "new folder/out.bin")
    assert code == 0 and ("linear" if linear else "mlp2x_gelu") in out, err
    after = load_projector(tmp_path / "new folder/out.bin")
    assert list(after) == list(before) and all(same_bytes(before[name], after[name]) for name in before)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["out.bin"]


@pytest.mark.parametrize(
    ("prefix", "linear"),
    [("base_model.model.model.mm_projector.", False), ("mm_projector.", True), ("mm_projector.", False), ("", False)],
)
def test_other_prefixes(hub, tmp_path, extract, prefix, linear):
    """As LoRA's wrapper names them, without the model's prefix, and bare."""
    before = projector_weights(linear=linear)
    other = {name.replace("model.mm_projector.", prefix): tensor for name, tensor in before.items()}
    torch.save(other, tmp_path / "p.bin")
    convert_to_megatron(
        hub("llama"), hub("clip"), tmp_path / "c", model_size="tiny", precision="fp32", mm_projector=tmp_path / "p.bin"
    )
    assert extract(tmp_path / "c", tmp_path / "out.bin")[0] == 0
    after = load_projector(tmp_path / "out.bin")
    assert before.keys() == after.keys() and all(same_bytes(before[name], after[name]) for name in before)


def test_only_the_projector_is_read(hub, tmp_path, extract, monkeypatch):
    """bf16 in the file, cast on the way out when asked; bytes read are those of the projector and of headers."""
    before = {name: tensor.to(torch.bfloat16) for name, tensor in projector_weights().items()}
    save_file(before, str(tmp_path / "p.safetensors"))
    file = tmp_path / "p.safetensors"
    convert_to_megatron(
        hub("llama"), hub("clip"), tmp_path / "c", model_size="tiny", precision="bf16", mm_projector=file
    )
    asked = []
    real = CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "read", lambda self, key, *box: asked.append(key) or real(self, key, *box))
    assert extract(tmp_path / "c", tmp_path / "same.bin")[0] == 0
    assert len(asked) == 4 and all(key.startswith("vision_projection.") for key in asked)
    after = load_projector(tmp_path / "same.bin")
    assert all(same_bytes(before[name], after[name]) for name in before)
    assert extract(tmp_path / "c", tmp_path / "wide.bin", "--precision", "fp32")[0] == 0
    assert load_projector(tmp_path / "wide.bin")["model.mm_projector.0.bias"].dtype == torch.float32


def test_out_of_the_per_rank_format(hub, tmp_path, extract):
    """TP 2 cuts the projector; the file holds it whole."""
    torch.save(projector_weights(), tmp_path / "p.bin")
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "checkpoint_format": "torch"}
    options = {"model_size": "tiny", "precision": "fp32", "mm_projector": tmp_path / "p.bin"}
    convert_to_megatron(hub("mistral"), hub("clip"), tmp_path / "c", **options, **layout)
    assert extract(tmp_path / "c", tmp_path / "out.bin")[0] == 0
    before, after = projector_weights(), load_projector(tmp_path / "out.bin")
    assert before.keys() == after.keys() and all(same_bytes(before[name], after[name]) for name in before)


def without(name: str) -> dict:
    weights = projector_weights()
    del weights[name]
    return weights


FILES = {
    "missing": (lambda: without("model.mm_projector.2.bias"), ["missing (1): multi_modal_projector.linear_2.bias"]),
    "unknown": (
        lambda: projector_weights() | {"model.embed_tokens.weight": torch.ones(2, 64)},
        ["unknown (1): model.embed_tokens.weight"],
    ),
    "deeper": (
        lambda: projector_weights() | {"model.mm_projector.4.weight": torch.ones(64, 64)},
        ["unknown (1): model.mm_projector.4.weight"],
    ),
    "another width": (lambda: projector_weights(tower=40), ["0.weight is [64, 40]", "[64, 48]"]),
    "none": (lambda: {"lm_head.weight": torch.ones(2, 2)}, ["holds no projector but lm_head.weight"]),
    "no tensor": (lambda: projector_weights() | {"epoch": 3}, ["epoch is a int, no tensor"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(hub, tmp_path, command, case):
    make, texts = FILES[case]
    torch.save(make(), tmp_path / "p.bin")
    code, _, err = command(*forward(hub("llama"), hub("clip"), tmp_path / "c", "--mm-projector", tmp_path / "p.bin"))
    assert code == 2 and all(text in err for text in texts), err
    assert [path.name for path in tmp_path.iterdir()] == ["p.bin"]


def test_other_refusals(hub, tmp_path, command, extract):
    torch.save({"model.mm_projector.0.weight": Evil(tmp_path / "ran")}, tmp_path / "evil.bin")
    torch.save(projector_weights(), tmp_path / "p.bin")
    base = forward(hub("llama"), hub("clip"), tmp_path / "c")
    for words, text in (
        (["--mm-projector", tmp_path / "evil.bin"], "weights_only"),
        (["--mm-projector", tmp_path / "absent.bin"], "is no file"),
        (["--mm-projector", tmp_path / "p.bin", "--projector", "linear"], "mlp2x_gelu, not linear"),
    ):
        code, _, err = command(*base, *words)
        assert code == 2 and text in err and not (tmp_path / "c").exists(), err
    assert not (tmp_path / "ran").exists()

    assert command(*base)[0] == 0
    before = sorted(tmp_path.rglob("*"))
    assert "exists" in extract(tmp_path / "c", tmp_path / "p.bin")[2]
    assert "no Megatron checkpoint" in extract(hub("llama"), tmp_path / "out.bin")[2]
    edit = (tmp_path / "c/llava/config.json").read_text()
    (tmp_path / "c/llava/config.json").write_text(
        edit.replace('"model_type": "llava"', '"mm_projector_type": "linear"')
    )
    code, _, err = extract(tmp_path / "c", tmp_path / "out.bin")
    assert code == 2 and "missing (2): vision_projection.encoder.weight" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_stage_ones_product_goes_into_stage_two(hub, tmp_path, extract):
    """Out of one checkpoint and into another LLM of the same width: stage 2's start."""
    convert_to_megatron(hub("llama"), hub("clip"), tmp_path / "1", model_size="tiny", precision="fp32", seed=77)
    assert extract(tmp_path / "1", tmp_path / "p.bin")[0] == 0
    options = {"model_size": "tiny", "precision": "fp32", "mm_projector": tmp_path / "p.bin"}
    convert_to_megatron(hub("mistral"), hub("clip"), tmp_path / "2", **options)
    assert extract(tmp_path / "2", tmp_path / "again.bin")[0] == 0
    one, two = load_projector(tmp_path / "p.bin"), load_projector(tmp_path / "again.bin")
    assert one.keys() == two.keys() and all(same_bytes(one[name], two[name]) for name in one)


def test_pickles_are_read_in_place(hub, tmp_path, monkeypatch):
    """pytorch_model.bin is read by pread, not mapped; what does not stand in order, and old files, come out equal."""
    from megatron_patch.conversion import hub_weights

    whole = torch.arange(24.0).reshape(4, 6)
    weights = {"plain": whole.clone(), "part": whole[1:3], "turned": whole.T, "bf16": whole.to(torch.bfloat16)}
    torch.save(weights, tmp_path / "new.bin")
    torch.save(weights, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    asked = []
    real = hub_weights.pread_into
    monkeypatch.setattr(hub_weights, "pread_into", lambda *words: asked.append(words) or real(*words))
    for name, reads in (("new.bin", 6), ("old.bin", 0)):
        asked.clear()
        for key, stored in hub_weights.open_weight_file(tmp_path / name).items():
            assert torch.equal(stored.read(), weights[key]), key
            assert torch.equal(stored.read_rows(1, 2), weights[key][1:2]), key
        assert len(asked) == reads
