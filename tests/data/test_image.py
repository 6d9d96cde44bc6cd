"""Pictures: equal to HF's CLIP and SigLIP processors (PIL backend) in uint8; odd formats upright, colours true."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from megatron_patch.data.image import check_picture, open_picture, picture_to_pixels
from megatron_patch.data.rejection import RecordError

MEAN = (0.48145466, 0.4578275, 0.40821073)


def random_picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random pixels of a mode; smooth enough that bicubic over- and undershoots are exercised too."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values, mode=mode)


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def huggingface(picture: Image.Image, side_px: int) -> np.ndarray:
    """uint8 [3, side_px, side_px] of the HF processor before rescaling."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side_px}, crop_size={"height": side_px, "width": side_px},
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    return np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize(
    "size",
    [(64, 64), (336, 336), (500, 375), (375, 500), (337, 336), (101, 33), (33, 101), (30, 28), (1, 7), (640, 427)],
)
@pytest.mark.parametrize("side_px", [28, 224])
def test_crop_equals_the_huggingface_processor(size: tuple[int, int], side_px: int) -> None:
    picture = random_picture(*size)
    ours = picture_to_pixels(open_picture(encode(picture)), side_px, "crop", MEAN)
    theirs = huggingface(picture, side_px)
    assert ours.dtype == np.uint8 and ours.shape == (3, side_px, side_px)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", [(64, 64), (30, 30), (500, 375), (33, 101), (30, 28), (1, 7)])
@pytest.mark.parametrize(("side_px", "resample"), [(30, 3), (30, 2), (224, 3)])
def test_squeezing_equals_the_siglip_processor(size: tuple[int, int], side_px: int, resample: int) -> None:
    picture = random_picture(*size)
    ours = picture_to_pixels(picture, side_px, "crop", (0.5, 0.5, 0.5), center_crop=False, resample=resample)
    processor = SiglipImageProcessorPil(
        size={"height": side_px, "width": side_px}, resample=resample, do_rescale=False, do_normalize=False
    )
    theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
    assert ours.dtype == np.uint8 and np.array_equal(ours, theirs)


def test_padding_comes_before_squeezing() -> None:
    picture = Image.new("RGB", (40, 20), (250, 10, 10))
    pixels = picture_to_pixels(picture, 8, "pad", (0.5, 0.5, 0.5), center_crop=False, resample=Image.Resampling.NEAREST)
    assert pixels[:, 0, 4].tolist() == [127, 127, 127] and pixels[:, 4, 4].tolist() == [250, 10, 10]


@pytest.mark.parametrize("size", [(64, 64), (50, 37), (37, 50), (33, 8)])
def test_pad_equals_the_original_expand2square(size: tuple[int, int]) -> None:
    """expand2square of llava/mm_utils.py, then the HF processor."""
    picture = random_picture(*size)
    width, height = size
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in MEAN))
    square.paste(picture, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    ours = picture_to_pixels(picture, 28, "pad", MEAN)
    assert np.array_equal(ours, huggingface(square, 28))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_modes_equal_the_huggingface_processor(mode: str) -> None:
    if mode in ("P", "1"):
        picture = random_picture(40, 30).convert(mode)
    else:
        picture = random_picture(40, 30, mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    ours = picture_to_pixels(open_picture(encode(picture, kind)), 28, "crop", MEAN)
    assert np.array_equal(ours, huggingface(picture, 28))


def test_a_transparent_palette_equals_the_huggingface_processor() -> None:
    data = encode(random_picture(40, 30).convert("P"), transparency=3)
    ours = picture_to_pixels(open_picture(data), 28, "crop", MEAN)
    assert np.array_equal(ours, huggingface(Image.open(io.BytesIO(data)), 28))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    pixels = np.asarray(open_picture(encode(Image.fromarray(values))))
    assert np.array_equal(pixels[..., 0], np.rint(values / 257).astype(np.uint8))


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (20, 10), (255, 0, 0))
    upright.paste((0, 0, 255), (10, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to display"
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    shown = open_picture(encode(stored, exif=exif))
    assert shown.size == (20, 10)
    assert shown.getpixel((2, 5)) == (255, 0, 0) and shown.getpixel((17, 5)) == (0, 0, 255)


def test_first_frame_and_true_format_count_not_the_name() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(data).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "picture truncated"),
        (b"<html>not found</html>", "not a picture"),
        (encode(random_picture(64, 64), "JPEG")[:700], "picture truncated"),
        (encode(random_picture(64, 64), "PNG")[:-200], "picture truncated"),
        (encode(Image.new("1", (20_000, 20_000))), "picture too large"),  # 400 million pixels in 50 kB
        (encode(Image.new("1", (70_000, 2))), "picture too large"),
    ],
    ids=["empty", "html", "half a jpeg", "half a png", "bomb", "ribbon"],
)
def test_broken_and_huge_pictures_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    for judge in (open_picture, check_picture):
        with pytest.raises(RecordError) as raised:
            judge(data)
        assert raised.value.reason == reason
