"""An exported folder, used as anybody would use it: in this transformers, the one before, the original's way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron, usage_files
from megatron_patch.data.conversation import ConversationEncoder, Exchange
from megatron_patch.data.image import image_to_pixels
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from megatron_patch.tokenizer_files import load_tokenizer
from tests.conversion.original_folders import use_sentencepiece
from tests.conversion.use_export import IMAGE_INDEX, MORE, QUESTION, make_image, use
from tests.data.golden.derive import USER_ASSISTANT
from tests.package_cache import installed
from tests.tiny_models import make_tiny_clip, make_tiny_llava, make_tiny_llm

ROOT = Path(__file__).parents[2]
# The last of version 4, and what it needs in other versions than ours, or at all.
OLDER = (
    *("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2", "requests==2.34.2"),
    *("urllib3==2.8.0", "idna==3.20", "certifi==2026.10.19.post1", "charset-normalizer==3.5.3"),
)
# Rope bases and scaling, windows, tied and untied heads; each aspect ratio with each way of the towers.
CASES = {
    "hub_llama": ("llama", "clip", TrainingSettings("v1", "pad")),
    "hub_mistral": ("mistral", "siglip", TrainingSettings("mistral", "pad")),
    "hub_qwen2": ("qwen2", "clip", TrainingSettings("chatml", "stretch", image_conv_front=True)),
    "hub_llama3": ("llama3", "clip", TrainingSettings("llama_2", "crop")),
    "hub_window": ("mistral_window", "siglip", TrainingSettings("v0", "crop")),
    "hub_smollm2": ("smollm2", "siglip_last", TrainingSettings("v1", "stretch")),
    "hub_qwen3": ("qwen3", "clip", TrainingSettings("qwen", "crop")),
    "hub_untied": ("qwen2_untied", "clip_b32", TrainingSettings("chatml_direct", "pad")),
}


def exported(root: Path, name: str) -> Path:
    family, tower, settings = CASES[name]
    make_tiny_llava(root / "source" / name, family, tower=tower)
    checkpoint = root / "checkpoint" / name
    convert_to_megatron(root / "source" / name, None, checkpoint, model_size="tiny", precision="fp32")
    LlavaFolder.of(checkpoint).write_training_settings(settings)
    convert_to_huggingface(checkpoint, root / name, model_size="tiny", precision="fp32")
    return root / name


def trained(root: Path, name: str) -> dict[str, Any]:
    """What training makes of the same questions: ids of both chats, and the pixels."""
    folder = LlavaFolder.of(root / "checkpoint" / name)
    settings, geometry = CASES[name][2], folder.geometry()
    encoder = ConversationEncoder(
        load_tokenizer(folder.path),
        settings.conversation_template,
        geometry.image_token_id,
        geometry.tower.image_tokens,
        image_conv_front=settings.image_conv_front,
    )
    first = f"<image>\n{QUESTION}"
    way = folder.image_processing(geometry.tower.side_px)
    args = (way["image_mean"], way["center_crop"], way["resample"])
    pixels = image_to_pixels(make_image(), geometry.tower.side_px, settings.image_aspect_ratio, *args)
    mean, std = (np.array(way[key])[:, None, None] for key in ("image_mean", "image_std"))
    return {
        "ids": [
            encoder.encode([Exchange(first, None)]).ids,
            encoder.encode([Exchange(first, "A seven."), Exchange(MORE, None)]).ids,
        ],
        "pixels": ((pixels / 255 - mean) / std).flatten(),
    }


def assert_as_trained(result: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    assert result["ids"] == wanted["ids"], name
    np.testing.assert_allclose(result["pixels"], wanted["pixels"], rtol=0, atol=1e-5, err_msg=name)
    assert result["pipeline"] and result["greedy"], name


def test_chat_pipeline_and_pixels_are_training_s(tmp_path: Path) -> None:
    names = ("hub_llama", "hub_qwen2")
    results = use([exported(tmp_path, name) for name in names], make_image())
    for name in names:
        assert_as_trained(results[name], trained(tmp_path, name), name)
    # What transformers 4.57 stumbles over, or reads otherwise without a word: the slow test below has it do so.
    config = json.loads((tmp_path / "hub_qwen2/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and not {"backend", "extra_special_tokens"} & set(
        config
    )
    text = json.loads((tmp_path / "hub_qwen2/config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (1e6, None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a LLaVA that brought the chat template of its language model along."""
    source = make_tiny_llava(tmp_path / "source", "llama")
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    convert_to_megatron(source, None, tmp_path / "checkpoint", model_size="tiny", precision="fp32")
    return tmp_path / "checkpoint"


def export(checkpoint: Path, target: Path, settings: TrainingSettings | None = None) -> list[str]:
    if settings is not None:
        LlavaFolder.of(checkpoint).write_training_settings(settings)
    return convert_to_huggingface(checkpoint, target, model_size="tiny", precision="fp32").notes


def test_a_chat_template_is_the_training_s_or_none(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """An untrained export keeps that of its source; what jinja cannot say is left out with the reason."""
    export(checkpoint, tmp_path / "untrained")
    assert (tmp_path / "untrained/chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    export(checkpoint, tmp_path / "trained", TrainingSettings("v1"))
    assert "curious user" in (tmp_path / "trained/chat_template.jinja").read_text()
    generation = json.loads((tmp_path / "trained/generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "own.yaml").write_text("question: x")
    for number, (settings, told) in enumerate(
        (
            (TrainingSettings("v1", image_tiles=(2, 2)), "no chat_template.jinja: IMAGE_TILES=2x2"),
            (TrainingSettings("chatml"), "no chat_template.jinja: tokenizer"),  # has no <|im_end|>
            (TrainingSettings(str(tmp_path / "own.yaml")), "no chat_template.jinja: template"),
            (TrainingSettings("v1"), "no chat_template.jinja: what jinja makes of the template is not"),
        )
    ):
        if number == 3:
            monkeypatch.setattr(usage_files, "chat_template", lambda *texts, **options: "{{ 'something else' }}")
        notes = export(checkpoint, tmp_path / str(number), settings)
        assert any(note.startswith(told) for note in notes), notes
        assert not (tmp_path / str(number) / "chat_template.jinja").exists()


def test_a_tokenizer_that_is_not_the_training_s_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    other = load_tokenizer(ROOT / "tests/data/golden/tokenizers/qwen").backend_tokenizer
    monkeypatch.setattr(usage_files, "with_exact_offsets", lambda backend: other)
    with pytest.raises(UserError, match=r"the exported tokenizer cuts 'What is in the picture\?' into"):
        export(checkpoint, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


@pytest.mark.slow
def test_the_same_tokens_in_the_transformers_before(tmp_path: Path) -> None:
    """Also through the original's way, from tokenizer.model: no fast tokenizer, spaces of both kinds."""
    folders = [exported(tmp_path, name) for name in CASES]
    clip = make_tiny_clip(tmp_path / "clip")
    for name, legacy in (("plain", False), ("legacy", True)):
        llm = tmp_path / f"llm_{name}"
        make_tiny_llm(llm, "llama")
        use_sentencepiece(llm, [f"USER: What is {number} in the picture? ASSISTANT: A digit." for number in range(200)])
        config = json.loads((llm / "tokenizer_config.json").read_text())
        (llm / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy}))
        checkpoint = tmp_path / "checkpoint" / name
        tokens = ["<im_start>", "<im_end>"]
        convert_to_megatron(llm, clip, checkpoint, model_size="tiny", precision="fp32", add_tokens=tokens)
        settings = TrainingSettings("v1", "pad", image_start_end=legacy)
        LlavaFolder.of(checkpoint).write_training_settings(settings)
        for layout, more in (("hub", {}), ("original", {"tower_name": str(clip)})):
            target = tmp_path / f"{layout}_of_{name}"
            convert_to_huggingface(checkpoint, target, model_size="tiny", precision="fp32", layout=layout, **more)
            assert (target / "tokenizer.model").read_bytes() == (llm / "tokenizer.model").read_bytes()
            folders.append(target)
    ours = use([folder for folder in folders if folder.name.startswith("hub")], make_image())
    theirs = in_older_transformers(folders, tmp_path / "result.json")
    assert theirs.pop("version") == "4.57.6" and ours.pop("version") == "5.23.0"
    for name, result in ours.items():
        assert theirs[name]["ids"] == result["ids"] and theirs[name]["tokens"] == result["tokens"], name
        np.testing.assert_allclose(theirs[name]["pixels"], result["pixels"], rtol=0, atol=1e-5, err_msg=name)
        assert theirs[name]["pipeline"] and theirs[name]["greedy"], name
    for name in CASES:
        assert_as_trained(theirs[name], trained(tmp_path, name), name)
    for name, mark in (("plain", "<image>"), ("legacy", "<im_start><image><im_end>")):
        original, hub = theirs[f"original_of_{name}"], theirs[f"hub_of_{name}"]
        assert original["type"] == "LlamaTokenizer"
        assert original["prompt"] == f"{USER_ASSISTANT} USER: {mark}\n{QUESTION} ASSISTANT:"
        where = original["ids"].index(IMAGE_INDEX)
        image_id = LlavaFolder(tmp_path / f"hub_of_{name}").geometry().image_token_id
        expanded = [*original["ids"][:where], *[image_id] * 16, *original["ids"][where + 1 :]]
        assert expanded == hub["ids"][0] and original["tokens"] == hub["tokens"][0]


def in_older_transformers(folders: list[Path], result: Path) -> dict[str, Any]:
    try:
        packages = installed(*OLDER)
    except FileNotFoundError as error:
        pytest.skip(f"{', '.join(OLDER)} cannot be fetched from the package registry: {error}")
    command = [sys.executable, "-m", "tests.conversion.use_export", str(result), *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())
