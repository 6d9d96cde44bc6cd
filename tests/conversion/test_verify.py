"""verify_conversion.py: equal for every family, TP and PP; the first part that differs is named when it is not."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch import device
from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models
from tests.programs import in_warm_process
from tests.warm import interpreter

SCRIPT = Path(__file__).parents[2] / "toolkits/model_checkpoints_convertor/llava/verify_conversion.py"


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool starts Megatron's processes with this interpreter."""
    monkeypatch.setattr(sys, "executable", interpreter.python())


@pytest.fixture(scope="module")
def tool():
    """The command line's module."""
    spec = importlib.util.spec_from_file_location("verify_conversion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def arguments(tool, checkpoint: Path, *words: object):
    return tool.parse_arguments([*map(str, words), "--checkpoint", str(checkpoint)])


def swap(one: str, other: str):
    def change(weights: dict) -> None:
        weights[one], weights[other] = weights[other], weights[one]

    return change


def gate_up_cut_on_the_wrong_axis(weights: dict) -> None:
    """What a reader makes of a stacked [gate; up] that it takes for interleaved rows."""
    names = [f"language_model.model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    both = torch.cat([weights[name] for name in names])
    weights[names[0]], weights[names[1]] = both[0::2].clone(), both[1::2].clone()


def heads_in_another_order(weights: dict) -> None:
    """Queries of the tower taken for [d, heads] instead of [heads, d]."""
    name = "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight"
    weight = weights[name]
    weights[name] = weight.reshape(4, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape).contiguous()


# Wrong values under right names and shapes: what no accounting of names can see. -> the first part that must differ.
VALUES = {
    "keys and values swapped": (
        swap(
            "language_model.model.layers.2.self_attn.k_proj.weight",
            "language_model.model.layers.2.self_attn.v_proj.weight",
        ),
        "decoder layer 2",
    ),
    "gate and up cut on the wrong axis": (gate_up_cut_on_the_wrong_axis, "decoder layer 1"),
    "heads in another order": (heads_in_another_order, "vision tower"),
    "projector of another stage": (
        lambda weights: weights["multi_modal_projector.linear_2.bias"].add_(0.01),
        "projector",
    ),
    "rows of the vocabulary shifted": (
        lambda weights: weights.update(
            {"language_model.lm_head.weight": weights["language_model.lm_head.weight"].roll(1, 0)}
        ),
        "logits",
    ),
}


@pytest.fixture(scope="module")
def mutated(tmp_path_factory):
    """(source, a whole checkpoint, checkpoint of each mutation) of one LLaVA."""
    root = tmp_path_factory.mktemp("mutated")
    source = tiny_models.make_tiny_llava(root / "source", "mistral")
    convert_to_megatron(source, None, root / "whole", model_size="tiny", precision="fp32")
    for number, (change, _) in enumerate(VALUES.values()):
        changed = Path(shutil.copytree(source, root / f"hf{number}"))
        weights = load_file(str(changed / "model.safetensors"))
        change(weights)
        save_file(weights, str(changed / "model.safetensors"))
        convert_to_megatron(changed, None, root / str(number), model_size="tiny", precision="fp32")
    return source, root / "whole", [root / str(number) for number in range(len(VALUES))]


def test_wrong_values_are_found_and_the_first_part_is_named(tool, mutated):
    source, whole, checkpoints = mutated
    case = tool.prepare(arguments(tool, whole, "--hf", source))
    results = tool.run_megatron([(path, case.batch) for path in [whole, *checkpoints]], 1, 1)
    tables = [tool.compare(case, got) for got in results]
    assert tool.differing(tables[0], 1e-4) == []
    for title, table in zip(VALUES, tables[1:], strict=True):
        assert tool.differing(table, 1e-4)[:1] == [VALUES[title][1]], f"{title}: {table}"


@pytest.mark.parametrize(
    ("tensor", "pipeline", "families"),
    [
        pytest.param(2, 1, tiny_models.FAMILIES, marks=pytest.mark.slow),
        pytest.param(2, 2, tiny_models.FAMILIES + tiny_models.MORE_FAMILIES, marks=pytest.mark.slow),
        pytest.param(1, 2, tiny_models.FAMILIES + tiny_models.MORE_FAMILIES, marks=pytest.mark.slow),
    ],
    ids=["TP2", "TP2xPP2", "PP2"],
)
def test_every_family_is_equal(tool, tensor, pipeline, families, tmp_path):
    parallelism = ("--tensor-model-parallel-size", tensor, "--pipeline-model-parallel-size", pipeline)
    cases = []
    for number, family in enumerate(families):
        made = tmp_path / f"{family} checkpoint"
        words = {"model_size": "tiny", "precision": "bf16" if number % 2 else "fp32"}
        if tensor > 1 and family == "smollm2":
            continue  # three groups
        if number % 3 == 0:  # per-rank files
            words |= {"checkpoint_format": "torch", "tensor_parallel": tensor, "pipeline_parallel": pipeline}
        if number % 2:  # a language model and a tower
            llm = tiny_models.make_tiny_llm(tmp_path / f"{family} llm", family)
            clip = tiny_models.make_tiny_clip(tmp_path / f"{family} clip", full_model=number % 4 == 1)
            convert_to_megatron(llm, clip, made, **words)
            hub = ("--hf", llm, "--hf-clip", clip)
        else:
            llava = tiny_models.make_tiny_llava(tmp_path / f"{family} hf", family)
            convert_to_megatron(llava, None, made, **words)
            hub = ("--hf", llava)
        cases.append((family, made, tool.prepare(arguments(tool, made, *hub, *parallelism))))
    results = tool.run_megatron([(made, case.batch) for _, made, case in cases], tensor, pipeline)
    for (family, _, case), got in zip(cases, results, strict=True):
        table = tool.compare(case, got)
        assert tool.differing(table, 1e-4) == [], f"{family}: {table}"
        assert len(table) == 5 + case.geometry.language.layers
        assert case.expected["logits"].std() > 0.3, "flat logits prove nothing"


def test_command_line(tool, mutated, monkeypatch, capsys):
    """The table, the verdict and the exit code."""
    source, whole, checkpoints = mutated
    swapped = checkpoints[list(VALUES).index("keys and values swapped")]

    def run(checkpoint: Path, *words: object) -> tuple[int, str, str]:
        line = [str(SCRIPT), "--hf", str(source), "--checkpoint", str(checkpoint), *map(str, words)]
        monkeypatch.setattr(sys, "argv", line)
        capsys.readouterr()
        return tool.main(), *capsys.readouterr()

    code, out, err = run(swapped)
    assert code == 1, err
    lines = out.splitlines()
    parts = [
        "embedding",
        "vision tower",
        "projector",
        *(f"decoder layer {n}" for n in range(4)),
        "logits",
        "first loss",
    ]
    assert [line[:20].strip() for line in lines[1:-1]] == parts
    assert next(line[:20].strip() for line in lines if line.endswith("<-- differs")) == "decoder layer 2"
    assert lines[-1].startswith("DIFFERENT at TP 1 x PP 1: decoder layer 2 is the first of ")
    code, _, err = run(source)
    assert code == 2 and "error: " in err and "no such file" in err
    code, _, err = run(whole, "--tensor-model-parallel-size", 3)
    assert code == 2 and "TP 3 cannot cut this model" in err


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tool, mutated):
    source, whole, _ = mutated
    case = tool.prepare(arguments(tool, whole, "--hf", source))
    config = whole / "llava/config.json"
    before = config.read_text()
    value = json.loads(before)
    value["text_config"]["num_hidden_layers"] = 8
    config.write_text(json.dumps(value))
    try:
        with pytest.raises(tool.UserError, match="of another shape"):
            tool.run_megatron([(whole, case.batch)], 1, 1)
    finally:
        config.write_text(before)


def test_processes_get_the_accelerators_environment(tool, tmp_path, monkeypatch):
    """CUDA_DEVICE_MAX_CONNECTIONS, without which Megatron refuses TP on a GPU; shown by a program in Python's place."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "error: it is $CUDA_DEVICE_MAX_CONNECTIONS" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(device, "backend", lambda: device.kind("cuda"))
    with pytest.raises(tool.UserError, match=r"^it is 1$"):
        tool.run_megatron([], tensor=2, pipeline=1)


def test_a_worker_sets_its_device_before_anything_else(tmp_path):
    program = """
import os, sys
from toolkits.model_checkpoints_convertor.llava import verify_worker
import torch
torch.cpu.set_device = lambda here: print(here, torch.distributed.is_initialized())
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
verify_worker.main()
"""
    (tmp_path / "plan.json").write_text('{"tensor": 1, "pipeline": 1, "cases": []}')
    assert in_warm_process(program, tmp_path / "plan.json").split() == ["cpu", "False"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family", "tower"), [("llava_next", "mistral", "clip"), ("llava_onevision", "qwen2", "siglip")]
)
def test_models_for_any_resolution_are_equal(tool, tmp_path, capsys, kind, family, tower):
    """As a whole folder, and made of an LLM and a tower; and a newline that differs is seen behind the projector."""
    tiny_models.make_tiny_llava(tmp_path / "hf", family, tower=tower, kind=kind)
    convert_to_megatron(tmp_path / "hf", None, tmp_path / "ckpt", precision="fp32", model_size="tiny")
    words = ("--hf", tmp_path / "hf", "--tensor-model-parallel-size", 2)
    assert tool.verify(arguments(tool, tmp_path / "ckpt", *words)) == 0
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["image_newline"] = weights["image_newline"].flip(0)
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert tool.verify(arguments(tool, tmp_path / "ckpt", *words)) == 1
    assert "decoder layer 0" in capsys.readouterr().out
