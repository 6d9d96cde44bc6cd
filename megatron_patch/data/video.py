"""Videos -> frames as encoded images, chosen as LLaVA-NeXT's training code chooses them.

A video is a file, which PyAV decodes (`pip install av`, not among the requirements), or a folder of frames in the order
of their names, which needs no decoder.

Where this differs from that code (process_video_with_decord, and its branch for folders of frames):

- A video with fewer frames than wanted gives each of them once; there it gives some of them several times.
- Frames lie as the file's display matrix turns them; names with numbers are ordered by these (f2 before f10).
"""

import io
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from megatron_patch.data.image import MAX_PIXELS
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError

DECODER = "av==19.0.2"
FORMATS = ("jpeg", "png")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of frames in a folder


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are taken, and how those of a file are stored."""

    frames: int = 32  # at most, of each video
    fps: float | None = None  # frames of a second of a file, where that gives no more than `frames`
    format: str = "jpeg"  # one of FORMATS
    quality: int = 90  # of JPEG, as Pillow counts it

    def __post_init__(self) -> None:
        """Refuse what cannot work, all at once."""
        problems = []
        if self.frames < 1:
            problems.append(f"frames per video is {self.frames}, wanted at least 1")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            problems.append(f"frames per second is {self.fps}, wanted a number above 0")
        if self.format not in FORMATS:
            problems.append(f"format of frames is {self.format!r}, wanted {' or '.join(FORMATS)}")
        if not 1 <= self.quality <= 95:
            problems.append(f"JPEG quality of frames is {self.quality}, wanted a number from 1 to 95")
        if problems:
            raise UserError("; ".join(problems))

    def places(self, total: int, fps: float | None) -> list[int]:
        """Which of so many frames, from 0, rising; fps: those of a second, None: not known.

        Every round(fps / self.fps)-th from the first one, as long as that gives no more than self.frames; else so many
        at equal distances from the first to the last.
        """
        if self.fps is not None and fps:
            regular = list(range(0, total, max(1, round(fps / self.fps))))
            if len(regular) <= self.frames:
                return regular
        return np.linspace(0, total - 1, min(self.frames, total), dtype=int).tolist()


def check_decoder() -> None:
    """Raise UserError where PyAV is missing."""
    if find_spec("av") is None:
        raise UserError(
            f"PyAV is not installed, which decodes videos; pip install {DECODER}, or give folders of frames as videos"
        )


def read_frames(path: str, sampling: FrameSampling) -> list[bytes]:
    """Frames of a file, or of a folder with the bytes that they have there, not checked.

    Raises RecordError `video missing`, `video unreadable` or `image too large`, UserError where PyAV is missing.
    """
    try:
        if os.path.isdir(path):
            return _of_folder(path, sampling)
        if not os.path.isfile(path):
            raise RecordError("video missing", "wanted a file, or a folder of frames")
        check_decoder()
        return _of_file(path, sampling)
    except OSError as error:
        raise RecordError("video unreadable", error.strerror or str(error)) from None


def _of_folder(path: str, sampling: FrameSampling) -> list[bytes]:
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES) and entry.is_file()]
    if not names:
        raise RecordError("video unreadable", f"the folder holds no frames, wanted files {', '.join(SUFFIXES)}")
    names.sort(key=_by_number)
    found = []
    for place in sampling.places(len(names), None):
        with open(os.path.join(path, names[place]), "rb") as file:
            found.append(file.read())
    return found


def _by_number(name: str) -> tuple[Any, ...]:
    """Sort key: numbers in it by their value, the rest by its letters."""
    parts = re.split(r"(\d+)", name)
    return (*(int(part) if number % 2 else part for number, part in enumerate(parts)), name)


def _of_file(path: str, sampling: FrameSampling) -> list[bytes]:
    import av

    try:
        # A header may tell another number than there are, or none: packets are counted, which is quick, and where they
        # do not give a frame each the frames themselves.
        total, fps = _count(path)
        frames, decoded = _decode(path, sampling.places(total, fps), sampling) if total else ([], 0)
        if decoded != total:
            frames, _ = _decode(path, sampling.places(decoded, fps), sampling) if decoded else ([], 0)
    except RecordError:
        raise
    except (av.error.FFmpegError, ValueError) as error:  # ValueError: pixels of a format that is not known
        said = getattr(error, "strerror", None) or str(error)
        raise RecordError("video unreadable", f"{type(error).__name__}: {said}") from None
    if not frames:
        raise RecordError("video unreadable", "not a frame of it can be decoded")
    return frames


def _count(path: str) -> tuple[int, float | None]:
    """Packets of the first video stream, and its frames per second.  Raises RecordError."""
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise RecordError("video unreadable", "the file holds no video")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise RecordError("image too large", f"frames of {width} x {height} pixels, wanted at most {MAX_PIXELS}")
        rate = stream.average_rate
        return sum(packet.size > 0 for packet in container.demux(stream)), float(rate) if rate else None


def _decode(path: str, places: list[int], sampling: FrameSampling) -> tuple[list[bytes], int]:
    """The frames at these places, encoded, and how many there are in all.  Raises RecordError."""
    import av

    wanted, found, number, damaged = set(places), [], -1, False
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)  # what follows is made of it
            if number not in wanted:
                continue
            if damaged:
                raise RecordError("video unreadable", f"frame {number}, or one that it is made of, is damaged")
            image = frame.to_image()
            if frame.rotation:
                image = image.rotate(frame.rotation, expand=True)  # both counterclockwise
            buffer = io.BytesIO()
            image.save(buffer, sampling.format, **({"quality": sampling.quality} if sampling.format == "jpeg" else {}))
            found.append(buffer.getvalue())
    return found, number + 1
