"""Images: equal to HF's CLIP and SigLIP processors (PIL backend) in uint8; odd formats upright, colours true."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from megatron_patch.data import image as image_module
from megatron_patch.data.image import check_image, image_to_pixels, open_image
from megatron_patch.data.rejection import RecordError

MEAN = (0.48145466, 0.4578275, 0.40821073)


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random pixels of a mode; smooth enough that bicubic over- and undershoots are exercised too."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values, mode=mode)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huggingface(image: Image.Image, side_px: int) -> np.ndarray:
    """uint8 [3, side_px, side_px] of the HF processor before rescaling."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side_px}, crop_size={"height": side_px, "width": side_px},
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize(
    "size",
    [
        *((64, 64), (336, 336), (500, 375), (375, 500), (337, 336), (101, 33), (33, 101), (30, 28), (1, 7)),
        *((640, 427), (427, 640), (640, 480), (480, 640), (20, 15), (15, 20), (1, 1), (300, 1), (450, 200)),
    ],
)
@pytest.mark.parametrize("side_px", [28, 224])
def test_crop_equals_the_huggingface_processor(size: tuple[int, int], side_px: int) -> None:
    image = random_image(*size)
    ours = image_to_pixels(open_image(encode(image)), side_px, "crop", MEAN)
    theirs = huggingface(image, side_px)
    assert ours.dtype == np.uint8 and ours.shape == (3, side_px, side_px)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", [(64, 64), (30, 30), (500, 375), (33, 101), (30, 28), (1, 7)])
@pytest.mark.parametrize(("side_px", "resample"), [(30, 3), (30, 2), (224, 3)])
def test_squeezing_equals_the_siglip_processor(size: tuple[int, int], side_px: int, resample: int) -> None:
    image = random_image(*size)
    ours = image_to_pixels(image, side_px, "crop", (0.5, 0.5, 0.5), center_crop=False, resample=resample)
    stretched = image_to_pixels(image, side_px, "stretch", (0.5, 0.5, 0.5), resample=resample)
    assert np.array_equal(stretched, ours)
    processor = SiglipImageProcessorPil(
        size={"height": side_px, "width": side_px}, resample=resample, do_rescale=False, do_normalize=False
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert ours.dtype == np.uint8 and np.array_equal(ours, theirs)


def test_padding_comes_before_squeezing() -> None:
    image = Image.new("RGB", (40, 20), (250, 10, 10))
    pixels = image_to_pixels(image, 8, "pad", (0.5, 0.5, 0.5), center_crop=False, resample=Image.Resampling.NEAREST)
    assert pixels[:, 0, 4].tolist() == [127, 127, 127] and pixels[:, 4, 4].tolist() == [250, 10, 10]


@pytest.mark.parametrize("size", [(64, 64), (50, 37), (37, 50), (33, 8)])
def test_pad_equals_the_original_expand2square(size: tuple[int, int]) -> None:
    """expand2square of llava/mm_utils.py, then the HF processor."""
    image = random_image(*size)
    width, height = size
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in MEAN))
    square.paste(image, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    ours = image_to_pixels(image, 28, "pad", MEAN)
    assert np.array_equal(ours, huggingface(square, 28))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_modes_equal_the_huggingface_processor(mode: str) -> None:
    if mode in ("P", "1"):
        image = random_image(40, 300).convert(mode)
    else:
        image = random_image(40, 300, mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    ours = image_to_pixels(open_image(encode(image, kind)), 28, "crop", MEAN)
    assert np.array_equal(ours, huggingface(image, 28))


def test_a_transparent_palette_equals_the_huggingface_processor() -> None:
    data = encode(random_image(40, 300).convert("P"), transparency=3)
    ours = image_to_pixels(open_image(data), 28, "crop", MEAN)
    assert np.array_equal(ours, huggingface(Image.open(io.BytesIO(data)), 28))


GREY16 = np.linspace(0, 65535, 300 * 8).reshape(300, 8).astype(np.uint16)
GREY8 = np.rint(GREY16 / 257).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "kind", "grey"),
    [
        (Image.fromarray(GREY16), "PNG", GREY8),
        (Image.fromarray(GREY16), "TIFF", GREY8),
        (Image.fromarray(GREY16 // 1000), "PNG", np.zeros_like(GREY8)),  # dark stays dark: 65 of 65535 is black
        (Image.fromarray(GREY16.astype(np.int32)), "TIFF", GREY8),
        (Image.fromarray(GREY8.astype(np.int32)), "TIFF", GREY8),
        (Image.fromarray(GREY16.astype(np.int32) * 1000), "TIFF", GREY8),
        (Image.fromarray(GREY8.astype(np.float32)), "TIFF", GREY8),
        (Image.fromarray((GREY8 / 255).astype(np.float32)), "TIFF", GREY8),
    ],
    ids=["png", "tiff", "dark", "16 in 32", "8 in 32", "32", "float 0..255", "float 0..1"],
)
def test_deep_grey_is_scaled_not_clipped(image: Image.Image, kind: str, grey: np.ndarray) -> None:
    pixels = np.asarray(open_image(encode(image, kind)))
    assert np.array_equal(pixels, np.stack([grey] * 3, axis=-1))


def png16(values: np.ndarray, transparent: tuple[int, int, int] | None = None) -> bytes:
    """PNG with 16 bits per channel, written by hand: Pillow does not write them.  values: uint16 [H, W, 3]."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = values.shape[1].to_bytes(4, "big") + values.shape[0].to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    colour = b"" if transparent is None else chunk(b"tRNS", np.array(transparent, dtype=">u2").tobytes())
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colour + pixels + chunk(b"IEND", b"")


def test_sixteen_bits_per_colour_keep_their_high_byte() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    assert np.array_equal(np.asarray(open_image(png16(values))), (values >> 8).astype(np.uint8))


def test_a_transparent_colour_of_sixteen_bits_becomes_white() -> None:
    values = np.full((4, 6, 3), 0x1234, dtype=np.uint16)
    values[:2] = (0xFFFF, 0, 0)
    shown = np.asarray(open_image(png16(values, transparent=(0xFFFF, 0, 0))))
    assert (shown[:2] == 255).all() and (shown[2:] == 0x12).all()


def test_inverted_cmyk_of_photoshop_has_true_colours() -> None:
    """JPEG in CMYK is stored inverted by Adobe's programs, as Pillow writes it too: red paper is red."""
    red = open_image(encode(Image.new("RGB", (16, 16), (250, 5, 5)).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(red).astype(int) - (250, 5, 5)).max() <= 3


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([9, 9, 9])
        data = encode(image, transparency=0)
    else:
        data = encode(Image.new(mode, (4, 4), (9, 0) if mode == "LA" else (9, 9, 9, 0)))
    assert set(open_image(data).get_flattened_data()) == {(255, 255, 255)}


# Tag 0x0112 of the EXIF standard: how the upright image was turned before it was stored, and so on.
STORED = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), (250, 10, 10))
    upright.paste((10, 10, 250), (24, 0, 48, 32))
    upright.paste((10, 250, 10), (0, 16, 24, 32))
    stored = upright
    for turn in STORED[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(stored, kind, exif=exif, **options)
    shown, lying = open_image(data), open_image(data, apply_exif_orientation=False)
    if kind == "TIFF":  # Pillow turns these by itself, for the original code too
        stored = upright
    assert shown.size == upright.size and lying.size == stored.size
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright).astype(int)).max() <= 3
    assert np.abs(np.asarray(lying).astype(int) - np.asarray(stored).astype(int)).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((3, 3)) == (255, 0, 0)
    check_image(data)


def test_a_damaged_exif_block_leaves_the_image_as_it_lies() -> None:
    image = random_image(20, 10)
    data = encode(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff")
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(image))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image truncated"),
        (b"<html>not found</html>", "not an image"),
        (encode(random_image(64, 64), "JPEG")[:700], "image truncated"),
        (encode(random_image(64, 64), "PNG")[:-200], "image truncated"),
        (encode(Image.new("1", (20_000, 20_000))), "image too large"),  # 400 million pixels in 50 kB
        (encode(Image.new("1", (70_000, 2))), "image too large"),
    ],
    ids=["empty", "html", "half a jpeg", "half a png", "bomb", "ribbon"],
)
def test_broken_and_huge_images_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    for judge in (open_image, check_image):
        with pytest.raises(RecordError) as raised:
            judge(data)
        assert raised.value.reason == reason


@pytest.mark.parametrize("size", [(60_000, 10), (10, 60_000), (20_000, 2), (20_000, 300), (1, 1)])
@pytest.mark.parametrize("image_aspect_ratio", ["crop", "pad", "stretch"])
def test_ribbons_are_prepared_in_bounded_memory(size: tuple[int, int], image_aspect_ratio: str) -> None:
    """Their resized or padded image would hold up to 3.6 billion pixels."""
    image = open_image(encode(Image.new("RGB", size, (200, 100, 50))))
    pixels = image_to_pixels(image, 336, image_aspect_ratio, (200 / 255, 100 / 255, 50 / 255))
    assert (pixels == np.array([200, 100, 50]).reshape(3, 1, 1)).all()


def test_the_shortcut_for_large_crops_is_within_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_image(300, 13)
    exact = image_to_pixels(image, 28, "crop", MEAN).astype(int)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 1000)
    assert np.abs(image_to_pixels(image, 28, "crop", MEAN).astype(int) - exact).max() <= 1


def test_any_size_and_filter_gives_the_plain_resize_and_crop() -> None:
    """The parts that are left out change nothing: 600 sizes, half of them of common proportions, against Pillow."""
    random = np.random.default_rng(0)
    common = [(4, 3), (3, 2), (3, 4), (2, 3), (5, 4), (4, 5), (16, 9), (9, 16), (2, 1), (1, 2)]
    for number in range(600):
        width, height = (int(length) for length in random.integers(1, 400, 2))
        if number % 2:
            unit = int(random.integers(1, 60))
            width, height = (unit * part for part in common[number // 2 % len(common)])
        side_px, resample = int(random.choice([1, 14, 28, 56, 112])), int(random.choice([0, 1, 2, 3, 4, 5]))
        short, long = min(width, height), max(width, height)
        if side_px * side_px * long > 1_000_000 * short:
            continue
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        grown = int(side_px * long / short)
        whole = image.resize((side_px, grown) if width <= height else (grown, side_px), resample)
        left, top = (whole.width - side_px) // 2, (whole.height - side_px) // 2
        expected = np.asarray(whole.crop((left, top, left + side_px, top + side_px))).transpose(2, 0, 1)
        ours = image_to_pixels(image, side_px, "crop", MEAN, resample=resample)
        assert np.array_equal(ours, expected), (width, height, side_px, resample)
