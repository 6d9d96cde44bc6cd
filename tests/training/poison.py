"""What makes a loss NaN: one record, which alone uses a token whose embedding is NaN, or weights that always do; and
weights whose loss is fine and whose gradient overflows.
"""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models
from tests.training.conftest import write_dataset
from tests.training.launching import ROOT, Workspace

TOKEN, RECORD = "~", "r7"


def poisoned_workspace(folder: Path) -> Workspace:
    """Checkpoint and 48 training records of which RECORD is poison; every epoch of 6 steps meets it once."""
    from transformers import AutoTokenizer

    source = tiny_models.make_tiny_llava(folder / "hf", "mistral")
    token = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids(TOKEN)
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][token] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert_to_megatron(source, None, folder / "checkpoint", precision="fp32", model_size="tiny")
    write_dataset(folder / "records", records=48)
    records = folder / "records" / "records.json"
    question = f"What colour is the picture {TOKEN}?"
    text = records.read_text().split(f'"id": "{RECORD}"')
    records.write_text(f'"id": "{RECORD}"'.join([text[0], text[1].replace("What colour is the picture?", question, 1)]))
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    words = [str(folder / "records"), "--split", "1,0,0"]
    subprocess.run([sys.executable, str(converter), *words], check=True, capture_output=True)
    return Workspace(folder / "checkpoint", folder / "records" / "wds")


def spoilt_checkpoint(folder: Path) -> Path:
    """A checkpoint with which every loss is NaN: the norm before the output layer is."""
    source = tiny_models.make_tiny_llava(folder / "hf", "mistral")
    weights = load_file(source / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("model.norm.weight"))
    weights[name][:] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert_to_megatron(source, None, folder / "checkpoint", precision="fp32", model_size="tiny")
    return folder / "checkpoint"


def overflowing_checkpoint(folder: Path) -> Path:
    """A checkpoint whose losses are finite and whose gradients are not: a projector of tiny times huge weights."""
    source = tiny_models.make_tiny_llava(folder / "hf", "mistral")
    weights = load_file(source / "model.safetensors")
    for layer, factor in (("linear_1", 1e-30), ("linear_2.weight", 1e30)):
        names = [name for name in weights if f"multi_modal_projector.{layer}" in name]
        assert names
        for name in names:
            weights[name] *= factor
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert_to_megatron(source, None, folder / "checkpoint", precision="fp32", model_size="tiny")
    return folder / "checkpoint"
