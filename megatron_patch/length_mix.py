"""What the records of a dataset hold, as a mix of sources: images, and texts of random length.

For planning before any data is there; the lengths of a dataset that is there lie in its `.nv-meta`.
"""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple


class RecordSize(NamedTuple):
    """One record."""

    tokens: int  # of images and text
    images: int  # tiles are images of their own
    labels: int  # trained tokens


@dataclass(frozen=True)
class Source:
    """Records of one kind.  Lengths of text are log-normal, as those of natural language are about."""

    records: int  # how many; only the ratio between sources counts
    images: int
    text_tokens: float  # median
    spread: float  # standard deviation of the logarithm; 0: all the same
    trained_share: float = 0.5  # of the text: the answers


@dataclass(frozen=True)
class LengthMix:
    """Sources, drawn from by their number of records."""

    name: str
    sources: tuple[Source, ...]

    def sample(self, count: int, image_tokens: int, longest: int, seed: int = 0, tiles: int = 1) -> list[RecordSize]:
        """Records in random order, the same for the same seed; cut off at `longest` tokens, image tokens kept.

        image_tokens, tiles: of each image.
        """
        draw = random.Random(seed)
        weights = [source.records for source in self.sources]
        found = []
        for source in draw.choices(self.sources, weights, k=count):
            text = source.text_tokens
            if source.spread:
                text = draw.lognormvariate(math.log(text), source.spread)
            fixed = source.images * image_tokens
            text = max(1, min(round(text), longest - fixed))
            found.append(RecordSize(fixed + text, source.images * tiles, max(1, round(text * source.trained_share))))
        return found


# LLaVA-1.5's mix (arXiv 2310.03744, table 7): the numbers of records are its own.  It says nothing of lengths: medians
# and spreads are ours, from what the records are (one exchange, several in a row, regions in a list, long chats).
MIX665K = LengthMix(
    "mix665k",
    (
        Source(158_000, 1, 220, 0.6),  # LLaVA-Instruct: conversations, descriptions, reasoning
        Source(40_000, 0, 1400, 0.7),  # ShareGPT, text alone
        Source(83_000, 1, 130, 0.4),  # VQAv2, several questions of an image
        Source(72_000, 1, 200, 0.5),  # GQA, the same
        Source(9_000, 1, 80, 0.3),  # OKVQA
        Source(80_000, 1, 170, 0.4),  # OCRVQA
        Source(66_000, 1, 110, 0.3),  # A-OKVQA, choices
        Source(22_000, 1, 110, 0.3),  # TextCaps
        Source(48_000, 1, 280, 0.5),  # RefCOCO: boxes
        Source(86_000, 1, 450, 0.6),  # Visual Genome: regions
    ),
)
PRETRAIN = LengthMix("pretrain", (Source(558_000, 1, 30, 0.35, 0.8),))  # LLaVA-Pretrain: one caption each
MIXES = {mix.name: mix for mix in (MIX665K, PRETRAIN)}


def even(text_tokens: int, images: int = 1, trained_share: float = 0.5) -> LengthMix:
    """Records that are all alike."""
    return LengthMix(f"{images} x image + {text_tokens}", (Source(1, images, text_tokens, 0.0, trained_share),))
