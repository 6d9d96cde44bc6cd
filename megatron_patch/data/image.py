"""Image bytes -> uint8 pixels, equal to HF's CLIP and SigLIP image processors (PIL backend) before they rescale and
normalise.

Where this differs from LLaVA's original code, which opens a file with Pillow and converts it to RGB:

- Orientation: the EXIF tag is followed, as transformers' load_image does.  apply_exif_orientation=False leaves the
  image as it lies in the file, as the original code and the bare processor do.  (TIFF files Pillow turns itself.)
- Transparency is blended over white, as HF's processor does; the original shows what lies hidden below.
- Grey of 16 or 32 bits is scaled to 8 bits; the original and HF's processor clip it, most of it to white.
- The format is told by the bytes, never by the file's name, and the first frame of an animation is taken: both as
  there.  Formats outside FORMATS, such as EPS, for which Pillow starts another program, are no images here.
- More than MAX_PIXELS are refused by the header, before anything is decoded; the original stops at Pillow's limit.
"""

import contextlib
import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_patch.data.image_structure import JPEG_MAGIC, PNG_MAGIC, Structure, examine, examine_with_size
from megatron_patch.data.rejection import RecordError
from megatron_patch.tile_plan import AnyResolution

# Those that data sets hold and that are told by their first bytes (TGA is not: Pillow would try it on anything).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAGICS = (JPEG_MAGIC, PNG_MAGIC, b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # a file that begins so meant to be an image
MAX_PIXELS = 8192 * 8192  # 256 MiB once decoded; what is resized or padded never grows beyond it either
MAX_SIDE_PX = 65_500  # libjpeg's limit; Pillow keeps a pointer for every row
# Filters without jumps: a rounding error of the last bit in a position leaves the pixel as it is.
SMOOTH_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
ORIENTATION = 0x0112  # EXIF's tag
TURNED_ASIDE = (5, 6, 7, 8)  # its values that swap height and width
ORIENTATION_IN_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where Pillow looks for it
ROWS_AT_ONCE = 256  # of deep or transparent images, which need several copies while they are made plain

# Pillow warns of odd metadata and of sizes near its own limit.  What is refused is counted here, the rest is fine.
warnings.filterwarnings("ignore", module=r"PIL\.")


def check_image(data: bytes) -> None:
    """Raise RecordError, with open_image's reason, unless these bytes are an image that can be decoded fully.

    A JPEG or PNG file whose structure is sound (image_structure.py says what that means and what it leaves open) is
    accepted without decoding it, some twenty times as fast; everything else is decoded.
    """
    structure, size = examine_with_size(data)
    if size is not None:  # nothing is left that Pillow could read or mistake
        _refuse_large(*size)
    elif not (structure is Structure.SOUND and _header_is_fine(data)):
        open_image(data)


def open_image(data: bytes, apply_exif_orientation: bool = True) -> Image.Image:
    """Decode an image fully: first frame, mode RGB, upright unless told otherwise.

    Raises RecordError: `not an image`, `image too large`, `image truncated` or `image unreadable`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _refuse_large(*image.size)
        image.load()
        if apply_exif_orientation:
            # A damaged EXIF block does not damage the pixels: such an image stays as it lies.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except RecordError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, ...)
        said = str(error).split(" <_io.")[0]  # Pillow names the buffer, by an address that differs from run to run
        detail = f"{type(error).__name__}: {said} ({len(data)} bytes)"
        raise RecordError(_reason(error, data), detail) from error


def image_to_pixels(
    image: Image.Image,
    side_px: int,
    image_aspect_ratio: str,
    image_mean: tuple[float, float, float],
    center_crop: bool = True,
    resample: int = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """RGB image -> uint8 pixels [3, side_px, side_px].

    image_aspect_ratio `crop`: resized until the shorter side is side_px, then its centre (CLIP's way), or, without
    center_crop, squeezed (SigLIP's way); `pad`: put on a square of the mean colour first; `stretch`: squeezed.
    """
    fitted = _fit(image, side_px, side_px, image_aspect_ratio, image_mean, center_crop, resample)
    return _channels_first(fitted)


def image_to_tiles(
    image: Image.Image,
    columns: int,
    rows: int,
    side_px: int,
    image_aspect_ratio: str,
    image_mean: tuple[float, float, float],
    center_crop: bool = True,
    resample: int = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """RGB image -> uint8 [columns * rows + 1, 3, side_px, side_px]: tiles row by row, then the whole as a thumbnail.

    The image is brought to columns * side_px x rows * side_px as image_to_pixels brings it to a square, then cut.
    The thumbnail comes last as in Megatron-LM's multimodal example; a grid of 1 x 1 is the image alone.
    """
    way = (image_aspect_ratio, image_mean, center_crop, resample)
    thumbnail = image_to_pixels(image, side_px, *way)
    if columns * rows == 1:
        return thumbnail[None]
    grid = _channels_first(_fit(image, columns * side_px, rows * side_px, *way))
    tiles = grid.reshape(3, rows, side_px, columns, side_px).transpose(1, 3, 0, 2, 4)
    return np.concatenate([tiles.reshape(-1, 3, side_px, side_px), thumbnail[None]])


def image_to_grid(image: Image.Image, rule: AnyResolution, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """RGB image -> uint8 [1 + rows * columns, 3, side_px, side_px]: the base tile, then the grid's, row by row.

    The base tile is the image squeezed to a square.  For the grid the image is enlarged or shrunk until it fills the
    grid of rule.plan() in one direction, in the middle of black.
    """
    side, size = rule.side_px, (image.height, image.width)
    rows_px, columns_px = rule.grid_size(size)
    height, width = rule.fitted_size(size, (rows_px, columns_px))
    canvas = Image.new("RGB", (columns_px, rows_px))
    canvas.paste(image.resize((width, height), resample), ((columns_px - width) // 2, (rows_px - height) // 2))
    tiles = _channels_first(canvas).reshape(3, rows_px // side, side, columns_px // side, side).transpose(1, 3, 0, 2, 4)
    base = _channels_first(image.resize((side, side), resample))
    return np.concatenate([base[None], tiles.reshape(-1, 3, side, side)])


def image_size(data: bytes, apply_exif_orientation: bool = True) -> tuple[int, int]:
    """(height, width) in pixels of the image that open_image() makes of these bytes; read from the header if it can be.

    Raises RecordError as open_image().
    """
    size = _size_by_header(data, apply_exif_orientation)
    if size is None:
        image = open_image(data, apply_exif_orientation)
        size = (image.height, image.width)
    return size


def _size_by_header(data: bytes, apply_exif_orientation: bool) -> tuple[int, int] | None:
    """None where only decoding tells: the header is damaged or cut off, or of a format that Pillow turns by itself."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "GIF", "WEBP", "BMP"))
        _refuse_large(*image.size)
        if apply_exif_orientation and image.format == "PNG":
            # its orientation may stand behind its pixels: then Pillow would have to decode those
            if any(mark in data for mark in ORIENTATION_IN_PNG):
                return None
        elif apply_exif_orientation and image.getexif().get(ORIENTATION) in TURNED_ASIDE:
            return image.width, image.height
        return image.height, image.width
    except RecordError:
        raise
    except Exception:  # whatever it is, decoding will say it
        return None


def _header_is_fine(data: bytes) -> bool:
    """Whether Pillow reads the header of a JPEG or PNG file, and the image is not too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        _refuse_large(*image.size)
    except Exception:  # whatever it is, decoding will say it
        return False
    return image.format in ("JPEG", "PNG")  # not MPO, several images in one file


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        raise RecordError(
            "image too large",
            f"{width} x {height} pixels, wanted at most {MAX_PIXELS} in all and {MAX_SIDE_PX} along a side",
        )


def _reason(error: Exception, data: bytes) -> str:
    """Reason of REASONS for what Pillow said about these bytes."""
    if isinstance(error, Image.DecompressionBombError):
        return "image too large"
    if examine(data) is Structure.TRUNCATED or "truncated" in str(error).lower():
        return "image truncated"
    if isinstance(error, UnidentifiedImageError) and not data.startswith(MAGICS):
        return "not an image"
    return "image unreadable"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB of 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Blend an image with transparency over white, some rows at once: whole copies would need 1 GiB."""
    width, height = image.size
    blended = Image.new("RGB", image.size)
    for top in range(0, height, ROWS_AT_ONCE):
        box = (0, top, width, min(top + ROWS_AT_ONCE, height))
        rows = image.crop(box).convert("RGBA")
        blended.paste(Image.alpha_composite(Image.new("RGBA", rows.size, "white"), rows).convert("RGB"), box)
    return blended


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats -> mode L."""
    values = np.asarray(image)
    grey = np.empty(values.shape, dtype=np.uint8)
    if image.mode.startswith("I;16"):
        highest = 65535
    else:
        # The mode leaves the range open: floats of 0..1, 8 or 16 bits in wider numbers, else up to the brightest.
        brightest = float(np.nanmax(values, initial=0))
        least = 1 if image.mode == "F" else 255
        highest = next((limit for limit in (least, 255, 65535) if brightest <= limit), brightest)
    for row in range(0, len(values), ROWS_AT_ONCE):
        rows = np.nan_to_num(values[row : row + ROWS_AT_ONCE].astype(np.float64))
        grey[row : row + ROWS_AT_ONCE] = np.clip(np.rint(rows * (255 / highest)), 0, 255)
    return Image.fromarray(grey)


def _fit(
    image: Image.Image,
    width: int,
    height: int,
    image_aspect_ratio: str,
    image_mean: tuple[float, float, float],
    center_crop: bool,
    resample: int,
) -> Image.Image:
    """Bring an image to width x height pixels in one of the three ways."""
    if image_aspect_ratio == "pad":
        image = _pad(image, width, height, image_mean, resample)
    elif image_aspect_ratio == "crop" and center_crop:
        return _cover(image, width, height, resample)
    return image.resize((width, height), resample)


def _cover(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """Resize until the image covers width x height, then take the centre."""
    old_width, old_height = image.size
    # Lengths and offsets as transformers computes them (get_resize_output_image_size, center_crop).
    if width * old_height >= height * old_width:
        new_width, new_height = width, int(width * old_height / old_width)
    else:
        new_width, new_height = int(height * old_width / old_height), height
    left, top = (new_width - width) // 2, (new_height - height) // 2
    if (new_width, new_height) == image.size:
        return image.crop((left, top, left + width, top + height))
    edges = [
        left * old_width / new_width,
        top * old_height / new_height,
        (left + width) * old_width / new_width,
        (top + height) * old_height / new_height,
    ]
    if new_width * new_height > MAX_PIXELS:  # too much to hold; cut like this, single values may differ by 1
        return image.resize((width, height), resample, box=tuple(edges))
    # Pillow makes the rows shorter first, then the columns (very tall images the other way round, from 13 on).  What
    # lies beyond the centre is left out where every kept value stays as it is: in both steps if Pillow can be told the
    # edges exactly (4:3 and 3:2, for example), else in the second.
    if resample in SMOOTH_FILTERS and new_height < 1.5 * new_width:
        exact = all((edge * 16).is_integer() for edge in edges)  # Pillow's box holds 24 bits
        if exact and new_height > height:
            reach = 4 * max(1, old_height / new_height)  # a filter looks no further than 3 new pixels
            first, last = max(0, int(edges[1] - reach)), min(old_height, math.ceil(edges[3] + reach))
            image = image.crop((0, first, old_width, last)).resize((width, last - first), resample)
            return image.resize((width, height), resample, box=(0, edges[1] - first, width, edges[3] - first))
        if exact:
            return image.resize((width, height), resample, box=tuple(edges))
        image = image.resize((new_width, old_height), resample).crop((left, 0, left + width, old_height))
        new_width, left = width, 0
    image = image.resize((new_width, new_height), resample)
    return image.crop((left, top, left + width, top + height))


def _pad(
    image: Image.Image, width: int, height: int, image_mean: tuple[float, float, float], resample: int
) -> Image.Image:
    """Put an image in the middle of a canvas of the mean colour, shaped width : height (LLaVA's expand2square)."""
    old_width, old_height = image.size
    canvas_width = max(old_width, math.ceil(old_height * width / height))
    canvas_height = max(old_height, math.ceil(old_width * height / width))
    if (canvas_width, canvas_height) == image.size:
        return image
    if canvas_width * canvas_height > MAX_PIXELS:  # too much to hold: made small first
        scale = width / canvas_width
        small = (max(1, round(old_width * scale)), max(1, round(old_height * scale)))
        image, canvas_width, canvas_height = image.resize(small, resample), width, height
    canvas = Image.new("RGB", (canvas_width, canvas_height), tuple(math.floor(channel * 255) for channel in image_mean))
    canvas.paste(image, ((canvas_width - image.width) // 2, (canvas_height - image.height) // 2))
    return canvas


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
