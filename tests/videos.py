"""Small videos as files, written by PyAV, which the tests fetch by themselves."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.video import DECODER
from tests.package_cache import installed

GREY_STEP = 12  # between a frame and the next


def pyav() -> Path:
    """Folder for PYTHONPATH; skips the test where PyAV cannot be fetched."""
    try:
        return installed(DECODER)
    except FileNotFoundError as error:
        pytest.skip(f"PyAV is not here and cannot be fetched: {error}")


def write_video(
    path: Path, frames: int, size: tuple[int, int] = (64, 48), rate: int = 10, step: int = GREY_STEP
) -> None:
    """MPEG-4: frame k is grey of the level step * k; size: width, height; rate: frames a second.

    Each is a key frame, unless the step is small: then every twelfth is.
    """
    sys.path.insert(0, str(pyav()))
    try:
        import av
    finally:
        sys.path.pop(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), step * number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def damage(path: Path, frame: int) -> None:
    """Overwrite the second half of what a frame is decoded from."""
    import av

    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start, size = packets[frame].pos, packets[frame].size
    data = bytearray(path.read_bytes())
    data[start + size // 2 : start + size] = b"\xff" * (size - size // 2)
    path.write_bytes(data)


def turn_clockwise(path: Path) -> None:
    """Let the file's display matrix turn its frames by 90 degrees (ISO 14496-12, tkhd)."""
    data = path.read_bytes()
    start = data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:start] + matrix + data[start + len(matrix) :])
