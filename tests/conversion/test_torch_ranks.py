"""Megatron's format `torch`: names of the files, what a rank holds; every TP and PP comes back byte for byte."""

import pytest
import torch

from megatron_patch.checkpoint_files import RANK_FILE, read_rank_file
from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.conversion.table import HubTensor, Row
from megatron_patch.conversion.torch_dist import Chunk
from megatron_patch.conversion.torch_ranks import RanksReader, RanksWriter
from megatron_patch.conversion.transforms import Rows, Same
from tests.conversion.conftest import tensors_of


@pytest.mark.parametrize(
    ("family", "tensor", "pipeline"),
    [("llama", 4, 4), ("llama", 1, 1), ("mistral", 2, 2), ("qwen2", 2, 4), ("qwen2", 2, 1)],
)
def test_round_trip(hub, tmp_path, family, tensor, pipeline):
    source = hub(f"llava_{family}")
    convert_to_megatron(
        source,
        None,
        tmp_path / "c",
        model_size="tiny",
        precision="fp32",
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        checkpoint_format="torch",
    )
    assert len(list((tmp_path / "c/release").iterdir())) == tensor * pipeline
    convert_to_huggingface(tmp_path / "c", tmp_path / "hf", model_size="tiny", precision="fp32")
    before, after = tensors_of(source), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rank_holds_its_part(hub, tmp_path):
    """Against cuts written out here: groups of QKV, gate and up each for itself, columns of the output projection."""
    source = tensors_of(hub("llava_mistral"))
    convert_to_megatron(
        hub("llava_mistral"),
        None,
        tmp_path / "c",
        model_size="tiny",
        precision="fp32",
        tensor_parallel=2,
        pipeline_parallel=2,
        checkpoint_format="torch",
    )
    state = torch.load(tmp_path / "c/release/mp_rank_01_001" / RANK_FILE, weights_only=True)
    assert state["checkpoint_version"] == 3.0
    model, layer = state["model"], "language_model.model.layers.3."  # the second stage's second layer
    ours = "language_model.decoder.layers.1."
    query, key, value = (source[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(model[ours + "self_attention.linear_qkv.weight"], torch.cat([query[32:], key[16:], value[16:]]))
    gate, up = (source[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(model[ours + "mlp.linear_fc1.weight"], torch.cat([gate[88:], up[88:]]))
    output = source[f"{layer}self_attn.o_proj.weight"]
    assert torch.equal(model[ours + "self_attention.linear_proj.weight"], output[:, 32:])
    head = model["language_model.output_layer.weight"]  # 336 rows padded to 512, of which this rank has the second half
    assert torch.equal(head[:80], source["language_model.lm_head.weight"][256:]) and head.shape == (256, 64)
    assert not head[80:].any()
    assert not any(name.startswith("vision") for name in model)
    assert "language_model.embedding.word_embeddings.weight" not in model


def test_a_tied_head_stands_on_the_last_stage(hub, tmp_path):
    convert_to_megatron(
        hub("llava_qwen2"),
        None,
        tmp_path / "c",
        model_size="tiny",
        precision="fp32",
        pipeline_parallel=2,
        checkpoint_format="torch",
    )
    first, last = (
        torch.load(tmp_path / f"c/release/mp_rank_00_00{stage}" / RANK_FILE, weights_only=True)["model"]
        for stage in (0, 1)
    )
    embedding = first["language_model.embedding.word_embeddings.weight"]
    assert torch.equal(last["language_model.output_layer.weight"], embedding)


def test_ranks_of_two_digits(tmp_path):
    """mp_rank_10, not mp_rank_010; with stages mp_rank_10_010."""
    key = "language_model.decoder.layers.mlp.linear_fc1.weight"
    parts = tuple(HubTensor(name + "{layer}", (24, 4)) for name in ("gate", "up"))
    row = Row(key, Rows(), parts, layers=12)
    alone = Row("vision_projection.encoder.linear_fc1.weight", Same(0), (HubTensor("one", (36, 2)),))
    whole = torch.randn(12, 48, 4)
    one = torch.randn(36, 2)
    for tensor, pipeline, name in ((12, 1, "mp_rank_10"), (12, 12, "mp_rank_10_010")):
        folder = tmp_path / f"{pipeline}"
        with RanksWriter(folder, torch.float32, [row, alone], tensor, pipeline) as writer:
            chunks = [Chunk((i, 0, 0), (1, 48, 4), lambda i=i: whole[i]) for i in range(12)]
            writer.add_tensor(key, row.shape, chunks)
            writer.add_tensor(alone.key, alone.shape, [Chunk((0, 0), (36, 2), lambda: one)])
            writer.finish()
        assert len(list(folder.iterdir())) == tensor * pipeline
        local = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
        assert read_rank_file(folder / name / RANK_FILE)[local].shape == (4, 4)
        with RanksReader(folder, [row, alone]) as reader:
            assert (reader.tensor, reader.pipeline) == (tensor, pipeline)
            for layer in range(12):
                assert torch.equal(reader.read(key, (layer, 0, 0), (1, 48, 4))[0], whole[layer])
                assert torch.equal(reader.read(key, (layer, 7, 0), (1, 30, 4))[0], whole[layer, 7:37])
            assert torch.equal(reader.read(alone.key, (0, 0), (36, 2)), one)
