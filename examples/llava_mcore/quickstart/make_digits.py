"""Writes the quickstart's data: real handwritten digits as coloured images, in LLaVA's own JSON format.

    python -m examples.llava_mcore.quickstart.make_digits OUT

OUT/stage1/   digits.json + images/   captions ("a red 7 on black"), for the projector stage
OUT/stage2/   digits.json + images/   conversations of several questions, for the instruction stage
OUT/heldout/  digits.json + images/   the same questions about digits that neither stage has seen

The digits are the 1,797 of scikit-learn (8x8 pixels, written by 43 people; UCI Optical Recognition of Handwritten
Digits). Every fifth original is held out, so training and held-out images share none.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megatron_patch.atomic_files import atomic_folder
from megatron_patch.errors import UserError

SIDE_PX = 28
GLYPH_PX = 24  # the upscaled digit; it may move by (SIDE_PX - GLYPH_PX) / 2 pixels in each direction
MAX_ANGLE_DEGREES = 8.0
COLOUR_JITTER = 10  # of 255, per channel

# Bright inks on dark grounds: the stroke is always lighter, which the tiny tower learns several times faster than both
# ways round. Every two colours are far apart (tests hold the distance), so each image has one right answer.
INKS = {
    "red": (255, 70, 70),
    "green": (70, 220, 90),
    "blue": (90, 150, 255),
    "yellow": (255, 235, 80),
    "pink": (255, 130, 220),
    "white": (250, 250, 250),
}
GROUNDS = {"black": (12, 12, 12), "gray": (75, 75, 75), "navy": (15, 20, 105), "brown": (90, 50, 15)}


@dataclass(frozen=True)
class Drawing:
    """What one image shows."""

    digit: int
    ink: str
    ground: str


QUESTIONS: dict[str, Callable[[Drawing], str]] = {
    "Which digit is this?": lambda image: str(image.digit),
    "What colour is the ink?": lambda image: image.ink,
    "What colour is the background?": lambda image: image.ground,
    "Is it even or odd?": lambda image: "odd" if image.digit % 2 else "even",
    "Is it greater than four?": lambda image: "yes" if image.digit > 4 else "no",
}
INSTRUCTION = "Describe the picture."  # the plain template drops it, as LLaVA's stage 1 does


def caption(image: Drawing) -> str:
    return f"a {image.ink} {image.digit} on {image.ground}"


def draw(glyph: np.ndarray, image: Drawing, generator: np.random.Generator, augment: bool) -> Image.Image:
    """Glyph [8, 8] of 0..16 -> RGB image of SIDE_PX, in the image's colours; moved and turned if `augment`."""
    strength = Image.fromarray((glyph * (255 / 16)).astype(np.uint8)).resize((GLYPH_PX, GLYPH_PX), Image.BICUBIC)
    margin = (SIDE_PX - GLYPH_PX) // 2
    x = y = margin
    if augment:
        angle = generator.uniform(-MAX_ANGLE_DEGREES, MAX_ANGLE_DEGREES)
        strength = strength.rotate(angle, resample=Image.BICUBIC)
        x, y = generator.integers(0, 2 * margin, size=2, endpoint=True)
    alpha = np.zeros((SIDE_PX, SIDE_PX, 1))
    alpha[y : y + GLYPH_PX, x : x + GLYPH_PX, 0] = np.asarray(strength) / 255
    ink, ground = (
        np.array(colour) + generator.integers(-COLOUR_JITTER, COLOUR_JITTER, size=3, endpoint=True)
        for colour in (INKS[image.ink], GROUNDS[image.ground])
    )
    pixels = ground + alpha * (ink - ground)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def conversation(image: Drawing, generator: np.random.Generator, questions: int) -> list[dict[str, str]]:
    """So many of the questions in random order, with their answers, as LLaVA's alternating turns."""
    turns = []
    for number, question in enumerate(generator.permutation(list(QUESTIONS))[:questions]):
        mark = "<image>\n" if number == 0 else ""
        turns.append({"from": "human", "value": mark + str(question)})
        turns.append({"from": "gpt", "value": QUESTIONS[str(question)](image)})
    return turns


def captioned(image: Drawing, _: np.random.Generator) -> list[dict[str, str]]:
    """The instruction and a caption, as LLaVA's alternating turns."""
    return [
        {"from": "human", "value": f"{INSTRUCTION}\n<image>"},
        {"from": "gpt", "value": caption(image)},
    ]


def write_set(
    folder: Path, originals: list[int], copies: int, seed: int, make_turns: Callable, augment: bool = True
) -> None:
    """Writes `copies` images of each original in random order: folder/images/*.png, then folder/digits.json."""
    digits = load_digits()
    generator = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for number, original in enumerate(generator.permutation(np.repeat(originals, copies))):
        image = Drawing(
            digit=int(digits.target[original]),
            ink=str(generator.choice(list(INKS))),
            ground=str(generator.choice(list(GROUNDS))),
        )
        name = f"{number:06d}.png"
        draw(digits.images[original], image, generator, augment).save(images / name, compress_level=1)
        # The id names the original, so that anyone can see that training and held-out images share none.
        record_id = f"digit{original:04d}-{number:06d}"
        records.append({"id": record_id, "image": name, "conversations": make_turns(image, generator)})
    (folder / "digits.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


def split_originals() -> tuple[list[int], list[int]]:
    """Indices into scikit-learn's digits: (training, held out). Every fifth in a fixed random order is held out."""
    order = np.random.default_rng(0).permutation(len(load_digits().target)).tolist()
    return sorted(order[len(order) // 5 :]), sorted(order[: len(order) // 5])


def make_digits(out: Path, copies: int = 8, questions: int = 4) -> None:
    """Writes the three sets; `out` must not exist. A kill midway leaves only OUT.tmp-<process id>."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it or name another folder")
    train, held_out = split_originals()

    asked = partial(conversation, questions=questions)
    asked_everything = partial(conversation, questions=len(QUESTIONS))
    with atomic_folder(out) as folder, ProcessPoolExecutor() as processes:
        sets = [
            processes.submit(write_set, folder / "stage1", train, copies, 1, captioned),
            processes.submit(write_set, folder / "stage2", train, copies, 2, asked),
            processes.submit(write_set, folder / "heldout", held_out, 1, 3, asked_everything, augment=False),
        ]
        for written in sets:
            written.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--copies", type=int, default=8, help="training images per original digit and stage")
    arguments = parser.parse_args()
    try:
        make_digits(arguments.out, arguments.copies)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    train, held_out = split_originals()
    print(f"{arguments.out}: {len(train) * arguments.copies} images for each stage, {len(held_out)} held out")


if __name__ == "__main__":
    main()
