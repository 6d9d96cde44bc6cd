"""Tiles: a grid of the whole image, cut row by row, and the image itself as the last."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from megatron_patch.data.image import image_to_pixels, image_to_tiles

MEAN = (0.48145466, 0.4578275, 0.40821073)
RANDOM = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def joined(tiles: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """uint8 [height, width, 3] put together again from tiles without the thumbnail."""
    lines = [np.concatenate(list(tiles[row * columns : (row + 1) * columns]), axis=2) for row in range(rows)]
    return np.concatenate(lines, axis=1).transpose(1, 2, 0)


@pytest.mark.parametrize("image_aspect_ratio", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("size", [(90, 60), (33, 70), (1, 9)])
def test_shape_and_thumbnail(image_aspect_ratio: str, columns: int, rows: int, size: tuple[int, int]) -> None:
    image = noise(*size)
    tiles = image_to_tiles(image, columns, rows, 14, image_aspect_ratio, MEAN)
    count = 1 if columns * rows == 1 else columns * rows + 1
    assert tiles.shape == (count, 3, 14, 14) and tiles.dtype == np.uint8
    assert np.array_equal(tiles[-1], image_to_pixels(image, 14, image_aspect_ratio, MEAN))


@pytest.mark.parametrize("grid", [2, 3])
@pytest.mark.parametrize("size", [(90, 60), (60, 80), (200, 101), (30, 30)])
def test_square_crop_grids_equal_the_huggingface_processor(grid: int, size: tuple[int, int]) -> None:
    image = noise(*size)
    side = grid * 14
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_rescale=False, do_normalize=False
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    ours = image_to_tiles(image, grid, grid, 14, "crop", MEAN)
    assert np.array_equal(joined(ours, grid, grid), theirs.transpose(1, 2, 0))


@pytest.mark.parametrize(("columns", "rows", "size"), [(2, 1, (100, 90)), (1, 3, (50, 40)), (3, 2, (40, 80))])
def test_other_crop_grids_cover_and_are_centred(columns: int, rows: int, size: tuple[int, int]) -> None:
    image, (width, height) = noise(*size), (columns * 14, rows * 14)
    scale = max(width / size[0], height / size[1])
    whole = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    expected = np.asarray(whole.crop((left, top, left + width, top + height)))
    assert np.array_equal(joined(image_to_tiles(image, columns, rows, 14, "crop", MEAN), columns, rows), expected)


@pytest.mark.parametrize("way", ["stretch", "crop without the centre"])
def test_squeezed_grids_show_the_whole_image(way: str) -> None:
    image = noise(64, 50)
    ratio, center_crop = ("stretch", True) if way == "stretch" else ("crop", False)
    tiles = image_to_tiles(image, 3, 2, 14, ratio, MEAN, center_crop=center_crop)
    assert np.array_equal(joined(tiles, 3, 2), np.asarray(image.resize((42, 28), Image.Resampling.BICUBIC)))


def test_padded_grids_have_the_mean_colour_at_the_sides() -> None:
    image = Image.new("RGB", (10, 10), (250, 10, 10))
    tiles = image_to_tiles(image, 2, 1, 8, "pad", (0.5, 0.25, 1.0), resample=Image.Resampling.NEAREST)
    whole = joined(tiles, 2, 1)
    assert (whole[:, :4] == (127, 63, 255)).all() and (whole[:, 12:] == (127, 63, 255)).all()
    assert (whole[:, 4:12] == (250, 10, 10)).all()


def test_tiles_lie_row_by_row() -> None:
    image = Image.new("RGB", (28, 28))
    for number, corner in enumerate([(0, 0), (14, 0), (0, 14), (14, 14)]):
        image.paste((number, number, number), (*corner, corner[0] + 14, corner[1] + 14))
    assert image_to_tiles(image, 2, 2, 14, "crop", MEAN)[:4, 0, 5, 5].tolist() == [0, 1, 2, 3]
