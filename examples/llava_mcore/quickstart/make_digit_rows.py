"""Writes the data of the quickstart at any resolution: two or three handwritten digits in one picture, wide or tall.

    python -m examples.llava_mcore.quickstart.make_digit_rows OUT

OUT/train/     digits.json + images/   a question about pictures of several sizes and shapes
OUT/heldout/   digits.json + images/   the same question about digits that the training has not seen

Digits, inks and their split are make_digits.py's.  A picture shows them side by side or one above another, each in an
ink of its own, and the question is for the inks in their order: what a model learns first, within minutes on a CPU.
A centre crop, CLIP's way to one square tile, shows no more than the middle digit of three.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from examples.llava_mcore.quickstart.make_digits import INKS, SIDE_PX, Drawing, draw, split_originals
from megatron_patch.atomic_files import atomic_folder
from megatron_patch.errors import UserError

COUNTS = (2, 3)  # of digits in a picture
SIDES_PX = (SIDE_PX, 35, 42)  # of a digit's square
HELD_OUT = 400  # pictures
GROUND = "black"
QUESTION = "Which inks are these?"


def write_rows(folder: Path, originals: list[int], pictures: int, seed: int, augment: bool) -> None:
    """Writes so many pictures of random originals: folder/images/*.png, then folder/digits.json."""
    digits = load_digits()
    generator = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for number in range(pictures):
        chosen = generator.choice(originals, size=generator.choice(COUNTS))
        # from the left to the right, or from the top down
        shown = [Drawing(int(digits.target[one]), str(generator.choice(list(INKS))), GROUND) for one in chosen]
        cells = [
            np.asarray(draw(digits.images[one], image, generator, augment))
            for one, image in zip(chosen, shown, strict=True)
        ]
        picture = Image.fromarray(np.concatenate(cells, axis=generator.integers(2)))
        side = int(generator.choice(SIDES_PX))
        name = f"{number:06d}.png"
        size = (picture.width * side // SIDE_PX, picture.height * side // SIDE_PX)
        picture.resize(size, Image.BICUBIC).save(images / name, compress_level=1)
        # The id names the originals, so that anyone can see that training and held-out pictures share none.
        record_id = "-".join(["digits", *(f"{one:04d}" for one in chosen), f"{number:06d}"])
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": " ".join(image.ink for image in shown)},
        ]
        records.append({"id": record_id, "image": name, "conversations": turns})
    (folder / "digits.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


def make_digit_rows(out: Path, pictures: int = 4000) -> None:
    """Writes both sets; `out` must not exist. A kill midway leaves only OUT.tmp-<process id>."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it or name another folder")
    train, held_out = split_originals()
    with atomic_folder(out) as folder:
        write_rows(folder / "train", train, pictures, seed=1, augment=True)
        write_rows(folder / "heldout", held_out, HELD_OUT, seed=2, augment=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--pictures", type=int, default=4000, help="to train on")
    arguments = parser.parse_args()
    try:
        make_digit_rows(arguments.out, arguments.pictures)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{arguments.out}: {arguments.pictures} pictures to train on, {HELD_OUT} held out")


if __name__ == "__main__":
    main()
