"""Talking in the terminal: what was said before belongs to the next prompt."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_patch.data.conversation import Exchange
from megatron_patch.data.video import FrameSampling
from megatron_patch.errors import UserError
from megatron_patch.inference import Engine, Request, Sampling, open_engine
from megatron_patch.inference.chat import Chat
from tests import tiny_models
from tests.inference.conftest import Folders
from tests.warm import interpreter

SCRIPT = Path(__file__).resolve().parents[2] / "examples/llava_mcore/chat_llava.sh"
SHORT = Sampling(max_new_tokens=6)


def right(engine: Engine, turns: list[tuple[str, str | None]], *images: Path) -> str:
    request = Request("chat", tuple(Exchange(*turn) for turn in turns), images)
    return engine.answer([request], SHORT)[0].text


def test_questions_build_on_each_other(engine: Engine, folders: Folders):
    image = [folders.images / f"{number}.png" for number in range(2)]
    chat = Chat(engine, SHORT)
    chat.add_image(image[0])
    first = "".join(chat.ask("What is this?"))
    assert first == right(engine, [("<image>\nWhat is this?", None)], image[0])
    second = "".join(chat.ask("What colour?"))
    turns = [("<image>\nWhat is this?", first), ("What colour?", None)]
    assert second == right(engine, turns, image[0])
    chat.add_image(image[1])
    with pytest.raises(UserError, match="wanted fewer than 512"):
        list(chat.ask("long " * 600))
    third = "".join(chat.ask("And this?"))
    turns = [turns[0], ("What colour?", second), ("<image>\nAnd this?", None)]
    assert third == right(engine, turns, *image)
    chat.reset()
    assert "".join(chat.ask("Hi")) == right(engine, [("Hi", None)])


def test_a_stopped_answer_counts(engine: Engine):
    chat = Chat(engine, SHORT)
    pieces = chat.ask("What is this?")
    said = next(pieces)
    pieces.close()
    turns = [("What is this?", said), ("And?", None)]
    assert "".join(chat.ask("And?")) == right(engine, turns)


def test_what_is_no_image_is_refused(engine: Engine, tmp_path: Path):
    chat = Chat(engine, SHORT)
    with pytest.raises(UserError, match="No such file"):
        chat.add_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="not an image"):
        chat.add_image(tmp_path / "text.png")
    assert "".join(chat.ask("Hi")) == right(engine, [("Hi", None)])


def test_videos_and_images_of_a_conversation(engine: Engine, folders: Folders, tmp_path: Path):
    """A folder of frames stays part of the conversation; a model that sees no videos refuses it at once."""
    tiny_models.make_tiny_llava(tmp_path / "onevision", "qwen2", tower="siglip_last", kind="llava_onevision")
    (tmp_path / "clip").mkdir()
    frames = [(tmp_path / "clip" / f"{number}.png") for number in range(3)]
    for number, frame in enumerate(frames):
        frame.write_bytes((folders.images / f"{number}.png").read_bytes())
    image = folders.images / "3.png"
    with pytest.raises(UserError, match="wanted a LLaVA-OneVision"):
        Chat(engine, SHORT).add_video(tmp_path / "clip")
    with open_engine(tmp_path / "onevision") as onevision:
        chat = Chat(onevision, SHORT)
        with pytest.raises(UserError, match="none: video missing"):
            chat.add_video(tmp_path / "none")
        chat.add_image(image)
        assert chat.add_video(tmp_path / "clip", FrameSampling(2)) == 2
        first = "".join(chat.ask("What?"))
        turns = [Exchange("<image>\n<video>\nWhat?", None)]
        video = (frames[0], frames[2])
        assert first == onevision.answer([Request("chat", tuple(turns), (image,), videos=(video,))], SHORT)[0].text
        assert chat.add_video(tmp_path / "clip") == 3
        second = "".join(chat.ask("And?"))
        turns = [Exchange(turns[0].question, first), Exchange("<video>\nAnd?", None)]
        request = Request("chat", tuple(turns), (image,), videos=(video, tuple(frames)))
        assert second == onevision.answer([request], SHORT)[0].text
        chat.reset()
        alone = onevision.answer([Request("chat", (Exchange("Hi", None),))], SHORT)[0].text
        assert "".join(chat.ask("Hi")) == alone != second


def test_the_command(engine: Engine, folders: Folders):
    image = folders.images / "0.png"
    lines = [
        "What is this?",
        "/image none.png",
        f"/video {folders.images}",
        "/nothing",
        "/help",
        "/reset",
        f"/image {image}",
        "What?",
        "/quit",
        "no",
    ]
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folders.exported), "--max-new-tokens", "6"],
        env=os.environ | {"PYTHON": interpreter.python(), "OMP_NUM_THREADS": "1"},
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.split("> ")
    assert right(engine, [("What is this?", None)]) in done.stdout
    assert "/reset        begin a new conversation" in done.stdout
    assert told[-2].strip() == right(engine, [("<image>\nWhat?", None)], image)
    assert "error: none.png: No such file or directory\n" in done.stderr
    assert "wanted a LLaVA-OneVision" in done.stderr
    assert "error: '/nothing' is no command; /help lists them\n" in done.stderr
