"""The check without decoding: never kinder than the decoder, and never decoding what is plainly sound."""

import io
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from megatron_patch.data.image import check_image, open_image
from megatron_patch.data.image_structure import Structure, examine, examine_with_size
from megatron_patch.data.rejection import RecordError


def photo(mode: str, width: int = 70, height: int = 50) -> Image.Image:
    """Smooth colours with some noise in a mode."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    values = np.stack([across, down, (across + noise) % 256], axis=-1).astype(np.uint8)
    image = Image.fromarray(values)
    return image.convert("L").convert(mode) if mode.startswith("I") else image.convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def interlaced_png() -> bytes:
    """Pillow does not write interlaced PNG; one pixel looks the same either way, so the flag alone makes one."""
    data = bytearray(encode(Image.new("RGB", (1, 1), "red"), "PNG"))
    data[28] = 1
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


TURNED = Image.Exif()
TURNED[0x0112] = 6
JPEG_WAYS = {
    "baseline": {},
    "progressive": {"progressive": True, "comment": b"a comment"},
    "optimised": {"optimize": True, "exif": TURNED, "icc_profile": b"profile" * 50},
    "restarts": {"restart_marker_rows": 1, "subsampling": 0},
    "coarse": {"progressive": True, "quality": 10},
}
SOUND = {
    f"jpeg {mode} {way}": encode(photo(mode), "JPEG", **options)
    for mode in ("L", "RGB", "CMYK")
    for way, options in JPEG_WAYS.items()
} | {f"png {mode}": encode(photo(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
SOUND["png interlaced"] = interlaced_png()


def reason(judge: Callable[[bytes], object], data: bytes) -> str | None:
    try:
        judge(data)
    except RecordError as error:
        return error.reason
    return None


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_told_by_structure_alone(name: str) -> None:
    data = SOUND[name]
    assert examine(data) is Structure.SOUND and reason(check_image, data) is reason(open_image, data) is None


@pytest.mark.parametrize("name", SOUND)
def test_cut_anywhere_the_check_and_the_decoder_agree(name: str) -> None:
    """Where the decoder is content without the last bytes (a PNG's IEND), so is the check."""
    data = SOUND[name]
    ends = {*range(40), *range(len(data) - 40, len(data)), *range(40, len(data), max(1, len(data) // 40))}
    refused = 0
    for end in ends:
        assert examine(data[:end]) is Structure.TRUNCATED
        answer = reason(check_image, data[:end])
        assert answer == reason(open_image, data[:end]) and answer in ("image truncated", None), end
        refused += answer is not None
    assert refused >= 0.5 * len(ends)


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """One to three overwritten, lost, repeated or inserted stretches, half of them in the headers."""
    damaged = bytearray(data)
    for _ in range(random.integers(1, 4)):
        reach = 700 if random.random() < 0.5 else len(damaged)
        start, length = int(random.integers(2, min(reach, len(damaged)))), int(random.integers(1, 30))
        stretch = slice(start, start + length)
        match random.choice(["byte", "zeros", "noise", "loss", "insertion", "marker", "repetition"]):
            case "byte":
                damaged[start] = random.integers(256)
            case "zeros":
                damaged[stretch] = bytes(len(damaged[stretch]))
            case "noise":
                damaged[stretch] = random.bytes(len(damaged[stretch]))
            case "loss" if len(damaged) > 100:
                del damaged[stretch]
            case "insertion":
                damaged[start:start] = random.bytes(length)
            case "marker":
                damaged[start : start + 2] = bytes([255, random.integers(1, 255)])
            case "repetition":
                damaged[stretch] = damaged[start // 2 : start // 2 + length]
    return bytes(damaged)


@pytest.mark.parametrize("seed", range(4))
def test_the_decoder_agrees_with_the_check_on_damaged_files(seed: int) -> None:
    """Measured once on 200,000 damaged files: 47,103 told by structure alone, the decoder agreed on every one."""
    random = np.random.default_rng(seed)
    files = list(SOUND.values())
    told = 0
    for _ in range(1500):
        data = damage(files[random.integers(len(files))], random)
        told += examine(data) is Structure.SOUND
        assert reason(check_image, data) == reason(open_image, data)
    assert told > 100  # otherwise this would compare the decoder with itself


JPEG = SOUND["jpeg RGB baseline"]


def with_segment(marker: int, body: bytes) -> bytes:
    return JPEG[:2] + bytes([255, marker]) + (len(body) + 2).to_bytes(2, "big") + body + JPEG[2:]


@pytest.mark.parametrize(
    "data",
    [
        JPEG + b"bytes behind the end",
        JPEG[:2] + b"\xff\xff\xff" + JPEG[2:],
        with_segment(0xE1, b"Exif\0\0" + JPEG[:600]),  # half a thumbnail
        with_segment(0xE1, b"Exif\0\0" + JPEG),  # a thumbnail with an end of its own
        with_segment(0xED, b"Photoshop 3.0\x00" + b"8BIM\x04\x04\0\0\0\0\0\x04abcd"),
    ],
    ids=["trailing bytes", "fill bytes", "cut thumbnail", "thumbnail", "photoshop"],
)
def test_what_cameras_and_servers_add_is_no_damage(data: bytes) -> None:
    assert examine(data) is Structure.SOUND and reason(check_image, data) is reason(open_image, data) is None


def changed(name: str, old: bytes, new: bytes) -> bytes:
    data = SOUND[name]
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (changed("jpeg RGB baseline", b"\xff\xc4\x00\x1f\x00\x00", b"\xff\xc4\x00\x1f\x00\x03"), "image unreadable"),
        (changed("jpeg RGB baseline", b"\x08\x00\x32\x00\x46\x03", b"\x0c\x00\x32\x00\x46\x03"), "image unreadable"),
        (changed("jpeg RGB baseline", b"\x08\x00\x32\x00\x46\x03", b"\x08\x00\x00\x00\x46\x03"), "image unreadable"),
        (changed("jpeg RGB baseline", b"\x08\x00\x32\x00\x46\x03", b"\x08\xff\xdc\xff\xdc\x03"), "image too large"),
        (b"GIF89a", "image unreadable"),
        (encode(photo("RGB"), "WEBP")[:-50], "image truncated"),
        (encode(photo("RGB"), "BMP")[:-50], "image truncated"),
        (encode(photo("RGB"), "GIF")[:-500], "image truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    ],
    ids=["table", "twelve bits", "no rows", "huge", "gif", "webp", "bmp", "cut gif", "eps", "svg"],
)
def test_reasons_are_told_apart(data: bytes, answer: str) -> None:
    assert reason(check_image, data) == reason(open_image, data) == answer


def test_the_one_gap_is_a_png_whose_writer_wrote_too_little() -> None:
    """Every checksum is right but the compressed stream stops: seen only by decoding, when the record is used."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (40).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    random = np.random.default_rng(0)
    pixels = zlib.compress(b"".join(b"\0" + random.bytes(40) for _ in range(40)))[:800]
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert reason(check_image, data) is None and reason(open_image, data) == "image truncated"


def test_several_images_in_one_file_are_decoded() -> None:
    data = encode(photo("RGB"), "MPO", save_all=True, append_images=[photo("RGB")])
    assert reason(check_image, data) is None
    animated = encode(photo("RGB"), "PNG", save_all=True, append_images=[photo("RGB").rotate(90)])
    assert examine(animated) is Structure.DOUBTFUL and reason(check_image, animated) is None


def test_a_plain_header_is_judged_as_the_decoder_does() -> None:
    """Without metadata Pillow is never asked: one wrong byte anywhere in the header must not fool the check."""
    random = np.random.default_rng(2)
    told = 0
    for name in ("jpeg RGB baseline", "jpeg L baseline", "jpeg RGB restarts", "jpeg RGB coarse"):
        sound = SOUND[name]
        for _ in range(150):
            data = bytearray(sound)
            data[random.integers(2, sound.index(b"\xff\xda") + 14)] = random.integers(256)
            if examine_with_size(bytes(data))[1] is not None:
                told += 1
                assert reason(check_image, bytes(data)) == reason(open_image, bytes(data))
    assert told > 150
    large = bytearray(JPEG)
    start = large.index(b"\xff\xc0") + 5
    large[start : start + 4] = (60_000).to_bytes(2, "big") * 2
    assert reason(check_image, bytes(large)) == reason(open_image, bytes(large)) == "image too large"
