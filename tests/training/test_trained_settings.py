"""A run writes down what it was trained with, is resumed with nothing else, and the next stage takes it over."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_patch.conversion import convert_to_huggingface
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from megatron_patch.training.config import read_config
from tests.training.launching import Workspace, run
from tests.training.test_config import argv

SETTINGS = TrainingSettings("mistral", "pad", (2, 1), exif_orientation=False, image_conv_front=True)


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT_BASEPATH of a run of two iterations with SETTINGS."""
    output = tmp_path_factory.mktemp("trained") / "out"
    stale = LlavaFolder.of(output / "checkpoint")  # a start before that saved no checkpoint
    shutil.copytree(workspace.checkpoint / "llava", stale.path)
    stale.write_training_settings(TrainingSettings("v0"))
    options = {"IMAGE_ASPECT_RATIO": "pad", "IMAGE_TILES": "2x1", "EXIF_ORIENTATION": "false", "EVAL_ITERS": 0}
    run(workspace, output, **options, IMAGE_CONV_FRONT="true", TRAIN_ITERS=2, LR_WARMUP_ITERS=1)
    return output


def test_a_run_writes_what_it_trained_with(trained: Path, workspace: Workspace, tmp_path: Path) -> None:
    folder = LlavaFolder.of(trained / "checkpoint")
    assert folder.training_settings == SETTINGS
    assert not list((trained / "checkpoint").glob("llava.*")) and not list(folder.path.glob("*.tmp*"))
    assert not LlavaFolder.of(workspace.checkpoint).path.joinpath("llava_training.json").exists()
    convert_to_huggingface(trained / "checkpoint", tmp_path / "hub", model_size="tiny", precision="fp32")
    assert LlavaFolder(tmp_path / "hub").training_settings == SETTINGS
    assert json.loads((tmp_path / "hub/preprocessor_config.json").read_text())["do_pad"] is True


def test_another_template_is_refused_on_resume(trained: Path, workspace: Workspace) -> None:
    """Through the launcher, which checks before the processes start; nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in (trained / "checkpoint").rglob("*")}
    printed = run(workspace, trained, 2, CHECK="true", TRAIN_ITERS=4, CONVERSATION_TEMPLATE="v1", EVAL_ITERS=0)
    assert printed.count("\n") == 1 and printed.startswith(
        f"error: {trained / 'checkpoint'}: the run cannot be resumed"
    )
    assert "(CONVERSATION_TEMPLATE is v1, wanted mistral); set what is wanted, or pass this checkpoint as" in printed
    assert before == {path: path.stat().st_mtime_ns for path in (trained / "checkpoint").rglob("*")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_aspect_ratio": "crop"}, "IMAGE_ASPECT_RATIO is crop, wanted pad"),
        ({"image_tiles": "1x1"}, "IMAGE_TILES is 1x1, wanted 2x1"),
        ({"exif_orientation": ""}, "EXIF_ORIENTATION is true, wanted false"),
        ({"image_start_end": ""}, "IMAGE_START_END is true, wanted false"),
        (
            {"no_image_conv_front": "", "image_aspect_ratio": "stretch"},
            "IMAGE_ASPECT_RATIO is stretch, wanted pad; IMAGE_CONV_FRONT is false, wanted true",
        ),
    ],
)
def test_other_images_are_refused_on_resume(
    changes: dict[str, str], told: str, trained: Path, workspace: Workspace
) -> None:
    with pytest.raises(UserError) as refused:
        read_config(argv(workspace, load=str(trained / "checkpoint"), **changes))
    assert f"({told})" in str(refused.value)


def test_a_resume_knows_by_itself_and_takes_the_same_words(trained: Path, workspace: Workspace) -> None:
    same = {"conversation_template": "mistral", "image_aspect_ratio": "pad", "image_tiles": "2x1"}
    for words in ({}, same, same | {"no_exif_orientation": "", "image_conv_front": ""}):
        found = read_config(argv(workspace, load=str(trained / "checkpoint"), **words))
        assert (found.trained_with, found.warning) == (SETTINGS, None)
        data = found.data
        assert (data.template, data.image_aspect_ratio, data.tiles) == ("mistral", "pad", 3)
        assert (data.apply_exif_orientation, data.image_conv_front) == (False, True)


def test_a_run_of_before_the_settings_were_saved_is_resumed(
    trained: Path, workspace: Workspace, tmp_path: Path
) -> None:
    older = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoint", older)
    (older / "llava/llava_training.json").unlink()
    found = read_config(argv(workspace, load=str(older), image_aspect_ratio="stretch", conversation_template="v1"))
    assert found.trained_with == TrainingSettings("v1", "stretch") and found.warning is None


def test_the_next_stage_sees_images_as_the_checkpoint_did(trained: Path, workspace: Workspace) -> None:
    """One sentence where it is told otherwise; another template is what stages are for."""
    start = {"init_from": str(trained / "checkpoint"), "conversation_template": "v1"}
    found = read_config(argv(workspace, **start))
    assert found.trained_with == TrainingSettings("v1", "pad", (2, 1), False, False, True) and found.warning is None
    found = read_config(argv(workspace, **start, image_aspect_ratio="crop", image_tiles="1x1"))
    assert (found.data.image_aspect_ratio, found.data.tiles) == ("crop", 1)
    assert "was trained with other images: IMAGE_ASPECT_RATIO is crop and was pad, IMAGE_TILES is 1x1" in found.warning
    assert found.warning.startswith("warning: ") and "\n" not in found.warning


def test_weights_from_nothing_take_over_no_images(trained: Path, workspace: Workspace) -> None:
    words = argv(workspace, init_from="none", tokenizer_path=str(trained / "checkpoint/llava"))
    assert read_config(words).trained_with == TrainingSettings("mistral")
