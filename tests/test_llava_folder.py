"""The llava/ folder: settings come back as they were written, older and newer folders, names that stand once."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from megatron_patch import llava_folder
from megatron_patch.arguments import auto_template
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from tests import tiny_models

ROOT = Path(__file__).parents[1]
OTHERS = TrainingSettings("v1", "pad", (2, 3), exif_orientation=False, image_start_end=True, image_conv_front=True)


def test_settings_come_back_as_written(tmp_path: Path) -> None:
    folder = LlavaFolder(tmp_path)
    assert folder.training_settings is None and folder.provenance == {}
    defaults = TrainingSettings(None)
    for settings in (OTHERS, defaults):
        folder.write_training_settings(settings)
        assert folder.training_settings == settings
    every = {field.name for field in dataclasses.fields(TrainingSettings)}
    assert set(OTHERS.differences(defaults)) == every and OTHERS.differences(OTHERS) == []
    assert [path.name for path in tmp_path.iterdir()] == ["llava_training.json"]


def test_the_file_is_as_its_docstring_says(tmp_path: Path) -> None:
    LlavaFolder(tmp_path).write_training_settings(OTHERS)
    assert json.loads((tmp_path / "llava_training.json").read_text()) == {
        "version": 1,
        "conversation_template": "v1",
        "image_aspect_ratio": "pad",
        "image_tiles": "2x3",
        "exif_orientation": False,
        "image_start_end": True,
        "image_conv_front": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"its version is 2, wanted 1; read this checkpoint with the toolkit that wrote it"),
        ({"version": None}, "its version is None"),
        ({"image_tiles": "2"}, "is damaged .*; wanted conversation_template, image_aspect_ratio, image_tiles"),
        ({"image_tiles": "0x1"}, "is damaged"),
        ({"image_aspect_ratio": "squash"}, "is damaged .*squash"),
        ({"exif_orientation": "yes"}, "is damaged .*exif_orientation 'yes'"),
        ({"colour": "red"}, "is damaged .*colour"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    LlavaFolder(tmp_path).write_training_settings(OTHERS)
    file = tmp_path / "llava_training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as refused:
        _ = LlavaFolder(tmp_path).training_settings
    assert str(file) in str(refused.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    folder = LlavaFolder(tmp_path)
    folder.write_training_settings(OTHERS)

    def fail(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", fail)
    for write in (
        lambda: folder.write_training_settings(TrainingSettings("plain")),
        lambda: folder.write_provenance("{}"),
    ):
        with pytest.raises(OSError, match="killed"):
            write()
    assert folder.training_settings == OTHERS and folder.provenance == {}
    assert [path.name for path in tmp_path.iterdir()] == ["llava_training.json"]


def test_a_template_of_ones_own_moves_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.YAML").write_text("question: a")
    (tmp_path / "one").mkdir()
    given = TrainingSettings(str(tmp_path / "mine.YAML"))
    LlavaFolder(tmp_path / "one").write_training_settings(given)
    (tmp_path / "one").rename(tmp_path / "two")
    saved = LlavaFolder(tmp_path / "two").training_settings
    assert saved.conversation_template == str(tmp_path / "two" / "conversation_template.yaml")
    assert Path(saved.conversation_template).read_text() == "question: a"
    assert saved.differences(given) == []
    (tmp_path / "mine.YAML").write_text("question: b")
    assert saved.differences(given) == ["conversation_template"]
    LlavaFolder(tmp_path / "two").write_training_settings(saved)
    assert LlavaFolder(tmp_path / "two").training_settings == saved


@pytest.mark.parametrize(
    ("family", "llama_3", "trained", "here", "next_stage"),
    [
        ("llama", False, None, "v1", "v1"),
        ("mistral", False, None, "mistral", "mistral"),
        ("llama", True, None, "llama_3", "llama_3"),
        ("llama", True, "plain", "plain", "llama_3"),
        ("llama", True, "v0", "v0", "v0"),
    ],
)
def test_auto_is_the_trained_template_or_the_models(
    tmp_path: Path, family: str, llama_3: bool, trained: str | None, here: str, next_stage: str
) -> None:
    """`plain` is stage 1's: evaluation asks with it, the next stage does not take it over."""
    tiny_models.make_tiny_llava(tmp_path, family)
    if llama_3:
        tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"note": "<|start_header_id|>"}))
    folder = LlavaFolder(tmp_path)
    if trained:
        folder.write_training_settings(TrainingSettings(trained))
    assert (auto_template(folder), auto_template(folder, for_next_stage=True)) == (here, next_stage)


def test_the_names_of_its_files_stand_only_there() -> None:
    """Text in an error message or docstring may name a file; a path made of the name may not."""
    names = (
        llava_folder.NAME,
        *(getattr(llava_folder, name) for name in ("PROVENANCE", "UNTRAINED_TOWER", "TRAINING")),
    )
    names += (llava_folder.IMAGE_PROCESSOR, llava_folder.PROCESSOR, llava_folder.TOKENIZER_CONFIG)
    found = []
    for path in (path for room in ("megatron_patch", "toolkits", "examples") for path in (ROOT / room).rglob("*.py")):
        text = path.read_text()
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names if f'/ "{name}"' in text]
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names[1:4] if f'"{name}"' in text]
    own = "megatron_patch/llava_folder.py: "
    others = [line for line in found if not line.startswith(own)]
    # each makes a folder of a vision tower or of a whole LLaVA, which is no checkpoint's
    makers = [
        "toolkits/benchmark/workload.py: processor_config.json",
        "toolkits/model_checkpoints_convertor/llava/benchmark_conversion.py: preprocessor_config.json",
    ]
    assert sorted(others) == makers and found != others
