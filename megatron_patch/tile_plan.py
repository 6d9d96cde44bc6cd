"""What stands for one image or video in the text: the tiles that the tower sees, and what of their features is kept.

LLaVA-1.5 shows an image once.  LLaVA-NeXT and LLaVA-OneVision show it squeezed to a square (the base tile) and, cut
into a grid of tiles, near its own resolution; of the grid's features those that show the padding are dropped, and a
learnt token ends each row.  A video is frames without a grid: each is squeezed to one tile, its features are shrunk to
half as many rows and columns, and one newline ends the whole.  Everything here follows from the model's rule and the
image's size, or the number of frames, alone, so that lengths, limits and plans need no pixels.  Standard library only.

Letters: P patches along a side of a tile.  Sizes are (height, width) in pixels, grids (rows, columns).

Source of the formulas, down to the order of floating point operations: transformers 5.23, select_best_resolution and
get_patch_output_size of image_processing_utils.py, LlavaNextProcessor and LlavaOnevisionProcessor
._get_unpadded_features, for videos .replace_video_token and the model's apply_pooling.  The original training code
differs in few sizes: its candidates are (width, height), so that ties fall on the other grid, and it does not round to
7 places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PLAN_FIELDS = 8  # numbers of TilePlan.numbers
TILES_AT_ONCE = 32  # through the tower, without gradients, of a model that sees images at any resolution


@dataclass(frozen=True)
class TilePlan:
    """One image or video: its tiles, and which of their features the text holds in which order."""

    tiles: int  # images that the tower sees: the base tile, then the grid's row by row; the frames of a video
    tokens: int  # in the text
    grid: tuple[int, int] = (0, 0)  # rows, columns of tiles; (0, 0): none, the tiles' features follow each other
    top: int = 0  # first row of the grid's features that is kept, of P for each row of tiles
    left: int = 0
    # Rows, columns to which what is kept of a grid, or without one each tile (a frame), is shrunk.  A newline ends each
    # row of a grid.
    shown: tuple[int, int] = (0, 0)
    newlines: int = 0  # tokens among `tokens` that are newlines

    @property
    def frames(self) -> int:
        """Of a video; 0 for an image."""
        return self.tiles if any(self.shown) and not any(self.grid) else 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of PLAN_FIELDS: tiles, newlines, rows and columns of the grid, top, left, shown rows and columns.

        What is kept follows: the grid's features without the same margin on both sides.
        """
        return (self.tiles, self.newlines, *self.grid, self.top, self.left, *self.shown)


def fixed_tiles(columns: int, rows: int) -> int:
    """Images that the tower sees for one of columns x rows tiles: these and a thumbnail, or the image alone."""
    tiles = columns * rows
    return tiles if tiles == 1 else tiles + 1


def whole_image(tokens: int, tiles: int = 1) -> TilePlan:
    """Tiles whose features all stand in the text, one tile behind the other: LLaVA-1.5, and fixed grids of tiles."""
    return TilePlan(tiles, tokens * tiles)


def video_plan(frames: int, patches: int) -> TilePlan:
    """Plan of a video of so many frames, each of patches x patches features, as LLaVA-OneVision sees it.

    27 x 27 become 14 x 14: a frame takes 196 tokens.
    """
    side = math.ceil(patches / 2)
    return TilePlan(frames, frames * side * side + 1, shown=(side, side), newlines=1)


@dataclass(frozen=True)
class AnyResolution:
    """A model's rule for images of any size.

    Args:
        candidates: sizes of the grids in pixels, in the config's order (image_grid_pinpoints).
        side_px: of a tile.
        patches: P.
        most_tiles: features of a grid are shrunk to about as many as so many tiles have (anyres_max_9 is 9); None:
            never.
        several_plain: where a record has several images, each is padded to a square and shown once, with one newline
            behind it (LLaVA-OneVision).
    """

    candidates: tuple[tuple[int, int], ...]
    side_px: int
    patches: int
    most_tiles: int | None = None
    several_plain: bool = False

    def is_plain(self, images: int) -> bool:
        """Are the images of a record with so many padded to squares, instead of cut into tiles?"""
        return self.several_plain and images > 1

    def plan(self, size: tuple[int, int], images: int = 1) -> TilePlan:
        """Plan of an image of this size in a record with so many images."""
        side = self.patches
        if self.is_plain(images):
            return TilePlan(1, side * side + 1, newlines=1)
        height_px, width_px = self.grid_size(size)
        rows, columns = height_px // self.side_px, width_px // self.side_px
        top, left = self._margins(size, rows * side, columns * side)
        kept = (rows * side - 2 * top, columns * side - 2 * left)
        shown = self._shrunk(kept)
        return TilePlan(
            tiles=1 + rows * columns,
            tokens=side * side + shown[0] * (shown[1] + 1),
            grid=(rows, columns),
            top=top,
            left=left,
            shown=shown,
            newlines=shown[0],
        )

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The candidate that shows most of the image's pixels, of these the one that wastes least, then the first."""
        height, width = size
        best, most_shown, least_wasted = self.candidates[0], 0, math.inf
        for rows_px, columns_px in self.candidates:
            scale = min(columns_px / width, rows_px / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            wasted = rows_px * columns_px - shown
            if shown > most_shown or (shown == most_shown and wasted < least_wasted):
                best, most_shown, least_wasted = (rows_px, columns_px), shown, wasted
        return best

    def fitted_size(self, size: tuple[int, int], grid_px: tuple[int, int]) -> tuple[int, int]:
        """Size of the image once it fills the grid of this size in one direction; the rest is padding."""
        (height, width), (rows_px, columns_px) = size, grid_px
        if columns_px / width < rows_px / height:
            return min(math.ceil(height * (columns_px / width)), rows_px), columns_px
        return rows_px, min(math.ceil(width * (rows_px / height)), columns_px)

    def _margins(self, size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
        """Rows of features above and below, columns left and right of the image, which only show padding."""
        height, width = size
        if width / height > columns / rows:
            return (rows - int(round(height * (columns / width), 7))) // 2, 0
        return 0, (columns - int(round(width * (rows / height), 7))) // 2

    def _shrunk(self, kept: tuple[int, int]) -> tuple[int, int]:
        if self.most_tiles is None:
            return kept
        ratio = math.sqrt(kept[0] * kept[1] / (self.most_tiles * self.patches**2))
        return (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > 1.1 else kept


def read_candidates(pinpoints: object, side_px: int) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints of a config, checked.

    Raises:
        ValueError: what is wrong with them, as the end of a sentence.
    """
    wanted = f"wanted a list of [height, width] in pixels, multiples of the tower's {side_px}"
    if not isinstance(pinpoints, Sequence) or isinstance(pinpoints, str) or not pinpoints:
        raise ValueError(f"is {pinpoints!r}; {wanted}")
    found = []
    for size in pinpoints:
        good = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size)
        if not good or any(side < side_px or side % side_px for side in size):
            raise ValueError(f"holds {size!r}; {wanted}")
        found.append((size[0], size[1]))
    return tuple(found)
