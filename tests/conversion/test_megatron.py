"""Megatron's own dist_checkpointing reads what the converter writes, and the converter what Megatron writes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as dcp

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.conversion.torch_dist import CheckpointReader, _contiguous_start
from megatron_patch.errors import UserError
from tests.conversion.conftest import tensors_of
from tests.warm import interpreter

ROOT = Path(__file__).parents[2]


def megatron(*jobs: dict) -> None:
    done = subprocess.run(
        [interpreter.python(), str(Path(__file__).with_name("megatron_side.py")), json.dumps(jobs, default=str)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def expected(hub_tensors: dict, layers: int, groups: int, width: int = 16) -> dict:
    """Megatron's tensors of a LLaVA, written out here without the converter's table or transforms."""
    language, tower = "language_model.model.", "vision_tower.vision_model."

    def stack(pattern: str, count: int) -> torch.Tensor:
        return torch.stack([hub_tensors[pattern.format(layer)] for layer in range(count)])

    def interleave(prefix: str, kind: str, count: int, groups: int, width: int) -> torch.Tensor:
        query, key, value = (stack(f"{prefix}{name}_proj.{kind}", count) for name in "qkv")
        per_group = query.shape[1] // groups
        blocks = []
        for group in range(groups):
            blocks.append(query[:, group * per_group : (group + 1) * per_group])
            blocks += [part[:, group * width : (group + 1) * width] for part in (key, value)]
        return torch.cat(blocks, dim=1)

    ours, block = "language_model.decoder.layers.", language + "layers.{}."
    result = {
        "language_model.embedding.word_embeddings.weight": hub_tensors[language + "embed_tokens.weight"],
        "language_model.decoder.final_layernorm.weight": hub_tensors[language + "norm.weight"],
        ours + "self_attention.linear_qkv.layer_norm_weight": stack(block + "input_layernorm.weight", layers),
        ours + "self_attention.linear_qkv.weight": interleave(block + "self_attn.", "weight", layers, groups, width),
        ours + "self_attention.linear_proj.weight": stack(block + "self_attn.o_proj.weight", layers),
        ours + "mlp.linear_fc1.layer_norm_weight": stack(block + "post_attention_layernorm.weight", layers),
        ours + "mlp.linear_fc1.weight": torch.cat(
            [stack(block + f"mlp.{name}_proj.weight", layers) for name in ("gate", "up")], dim=1
        ),
        ours + "mlp.linear_fc2.weight": stack(block + "mlp.down_proj.weight", layers),
    }
    if language + "layers.0.self_attn.q_proj.bias" in hub_tensors:
        result[ours + "self_attention.linear_qkv.bias"] = interleave(
            block + "self_attn.", "bias", layers, groups, width
        )
    if "language_model.lm_head.weight" in hub_tensors:
        result["language_model.output_layer.weight"] = hub_tensors["language_model.lm_head.weight"]
    running = 3
    block = tower + "encoder.layers.{}."
    for kind in ("weight", "bias"):
        for mine, theirs in {
            "self_attention.linear_qkv.layer_norm_": "layer_norm1.",
            "self_attention.linear_proj.": "self_attn.out_proj.",
            "mlp.linear_fc1.layer_norm_": "layer_norm2.",
            "mlp.linear_fc1.": "mlp.fc1.",
            "mlp.linear_fc2.": "mlp.fc2.",
        }.items():
            result[f"vision_model.decoder.layers.{mine}{kind}"] = stack(block + theirs + kind, running)
        result[f"vision_model.decoder.layers.self_attention.linear_qkv.{kind}"] = interleave(
            block + "self_attn.", kind, running, 4, 12
        )
        result[f"vision_model.ln_pre.{kind}"] = hub_tensors[f"{tower}pre_layrnorm.{kind}"]
        for layer in (1, 2):
            result[f"vision_projection.encoder.linear_fc{layer}.{kind}"] = hub_tensors[
                f"multi_modal_projector.linear_{layer}.{kind}"
            ]
    embeddings = tower + "embeddings."
    result["vision_model.class_token"] = hub_tensors[embeddings + "class_embedding"].reshape(1, 1, -1)
    result["vision_model.conv1.weight"] = hub_tensors[embeddings + "patch_embedding.weight"]
    result["vision_model.position_embeddings.weight"] = hub_tensors[embeddings + "position_embedding.weight"]
    return result


READS = {"llama": 2, "qwen2": 1}  # family: the TP that Megatron reads it at


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    """Checkpoints written by the converter and by Megatron; one Megatron process does all its part (it starts slowly).

    <family>/ the converter's; <family>.safetensors what Megatron read there; trained/ and per_layer/ as a trainer
    leaves them.
    """
    root = tmp_path_factory.mktemp("megatron")
    jobs = []
    for family, degree in READS.items():
        convert_to_megatron(hub(f"llava_{family}"), None, root / family, model_size="tiny", precision="fp32")
        target = root / f"{family}.safetensors"
        jobs.append({"do": "read", "source": root / family / "release", "target": target, "tensor_parallel": degree})
    convert_to_megatron(hub("llava_mistral"), None, root / "trained", model_size="tiny", precision="fp32")
    with CheckpointReader(root / "trained/release") as reader:
        whole = {
            key: reader.read(key, (0,) * len(entry.size), tuple(entry.size)).clone()
            for key, entry in reader.tensors.items()
        }
    save_file(whole, str(root / "mistral.safetensors"))
    shutil.copytree(root / "trained", root / "per_layer")
    for name, words in {"trained": {"padding": 48}, "per_layer": {"per_layer": True}}.items():
        target = root / name / "iter_0000010"
        jobs.append(
            {"do": "save", "source": root / "mistral.safetensors", "target": target, "tensor_parallel": 2} | words
        )
        (root / name / "latest_checkpointed_iteration.txt").write_text("10")
    megatron(*jobs)
    return root


@pytest.mark.parametrize(("family", "groups"), [("llama", 4), ("qwen2", 2)])
def test_megatron_reads_the_converted_checkpoint(hub, folder, family, groups):
    got, want = (
        load_file(str(folder / f"{family}.safetensors")),
        expected(tensors_of(hub(f"llava_{family}")), 4, groups),
    )
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].shape == tensor.shape and torch.equal(got[key], tensor), key
    with safe_open(str(folder / f"{family}.safetensors"), "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["common"]) == {"checkpoint_version": 3.0, "iteration": 0}
    # qkv, proj, fc1, fc2, attention core: 4 decoder and 3 tower layers; final norm, ln_pre, two projector layers.
    assert int(facts["extra_states"]) == 5 * (4 + 3) + 4


def test_export_of_what_megatron_saves(hub, folder, tmp_path):
    """Weights cut for TP2, padded vocabulary, optimizer, RNG: the export is the source, byte for byte."""
    checkpoint = folder / "trained"
    with CheckpointReader(checkpoint / "iter_0000010") as reader:
        entry = reader.tensors["language_model.embedding.word_embeddings.weight"]
        assert tuple(entry.size) == (384, 64) and len(entry.chunks) == 2
        assert any(key.startswith("optimizer.") for key in reader.tensors)
        assert any(key.startswith("rng_state") for key in reader.objects)
    report = convert_to_huggingface(checkpoint, tmp_path / "hf", model_size="tiny", precision="fp32")
    assert "iter_0000010" in report.notes[0]
    before, after = tensors_of(hub("llava_mistral")), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_one_by_one_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"layers one by one .*decoder\.layers\.0\."):
        convert_to_huggingface(folder / "per_layer", tmp_path / "hf", model_size="tiny", precision="fp32")
    assert not (tmp_path / "hf").exists()


def test_chunks_are_read_in_place(folder):
    """The converter's and Megatron's chunks are found by position, so that rows can be read without their chunk."""
    for iteration in (folder / "trained/iter_0000010", folder / "trained/release"):
        with CheckpointReader(iteration) as reader:
            for key, entry in reader.tensors.items():
                for chunk in entry.chunks:
                    place = reader._places[dcp.MetadataIndex(key, chunk.offsets)]
                    descriptor = reader._descriptor(place.relative_path)
                    assert _contiguous_start(descriptor, place, tuple(chunk.sizes), entry.properties.dtype), key
