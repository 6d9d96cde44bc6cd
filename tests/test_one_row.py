"""A change is one row: families, towers, templates and accelerators are named in one place, and one row adds another.

The rows added here are renamed ones: what they compute is known, so that the result can be compared to the last bit.
"""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_patch import device
from megatron_patch.checkpoint_files import newest_iteration
from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.conversion.adapters import ADAPTER_LAYOUTS
from megatron_patch.conversion.layouts import LAYOUTS
from megatron_patch.conversion.table import table_of_weights
from megatron_patch.conversion.torch_ranks import open_checkpoint
from megatron_patch.data.templates import TEMPLATES
from megatron_patch.errors import UserError
from megatron_patch.geometry import read_geometry_of
from megatron_patch.language_models import LANGUAGE_MODELS, original_classes
from megatron_patch.launch import conversion
from megatron_patch.training.config import decoder_arguments
from megatron_patch.training.offload import offload_arguments
from megatron_patch.vision_towers import VISION_TOWERS, published_towers, whole_models
from tests import tiny_models
from tests.conversion.test_round_trip import same_bytes
from tests.launchers.launching import ROOT, Inputs, value_after
from tests.test_architecture import tracked

PRODUCT = ("megatron_patch", "toolkits", "examples")
# The rows, and `clip` and `llava`, which are words of their own (a role in provenance.json, the model itself).
FAMILIES_AND_TOWERS = (
    {*LANGUAGE_MODELS, *VISION_TOWERS, *original_classes(), *whole_models(), *published_towers()}
    | {name.rstrip("0123456789") for name in LANGUAGE_MODELS}
) - {"clip", "llava"}
# models that others have measured, by name
PUBLISHED = {"toolkits/benchmark/known_models.py", "toolkits/benchmark/published_rows.py"}
TEMPLATED = {"examples/llava_mcore/quickstart.sh"}  # a template has the name of a family
REGISTRIES = {"megatron_patch/language_models.py", "megatron_patch/vision_towers.py"}


# ---------------------------------------------------------------- who names what


def words_of_python(path: Path) -> list[str]:
    """Every text of a program but its docstrings."""
    tree = ast.parse(path.read_text())
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]


def words_of_bash(path: Path) -> list[str]:
    """Every line but comments."""
    return [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]


def named(path: Path, names: set[str]) -> set[str]:
    """Those of the names that a program says as a word."""
    texts = words_of_python(path) if path.suffix == ".py" else words_of_bash(path)
    pattern = re.compile(rf"(?<![\w/-])(?:{'|'.join(map(re.escape, names))})(?![\w-])")
    return {found for text in texts for found in pattern.findall(text)}


def test_families_and_towers_are_named_in_their_rows_alone() -> None:
    programs = [path for folder in PRODUCT for path in tracked(f"{folder}/**.py", f"{folder}/**.sh")]
    assert len(programs) > 80
    found = {str(path.relative_to(ROOT)): named(path, FAMILIES_AND_TOWERS) for path in programs}
    assert {name for name, hits in found.items() if hits} - PUBLISHED - TEMPLATED == REGISTRIES, found
    assert found["megatron_patch/language_models.py"] | found["megatron_patch/vision_towers.py"] >= {
        *LANGUAGE_MODELS,
        *VISION_TOWERS,
    }


def test_the_launcher_leaves_accelerators_and_templates_to_their_files() -> None:
    room = [ROOT / "examples/launcher.sh", *tracked("megatron_patch/launch/*.py")]
    assert len(room) > 10
    for path in room:
        if path.name == "doctor.py":  # it looks at devices and their libraries, whatever they are called
            continue
        # stage 1's default, presets and remedies may name one
        assert path.name == "presets.py" or not named(path, set(TEMPLATES)) - {"plain", "v1"}, path
        assert not named(path, {"cuda", "gloo", "nccl", "nvidia-smi", "CUDA_VISIBLE_DEVICES", "TORCHDYNAMO_DISABLE"})


def test_the_rows_name_templates_that_exist() -> None:
    for row in LANGUAGE_MODELS.values():
        assert {row.template, *row.template_of_token.values()} <= TEMPLATES.keys()


def test_the_converter_offers_every_layout() -> None:
    row = next(row for row in conversion.OPTIONS if row.name == "EXPORT_LAYOUT")
    assert (row.default, row.rule.choices) == (f"({next(iter(LAYOUTS))})", (*LAYOUTS, *ADAPTER_LAYOUTS))


# ---------------------------------------------------------------- one row more: an LLM family, a tower


def rename(folder: Path, model_type: str, new_names: dict[str, str]) -> None:
    """Make the folder one of another kind: its model_type, and other names of some tensors."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in new_names.items():
            name = name.replace(f".{old}.", f".{new}.")
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def known_to_transformers(model_type: str, like: str) -> None:
    """What a release of transformers that knows the kind brings: its config class."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, type("TestConfig", (CONFIG_MAPPING[like],), {"model_type": model_type}))


def megatron_weights(checkpoint: Path) -> dict:
    """Every weight of a Megatron checkpoint by its key."""
    rows = table_of_weights(read_geometry_of(checkpoint / "llava"))
    with open_checkpoint(newest_iteration(checkpoint), rows) as reader:
        return {row.key: reader.read(row.key, (0,) * len(row.shape), row.shape) for row in rows}


def convert_twice(tmp_path: Path, sources: dict[str, tuple[Path, Path]]) -> list[dict]:
    """Megatron weights of `plain` and `renamed`; the latter is exported to tmp_path / back."""
    found = []
    for name in ("plain", "renamed"):
        convert_to_megatron(*sources[name], tmp_path / f"{name}.ckpt", model_size="tiny", precision="fp32")
        found.append(megatron_weights(tmp_path / f"{name}.ckpt"))
    convert_to_huggingface(tmp_path / "renamed.ckpt", tmp_path / "back", model_size="tiny", precision="fp32")
    return found


def test_a_family_is_one_row(tmp_path, monkeypatch) -> None:
    """testllama is Llama under other names: the same weights, the same words for Megatron, its own template."""
    names = {"self_attn.q_proj": "attention.wq", "mlp.down_proj": "feed_forward.w2", "input_layernorm": "norm_before"}
    llm, clip = tiny_models.make_tiny_llm(tmp_path / "llm", "llama"), tiny_models.make_tiny_clip(tmp_path / "clip")
    renamed = shutil.copytree(llm, tmp_path / "renamed")
    rename(renamed, "testllama", names)
    known_to_transformers("testllama", "llama")
    with pytest.raises(UserError, match=f"'testllama'; known: {', '.join(LANGUAGE_MODELS)}"):
        convert_to_megatron(renamed, clip, tmp_path / "refused", model_size="tiny", precision="fp32")

    row = dataclasses.replace(
        LANGUAGE_MODELS["llama"],
        template="nvgpt",
        tensor_names=names,
        original=("llava_test", "LlavaTestForCausalLM"),
        original_also=(),
    )
    monkeypatch.setitem(LANGUAGE_MODELS, "testllama", row)
    expected, weights = convert_twice(tmp_path, {"plain": (llm, clip), "renamed": (renamed, clip)})
    assert weights.keys() == expected.keys()
    assert all(same_bytes(weights[key], expected[key]) for key in expected)

    theirs, ours = (read_geometry_of(tmp_path / f"{name}.ckpt/llava").language for name in ("plain", "renamed"))
    assert ours == dataclasses.replace(theirs, model_type="testllama")
    assert decoder_arguments(ours, 128) == decoder_arguments(theirs, 128)
    assert ours.family.template_for(tmp_path / "renamed.ckpt/llava/tokenizer.json") == "nvgpt"

    source, back = load_file(renamed / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    for name, tensor in source.items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):  # grown by <image>
            assert same_bytes(tensor, back[f"language_model.{name}"]), name

    convert_to_huggingface(
        tmp_path / "renamed.ckpt", tmp_path / "original", model_size="tiny", precision="fp32", layout="original"
    )
    said = json.loads((tmp_path / "original/config.json").read_text())
    assert (said["model_type"], said["architectures"]) == ("llava_test", ["LlavaTestForCausalLM"])
    again = convert_to_megatron(
        tmp_path / "original", clip, tmp_path / "again", model_size="tiny", precision="fp32"
    ).target
    assert read_geometry_of(again / "llava").language.model_type == "testllama"


def test_a_tower_is_one_row(tmp_path, monkeypatch) -> None:
    """test_vision_model is CLIP under other names, with pixel statistics and a feature layer of its own."""
    names = {"layer_norm1": "norm_before", "self_attn.out_proj": "attention.out", "pre_layrnorm": "norm_pre"}
    llm, clip = tiny_models.make_tiny_llm(tmp_path / "llm", "llama"), tiny_models.make_tiny_clip(tmp_path / "clip")
    (clip / "preprocessor_config.json").unlink()
    renamed = shutil.copytree(clip, tmp_path / "renamed")
    rename(renamed, "test_vision_model", names)
    known_to_transformers("test_vision_model", "clip_vision_model")
    with pytest.raises(UserError, match=f"'test_vision_model'; known: {', '.join(VISION_TOWERS)}"):
        convert_to_megatron(llm, renamed, tmp_path / "refused", model_size="tiny", precision="fp32")

    row = dataclasses.replace(
        VISION_TOWERS["clip_vision_model"],
        image_mean=(0.1, 0.2, 0.3),
        feature_layer=-1,
        tensor_names=names,
        published={},
    )
    monkeypatch.setitem(VISION_TOWERS, "test_vision_model", row)
    expected, weights = convert_twice(tmp_path, {"plain": (llm, clip), "renamed": (llm, renamed)})
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        # one layer more runs: the features are the last layer's
        same = weights[key][:-1] if key.startswith("vision_model.decoder.layers.") else weights[key]
        assert same_bytes(same, tensor), key
    theirs, ours = (read_geometry_of(tmp_path / f"{name}.ckpt/llava").tower for name in ("plain", "renamed"))
    assert ours == dataclasses.replace(theirs, model_type="test_vision_model", running_layers=4)
    assert (theirs.running_layers, ours.image_tokens, ours.kind.megatron_subtype) == (3, theirs.image_tokens, "clip")
    images = json.loads((tmp_path / "renamed.ckpt/llava/preprocessor_config.json").read_text())
    assert (images["image_processor_type"], images["image_mean"]) == ("CLIPImageProcessor", [0.1, 0.2, 0.3])
    source, back = load_file(renamed / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert all(same_bytes(tensor, back[f"vision_tower.{name}"]) for name, tensor in source.items())


def test_a_whole_model_of_another_kind_is_refused_with_the_rows(tmp_path) -> None:
    """The launcher lets every model_type that begins with llava through; the rows decide."""
    llm = tiny_models.make_tiny_llm(tmp_path / "llm", "llama")
    rename(llm, "llava_next_video", {})
    with pytest.raises(UserError, match=f"'llava_next_video'; known: {', '.join(LANGUAGE_MODELS)}"):
        convert_to_megatron(llm, None, tmp_path / "refused", model_size="tiny", precision="fp32")


# ---------------------------------------------------------------- one file more: a template, an accelerator

TPU = """
import os
NAME = "tpu"
DEVICES, COUNTED_BY = "TPU chips", "TPU_CHIPS"
REFUSED = {"PR=fp8": "needs a chip of the next generation", "OPTIMIZER_OFFLOAD=static": "has to wait"}
ATTENTION_BACKENDS = ("flash", "unfused")
DISTRIBUTED_BACKEND, TRANSFORMER_ENGINE, READS_IN_PARTS = "xla", False, True
def notes(): return {"PR=bf16": "is what it likes best"}
def memory_here(processes): return 16 * 2**30
def count(chosen=""): return int(os.environ.get("TPU_CHIPS", "0"))
def choice_problem(chosen): return None
def choice(chosen): return {}
def environment(nodes): return {"TPU_NODES": str(nodes)}
def is_available(): return True
def memory(): return 16 * 2**30
def optimizer_offload(fraction): return ["--tpu-offload", f"{fraction:g}"]
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository's programs, to which a test adds a file."""
    for folder in PRODUCT:
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def dry_run(copy: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Stage 1's dry run by a Python without torch."""
    script = copy / "examples/llava_mcore/run_mcore_llava.sh"
    clean = {"PATH": os.environ["PATH"], "HOME": "/", "PYTHON": sys.executable, "DRY_RUN": "1"}
    return subprocess.run(
        ["bash", script, *words], cwd=copy, env=clean | environment, capture_output=True, text=True, timeout=100
    )


def test_a_template_is_one_file(copy, tmp_path) -> None:
    inputs = Inputs(tmp_path / "inputs")
    asked = {"CONVERSATION_TEMPLATE": "loud", "ACCELERATOR": "cpu"}
    refused = dry_run(copy, inputs.training(AC="sel"), **asked)
    assert refused.returncode == 2 and "must be auto, a built-in template, or a .json or .yaml file (" in refused.stderr
    text = 'question: "Q {question}!"\nanswer: "{answer}{ending}"\n'
    (copy / "megatron_patch/data/conversation_templates/loud.yaml").write_text(text)
    done = dry_run(copy, inputs.training(AC="sel"), **asked)
    assert done.returncode == 0, done.stderr
    assert value_after(done.stdout.splitlines(), "--conversation-template") == "loud"
    program = "from megatron_patch.data.templates import find_template; print(find_template('loud').question)"
    read = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert read.stdout == "Q {question}!\n", read.stderr


def test_an_accelerator_is_one_file(copy, tmp_path) -> None:
    inputs = Inputs(tmp_path / "inputs")
    words = inputs.training(AC="sel", TP="1", GLOBAL_BATCH_SIZE="255")
    asked = {"ACCELERATOR": "tpu", "TPU_CHIPS": "3"}
    refused = dry_run(copy, words, **asked)
    assert refused.returncode == 2 and "must be auto or an accelerator (known: auto cpu cuda)" in refused.stderr
    (copy / "megatron_patch/device/tpu.py").write_text(TPU)
    for name in ("tpu", "auto"):
        done = dry_run(copy, words, **asked | {"ACCELERATOR": name, "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, done.stderr
        made = done.stdout.splitlines()
        assert value_after(made, "--nproc_per_node") == "3" and "TPU_NODES=1" in made
        assert done.stderr == "note: PR=bf16: is what it likes best\n"
        assert value_after(made, "--attention-backend") == "flash" and "CUDA_VISIBLE_DEVICES=" not in made
    for changes, message in (
        ({"PR": "fp8"}, "PR='fp8' needs a chip of the next generation"),
        ({"OPTIMIZER_OFFLOAD": "static"}, "OPTIMIZER_OFFLOAD='static' has to wait"),
    ):
        refused = dry_run(copy, inputs.training(AC="sel", TP="1", GLOBAL_BATCH_SIZE="255", **changes), **asked)
        assert refused.returncode == 2 and message in refused.stderr
    refused = dry_run(copy, words, **asked | {"NPROC_PER_NODE": "4"})
    assert "is more than the 3 TPU chips seen here (TPU_CHIPS)" in refused.stderr
    assert "found no TPU chips on this machine" in dry_run(copy, words, **asked | {"TPU_CHIPS": "0"}).stderr
    program = "from megatron_patch import device; print(device.kinds(), device.backend().NAME)"
    read = subprocess.run(
        [sys.executable, "-c", program],
        cwd=copy,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert read.stdout == "['cuda', 'tpu', 'cpu'] tpu\n", read.stderr


def test_the_offload_is_the_accelerators(tmp_path, monkeypatch) -> None:
    (tmp_path / "tpu.py").write_text(TPU)
    monkeypatch.syspath_prepend(tmp_path)
    import tpu

    monkeypatch.setattr(device, "backend", lambda: tpu)
    clip = tiny_models.make_tiny_clip(tmp_path / "clip")
    llm = tiny_models.make_tiny_llm(tmp_path / "llm", "llama")
    convert_to_megatron(llm, clip, tmp_path / "ckpt", model_size="tiny", precision="fp32")
    language = read_geometry_of(tmp_path / "ckpt/llava").language
    with pytest.raises(UserError, match="OPTIMIZER_OFFLOAD is static, which has to wait"):
        offload_arguments("static", language, 1, 1, 1, 1)
    assert offload_arguments("auto", language, 1, 1, 1, 1) == []
    monkeypatch.setattr(tpu, "memory", lambda: 0)
    assert offload_arguments("auto", language, 1, 1, 1, 1) == ["--tpu-offload", "1"]


def test_what_cuda_says(tmp_path, monkeypatch) -> None:
    """On a machine without a GPU as well: eight in nvidia-smi's list, four of them visible."""
    cuda = device.kind("cuda")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {index}: H200'\n" for index in range(8)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, expected in ((None, 8), ("4,5,6,7", 4), ("", 0), ("-1", 0), ("0,-1,2", 1), ("0,1,", 2)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cuda.count() == expected, visible
    program.write_text("#!/bin/sh\necho 'No devices found.'\n")
    assert cuda.count() == 0
    assert cuda.optimizer_offload(0.85) == [
        *("--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.85", "--use-precision-aware-optimizer")
    ]


# ---------------------------------------------------------------- CONTRIBUTING.md

ROWS = """LLM family|vision tower|kind of LLaVA|conversation template|source format of data|benchmark|launcher argument
cluster|engine that answers|accelerator|compiled kernel of a CPU|Megatron upgrade|Transformer Engine to test with
checkpoint layout"""


def test_contributing_names_a_file_for_each_change() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:]] == re.split(r"[|\n]", ROWS)
    for change, touch, _ in table[2:]:
        assert [name for name in re.findall(r"`([\w/.]+)`", touch) if (ROOT / name).exists()], change
    files = set(re.findall(r"`((?:megatron_patch|toolkits|examples|tests)/[\w/.]*)`", text))
    assert len(files) >= 15 and not [name for name in files if not (ROOT / name).exists()]
