"""Videos on their way into shards: which frames, what is rejected, and that nobody's help changes the bytes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_patch.data import video
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.preparation.parts import Part
from megatron_patch.data.preparation.pipeline import LengthLimit, Options, prepare
from megatron_patch.data.preparation.sources import LlavaSource, LlavaVideoSource
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.video import FrameSampling, read_frames
from megatron_patch.errors import UserError
from megatron_patch.tile_plan import video_plan
from tests import tiny_models
from tests.data.factories import image_bytes
from tests.data.preparation.test_pipeline import ROOT, files_of
from tests.data.torture import turns
from tests.videos import GREY_STEP, damage, pyav, turn_clockwise, write_video

CONVERTER = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_video_to_wds.py"


def originals_places(total: int, fps: float, wanted_fps: float, most: int) -> list[int]:
    """As LLaVA-NeXT's process_video_with_decord chooses them, with frames_upbound."""
    regular = list(range(0, total, round(fps / wanted_fps)))
    return np.linspace(0, total - 1, most, dtype=int).tolist() if len(regular) > most else regular


def test_frames_are_those_of_the_original() -> None:
    for total in (32, 33, 100, 301, 1000):
        assert FrameSampling(32).places(total, 30.0) == np.linspace(0, total - 1, 32, dtype=int).tolist()
        for fps, wanted in ((30.0, 1.0), (29.97, 2.0), (10.0, 1.0)):
            assert FrameSampling(32, wanted).places(total, fps) == originals_places(total, fps, wanted, 32)
    assert FrameSampling(32).places(5, 30.0) == [0, 1, 2, 3, 4], "frames are repeated"
    assert FrameSampling(32, 60.0).places(5, 30.0) == [0, 1, 2, 3, 4]
    assert FrameSampling(4, 1.0).places(9, None) == [0, 2, 5, 8]
    assert FrameSampling(1).places(9, None) == [0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 0}, "frames per video is 0, wanted at least 1"),
        ({"fps": 0.0}, "frames per second is 0.0, wanted a number above 0"),
        ({"fps": float("nan")}, "frames per second is nan"),
        ({"format": "gif"}, "wanted jpeg or png"),
        ({"quality": 96}, "JPEG quality of frames is 96, wanted a number from 1 to 95"),
    ],
)
def test_samplings_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FrameSampling(**options)


def write_frames(folder: Path, count: int, size: tuple[int, int] = (20, 16)) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"f{number}.png").write_bytes(image_bytes(number, size))


def test_a_folder_of_frames_is_taken_as_it_is(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", 12)
    (tmp_path / "v/notes.txt").write_text("no frame")
    (tmp_path / "v/more.png").mkdir()
    assert read_frames(str(tmp_path / "v"), FrameSampling(4)) == [image_bytes(number) for number in (0, 3, 7, 11)]


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_a_file_gives_the_frames_asked_for(form: str, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 20)
    frames = [
        Image.open(io.BytesIO(data)) for data in read_frames(str(tmp_path / "v.mp4"), FrameSampling(4, format=form))
    ]
    assert [image.format for image in frames] == [form.upper()] * 4 and frames[0].size == (64, 48)
    levels = [np.asarray(image).mean() for image in frames]
    assert levels == pytest.approx([GREY_STEP * number for number in (0, 6, 12, 19)], abs=6)
    per_second = read_frames(str(tmp_path / "v.mp4"), FrameSampling(32, fps=2.0, format="png"))
    assert [np.asarray(Image.open(io.BytesIO(data))).mean() for data in per_second] == pytest.approx(
        [GREY_STEP * number for number in (0, 5, 10, 15)], abs=6
    )


def test_quality_is_that_of_the_option(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 3)
    tables = []
    for quality in (40, 90):
        (data,) = read_frames(str(tmp_path / "v.mp4"), FrameSampling(1, quality=quality))
        expected = io.BytesIO()
        Image.new("RGB", (64, 48)).save(expected, "jpeg", quality=quality)
        tables.append(Image.open(io.BytesIO(data)).quantization)
        assert tables[-1] == Image.open(expected).quantization
    assert tables[0] != tables[1]


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 2)
    turn_clockwise(tmp_path / "v.mp4")
    (frame,) = read_frames(str(tmp_path / "v.mp4"), FrameSampling(1))
    assert Image.open(io.BytesIO(frame)).size == (48, 64)


def test_a_header_that_tells_another_number_of_frames_is_not_believed(tmp_path: Path, monkeypatch) -> None:
    write_video(tmp_path / "v.mp4", 10)
    monkeypatch.setattr(video, "_count", lambda path: (40, 10.0))
    frames = read_frames(str(tmp_path / "v.mp4"), FrameSampling(4, format="png"))
    levels = [np.asarray(Image.open(io.BytesIO(data))).mean() for data in frames]
    assert levels == pytest.approx([GREY_STEP * number for number in (0, 3, 6, 9)], abs=6)


def broken(folder: Path) -> dict[str, tuple[str, str]]:
    """Videos that cannot be used; {name: (reason, what is said)}."""
    write_video(folder / "whole.mp4", 10)
    data = (folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "text.mp4").write_bytes(b"no video" * 100)
    (folder / "empty.mp4").touch()
    (folder / "nothing").mkdir()
    write_frames(folder / "bad_frame", 3)
    (folder / "bad_frame/f1.png").write_bytes(image_bytes(1)[:-30])
    os.mkfifo(folder / "pipe.mp4")
    return {
        "cut.mp4": ("video unreadable", "cut.mp4: "),
        "text.mp4": ("video unreadable", "InvalidDataError"),
        "empty.mp4": ("video unreadable", "InvalidDataError"),
        "nothing": ("video unreadable", "holds no frames"),
        "bad_frame": ("image truncated", "frame 2 of the 3 chosen"),
        "pipe.mp4": ("video missing", "wanted a file"),
        "absent.mp4": ("video missing", "not in"),
        "../whole.mp4": ("video missing", "outside the video folder"),
        "/etc": ("video missing", "outside the video folder"),
    }


def make_videos(root: Path, count: int = 3) -> LlavaVideoSource:
    """Records with a file, a folder, both beside an image, text alone; `count` more with folders."""
    for name in ("videos", "images"):
        (root / name).mkdir(parents=True)
    write_video(root / "videos/a.mp4", 20)
    write_frames(root / "videos/b", 5)
    (root / "images/i.png").write_bytes(image_bytes(3))
    records = [
        {"id": "one", "video": "a.mp4", "conversations": turns("<image>\nwhat?", "a")},
        {"id": "two", "video": ["b", "a.mp4"], "conversations": turns("<video> or <video>", "b")},
        {"id": "mix", "video": "b", "image": "i.png", "conversations": turns("<video> like <image>", "c")},
        {"id": "text", "video": None, "conversations": turns("hello", "d")},
        {"id": "image", "image": "i.png", "conversations": turns("<image>", "e")},
    ]
    for number in range(count):
        write_frames(root / f"videos/{number}", number + 2)
        records.append({"id": f"m{number}", "video": str(number), "conversations": turns("<image>", f"m{number}")})
    (root / "data.json").write_text(json.dumps(records))
    return source_of(root)


def source_of(root: Path, **sampling: Any) -> LlavaVideoSource:
    return LlavaVideoSource(
        root / "data.json", [root / "images"], [root / "videos"], FrameSampling(**{"frames": 4} | sampling)
    )


def test_records_of_all_kinds_stand_in_the_shards(tmp_path: Path) -> None:
    prepare(make_videos(tmp_path, 0), tmp_path / "wds", Options((1,), workers=0))
    folder = EnergonFolder(str(tmp_path / "wds"), "train")
    samples = [folder[number] for number in range(len(folder))]
    told = [json.loads(sample["json"]) for sample in samples]
    assert [content.get("video_frames") for content in told] == [[4], [4, 4], [4], None, None]
    assert [content.get("video") for content in told] == ["a.mp4", ["b", "a.mp4"], "b", None, None]
    assert told[0]["conversations"][0]["value"] == "<video>\nwhat?"
    records = [cook(sample) for sample in samples]
    assert [(len(record.images), list(map(len, record.videos))) for record in records] == [
        (0, [4]),
        (0, [4, 4]),
        (1, [4]),
        (0, []),
        (1, []),
    ]
    frames = tuple(image_bytes(number) for number in (0, 1, 2, 4))
    assert records[1].videos == (frames, records[0].videos[0]) and records[2].videos == (frames,)
    assert records[2].images == (image_bytes(3),) == records[4].images
    assert [list(sample)[:2] for sample in samples[2:4]] == [["__key__", "jpg"], ["__key__", "json"]]
    ledger = json.loads((tmp_path / "wds/ledger.json").read_text())
    assert ledger["text_only"] == 1 and ledger["rejected"] == 0


def test_what_is_broken_is_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "images").mkdir()
    expected = broken(tmp_path / "videos")
    odd = [
        {"id": "no mark", "video": "whole.mp4", "conversations": turns("what?", "a")},
        {"id": "both marks", "video": "whole.mp4", "conversations": turns("<image> <video>", "a")},
        {"id": "number", "video": 7, "conversations": turns("<video>", "a")},
        {"id": "no turns", "video": "whole.mp4", "conversations": "<video>"},
        {"id": "good", "video": "whole.mp4", "conversations": turns("<video>", "a")},
    ]
    records = [{"id": name, "video": name, "conversations": turns("<image>", name)} for name in expected]
    (tmp_path / "data.json").write_text(json.dumps([*records, *odd]))
    prepare(source_of(tmp_path), tmp_path / "wds", Options((1,), keep_going=True, workers=0))
    lines = [json.loads(line) for line in (tmp_path / "wds/rejected.jsonl").read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    reasons = {name: reason for name, (reason, _) in expected.items()}
    reasons |= {"no mark": "video marks", "both marks": "image marks", "number": "malformed", "no turns": "malformed"}
    assert {name: line["reason"] for name, line in found.items()} == reasons
    for name, (_, said) in expected.items():
        assert said in found[name]["detail"] and found[name]["file"] == name, found[name]


def test_other_converters_leave_videos_out_and_name_this_one(tmp_path: Path) -> None:
    records = [
        {"id": "v", "video": "a.mp4", "conversations": turns("<video>\nwhat?", "a")},
        {"id": "t", "video": "", "conversations": turns("what?", "a")},
        {"id": "f", "video": False, "conversations": turns("what?", "b")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    prepare(LlavaSource(tmp_path / "data.json", []), tmp_path / "wds", Options((1,), keep_going=True, workers=0))
    (line,) = [json.loads(line) for line in (tmp_path / "wds/rejected.jsonl").read_text().splitlines()]
    assert (line["id"], line["reason"]) == ("v", "video") and "convert_llava_video_to_wds.py" in line["detail"]


def test_workers_parts_and_resume_give_the_same_bytes(tmp_path: Path) -> None:
    source = make_videos(tmp_path, 14)
    options = {"ratio": (1,), "samples_per_shard": 4}
    prepare(source, tmp_path / "once", Options(**options, workers=0))
    expected = files_of(tmp_path / "once")
    assert sum(name.endswith(".tar") for name in expected) >= 3
    words = ("--samples-per-shard", 4, "--split", 1, "--frames", 4, "--workers", 2, "--output", tmp_path / "twice")
    done = run(tmp_path / "data.json", *words, PYTHONPATH=str(pyav()))
    assert done.returncode == 0 and files_of(tmp_path / "twice") == expected, done.stderr
    parts = [Part(number, 2) for number in (1, 2)]
    prepare(source, tmp_path / "parts", Options(**options, workers=0, part=parts[0]))
    with pytest.raises(UserError, match="part 2/2 has not begun"):
        prepare(source, tmp_path / "parts", Options(**options, join=True))
    with pytest.raises(UserError, match=r"frames was .*'frames': 4.*, is now .*'frames': 5"):
        prepare(source_of(tmp_path, frames=5), tmp_path / "parts", Options(**options, part=parts[0], resume=True))
    prepare(source, tmp_path / "parts", Options(**options, workers=0, part=parts[1]))
    prepare(source, tmp_path / "parts", Options(**options, join=True))
    assert files_of(tmp_path / "parts") == expected


def test_the_token_limit_counts_frames(tmp_path: Path) -> None:
    tokenizer = tiny_models.make_tiny_tokenizer(tmp_path / "tokenizer", "qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny_models.make_tiny_tokenizer(tmp_path / "without", "qwen2", image_token=True)
    source = make_videos(tmp_path / "data", 0)
    limit = LengthLimit(str(tmp_path / "tokenizer"), "qwen", 729, 4 * 196 + 1 + 100)
    limits = {
        "wds": limit,
        "square": LengthLimit(limit.tokenizer_path, "qwen", 577, 4096),
        "no mark": LengthLimit(str(tmp_path / "without"), "qwen", 729, 4096),
    }
    found = {}
    for name, limit in limits.items():
        prepare(source, tmp_path / name, Options((1,), keep_going=True, workers=0, length_limit=limit))
        lines = [json.loads(line) for line in (tmp_path / name / "rejected.jsonl").read_text().splitlines()]
        found[name] = {line["id"]: (line["reason"], line["detail"]) for line in lines}
    assert video_plan(4, 27).tokens == 785
    assert {name: reason for name, (reason, _) in found["wds"].items()} == {"two": "too long", "mix": "too long"}
    assert found["square"].keys() == {"one", "two", "mix"} == found["no mark"].keys()
    assert found["square"]["one"][0] == "video" and "is no square" in found["square"]["one"][1]
    assert "has no <video>; give --tokenizer of a LLaVA-OneVision" in found["no mark"]["one"][1]


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, CONVERTER, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_command(tmp_path: Path) -> None:
    make_videos(tmp_path)
    words = (tmp_path / "data.json", "--frames", 3, "--frame-format", "png", "--split", "1")
    done = run(*words, PYTHONPATH=str(pyav()))
    assert done.returncode == 0 and "8 records in = 8 written" in done.stdout, done.stderr
    sample = EnergonFolder(str(tmp_path / "wds"), "train")[0]
    assert json.loads(sample["json"])["video_frames"] == [3] and sample["2.jpg"].startswith(b"\x89PNG")
    for words, said in (
        (("--frames", 0), "frames per video is 0"),
        (("--frame-quality", 0), "JPEG quality of frames is 0"),
        (("--video-root", "absent"), "absent: no such folder; wanted the folder that the records' video names"),
    ):
        done = run(tmp_path / "data.json", "--output", tmp_path / "other", *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not list(tmp_path.glob("other*"))


def test_without_pyav_folders_do_and_files_are_refused_before_anything_is_made(tmp_path: Path, monkeypatch) -> None:
    make_videos(tmp_path)
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"PyAV is not installed, .* pip install {video.DECODER}, or give folders"):
        source_of(tmp_path)
    records = [{"id": "f", "video": "b", "conversations": turns("<video>", "a")}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    prepare(source_of(tmp_path), tmp_path / "wds", Options((1,), workers=0))
    with pytest.raises(UserError, match="PyAV is not installed"):
        read_frames(str(tmp_path / "videos/a.mp4"), FrameSampling())


def test_a_damaged_frame_is_no_frame_nor_is_one_made_of_it(tmp_path: Path) -> None:
    """Decoders conceal what they can, and say so."""
    write_video(tmp_path / "v.mp4", 20, step=1)
    damage(tmp_path / "v.mp4", 2)
    assert len(read_frames(str(tmp_path / "v.mp4"), FrameSampling(2))) == 2, "a key frame stands between"
    for most in (20, 4):  # the frame itself, and the sixth
        with pytest.raises(RecordError, match=r"video unreadable: frame \d+, or one that it is made of, is damaged"):
            read_frames(str(tmp_path / "v.mp4"), FrameSampling(most))
