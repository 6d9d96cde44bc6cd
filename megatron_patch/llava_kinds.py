"""The kinds of LLaVA, one row each, by transformers' model_type: what they differ in beside their LLM and tower.

Standard library only.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class LlavaKind:
    """How a LLaVA sees images; its row in transformers."""

    architecture: str  # class of transformers
    processor: str
    image_processor: str | None = None  # class of transformers; None: that of the tower's kind
    any_resolution: bool = False  # images are cut into a grid of tiles, whose rows end with the learnt image_newline
    several_plain: bool = False  # tile_plan.AnyResolution.several_plain
    aspect_ratio: str | None = None  # vision_aspect_ratio of a new model
    image_seq_length: bool = True  # its config has this field
    video_token: bool = False  # its tokenizer has VIDEO_MARK
    grids: tuple[tuple[int, int], ...] = ()  # rows, columns of tiles that a new model may choose of, in this order

    def pinpoints(self, side_px: int) -> list[list[int]]:
        """image_grid_pinpoints of a new model with tiles of this size: [height, width] in pixels."""
        return [[rows * side_px, columns * side_px] for rows, columns in self.grids]


LLAVA_KINDS = {
    "llava": LlavaKind("LlavaForConditionalGeneration", "LlavaProcessor"),  # 1.5
    "llava_next": LlavaKind(  # 1.6
        "LlavaNextForConditionalGeneration",
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        any_resolution=True,
        grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    ),
    "llava_onevision": LlavaKind(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        any_resolution=True,
        several_plain=True,
        aspect_ratio="anyres_max_9",
        image_seq_length=False,
        video_token=True,
        grids=tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)),
    ),
}
VIDEO_MARK = "<video>"
NEWLINE = "image_newline"  # the learnt token at a row's end: the field's name for it, in the hub's files and in ours


def most_tiles(aspect_ratio: object) -> int | None:
    """N of an aspect ratio `anyres_max_N`, in transformers' config and the original's; None: it is another."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect_ratio))
    return int(found[1]) if found else None
