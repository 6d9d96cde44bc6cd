"""README.md of an export: what is known, and nothing else."""

import hashlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings


@pytest.fixture(scope="module")
def checkpoint(hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an LLM and a tower; tests/training/test_export.py has one that was trained."""
    folder = tmp_path_factory.mktemp("card") / "checkpoint"
    convert_to_megatron(hub("mistral"), hub("clip"), folder, model_size="tiny", precision="fp32")
    return folder


def card(checkpoint: Path, folder: Path, **options: object) -> str:
    convert_to_huggingface(checkpoint, folder, model_size="tiny", precision="fp32", **options)
    return (folder / "README.md").read_text()


def test_parts_weights_and_versions(checkpoint: Path, tmp_path: Path) -> None:
    text = card(checkpoint, tmp_path / "my-llava", shard_bytes=10**6)
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "\n# my-llava\n" in text
    assert (
        "a `mistral` language model of `mistral`, a `clip_vision_model` vision tower of `clip` that sees 28 x 28"
        in text
    )
    files = sorted((tmp_path / "my-llava").glob("*.safetensors"))
    told = dict(re.findall(r"\| `?(\S+\.safetensors)`? \| `([0-9a-f]{64})` \|", text))
    assert len(files) > 1 and told == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert f"| transformers | `{version('transformers')}` |" in text
    # Nobody has trained it: nothing is said about that, and there is no chat template to use.
    assert "## Training" not in text and "## Data" not in text and "apply_chat_template" not in text


def test_settings_and_use(checkpoint: Path, tmp_path: Path) -> None:
    """The snippet of the card is run: it loads the folder and generates."""
    import torch
    from PIL import Image

    LlavaFolder.of(checkpoint).write_training_settings(TrainingSettings("mistral", "pad"))
    text = card(checkpoint, tmp_path / "trained")
    assert "| conversation template | `mistral` |" in text and "| images become square by | `pad` |" in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    Image.new("RGB", (30, 20)).save(tmp_path / "picture.png")
    code = snippet.replace('"trained"', repr(str(tmp_path / "trained"))).replace(
        "picture.png", str(tmp_path / "picture.png")
    )
    names: dict = {}
    exec(code.replace("max_new_tokens=64", "max_new_tokens=2"), names)
    assert names["output"].shape[1] - names["inputs"]["input_ids"].shape[1] in (1, 2)
    assert names["output"].dtype == torch.int64

    text = card(checkpoint, tmp_path / "original", layout="original", tower_name="a tower")
    assert 'load_pretrained_model("original", None, "llava")' in text and "library_name" not in text
    LlavaFolder.of(checkpoint).write_training_settings(TrainingSettings("v1", image_tiles=(2, 2)))
    text = card(checkpoint, tmp_path / "tiles")
    assert "no chat_template.jinja: IMAGE_TILES=2x2" in text and "apply_chat_template" not in text
    assert "| tiles of an image | `2x2 and a thumbnail` |" in text
