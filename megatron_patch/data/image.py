"""Picture bytes -> uint8 pixels, equal to HF's CLIP and SigLIP image processors (PIL backend) before they rescale and
normalise.

Transparency is blended over white, as that processor does (LLaVA's original code shows what lies hidden below).
Orientation follows the EXIF tag, as transformers' load_image does (the original code and the bare processor ignore it).
Pictures of 16 or 32 bits per pixel are scaled to 8 bits, where both would clip them to white.
"""

import contextlib
import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps

from megatron_patch.data.rejection import RecordError

# An elongated picture grows when its shorter side becomes side_px; beyond this many pixels it is refused.
MAX_RESIZED_PIXELS = 64 * 1024 * 1024


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture fully: upright, mode RGB.  Raises RecordError when it is broken, or a decompression bomb."""
    try:
        with warnings.catch_warnings():
            # Pillow refuses above twice its limit of pixels and warns below that; the warning is no reason to stop.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
            picture.load()
            # A damaged EXIF block does not damage the pixels: such a picture stays as it lies.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(picture, in_place=True)
            return _to_rgb(picture)
    except Exception as error:  # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, ...)
        raise RecordError("picture unreadable", f"{type(error).__name__}: {error} ({len(data)} bytes)") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB of 8 bits."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        values = np.asarray(picture).astype(np.float64)
        highest = values.max(initial=0.0)
        # 16-bit files may arrive as 32-bit integers; what fits into 8 bits is taken as it is.
        scale = 1.0 if highest <= 255 else 255.0 / 65535.0 if highest <= 65535 else 255.0 / highest
        picture = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def picture_to_pixels(
    picture: Image.Image,
    side_px: int,
    image_aspect_ratio: str,
    image_mean: tuple[float, float, float],
    center_crop: bool = True,
    resample: int = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """RGB picture -> uint8 pixels [3, side_px, side_px].

    center_crop: resized until the shorter side is side_px, then its centre; else squeezed to side_px x side_px.  With
    image_aspect_ratio `pad` it becomes a square of the mean colour first.
    Raises RecordError when the picture is too elongated to be resized.
    """
    if image_aspect_ratio == "pad":
        picture = _pad_to_square(picture, image_mean)
    if not center_crop:
        return _channels_first(picture.resize((side_px, side_px), resample))
    width, height = picture.size
    # Lengths and offsets as transformers computes them (get_resize_output_image_size, center_crop).
    if width <= height:
        new_width, new_height = side_px, int(side_px * height / width)
    else:
        new_width, new_height = int(side_px * width / height), side_px
    if new_width * new_height > MAX_RESIZED_PIXELS:
        raise RecordError(
            "picture unreadable", f"{width} x {height} pixels are too elongated for {side_px} x {side_px}"
        )
    if (width, height) != (new_width, new_height):
        picture = picture.resize((new_width, new_height), resample)
    left, top = (new_width - side_px) // 2, (new_height - side_px) // 2
    return _channels_first(picture.crop((left, top, left + side_px, top + side_px)))


def _channels_first(picture: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _pad_to_square(picture: Image.Image, image_mean: tuple[float, float, float]) -> Image.Image:
    """LLaVA's expand2square: centred on a square of the mean colour."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    if side * side > MAX_RESIZED_PIXELS * 4:
        raise RecordError("picture unreadable", f"{width} x {height} pixels are too elongated to be padded to a square")
    square = Image.new("RGB", (side, side), tuple(math.floor(channel * 255) for channel in image_mean))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square
