"""What padding costs: the same records in batches of one length, and mixed so that rows would be padded to twice.

    python toolkits/benchmark/benchmark_padding.py [--rounds 3] [--steps 8] [--stage 1]

Three trainers take turns, each as its launcher starts it, on the same records of SmolLM2-135M's shape: five of eight
records are short, three long.  `sorted` has batches of one length, `mixed` has both in each, without padding
(PADDING_FREE=true, the default on a CPU), `padded` has the same batches padded.  Printed: seconds per thousand tokens
that are no padding, medians over the rounds, and their ratio to `sorted`.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401

# isort: split
from benchmark_training import WARM_UP, our_command
from gate import Side
from tqdm import tqdm
from workload import SHAPES, WORDS, Shape, convert, write_model

from megatron_patch.conversion import convert_to_megatron

SHORT, LONG = 20, 200  # tokens of text
LONG_OF_EIGHT = 3
STEPS_OF_RECORDS = 400  # no epoch ends meanwhile


def write_lengths(folder: Path, shape: Shape, mixed: bool) -> Path:
    """Records of two lengths, in the order in which they are trained; returns the energon folder."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (shape.side_px, shape.side_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images/0.jpg")
    batch = shape.micro_batch
    listed = []
    for number in range(STEPS_OF_RECORDS * batch):
        step, place = divmod(number, batch)
        is_long = place < LONG_OF_EIGHT if mixed else step % batch < LONG_OF_EIGHT
        caption = " ".join(f"w{(number + word) % WORDS}" for word in range(LONG if is_long else SHORT))
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        listed.append({"id": str(number), "image": "0.jpg", "conversations": turns})
    return convert(folder, listed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of about two minutes on two cores")
    parser.add_argument("--steps", type=int, default=8, help="of a block; multiples of 8 hold all lengths alike")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    given = parser.parse_args()
    shape = SHAPES["135M"]
    with tempfile.TemporaryDirectory(prefix="benchmark_padding_") as name:
        work = Path(name)
        write_model(work / "model", shape)
        start = work / "checkpoint"
        convert_to_megatron(work / "model", None, start, precision="fp32", model_size=shape.size)
        data = {kind: write_lengths(work / kind, shape, kind == "mixed") for kind in ("sorted", "mixed")}
        longer = dataclasses.replace(shape, text_tokens=LONG)
        sides = {}
        try:
            for side, kind, free in (("sorted", "sorted", ""), ("mixed", "mixed", ""), ("padded", "mixed", "false")):
                options = {"DATA_ORDER": "single"} | ({"PADDING_FREE": free} if free else {})
                words, environment = our_command(
                    longer, given.stage, "fp32", start, data[kind], work / f"run-{side}", options
                )
                sides[side] = Side(side, words, environment, work / f"side-{side}")
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for trainer in sides.values():
                trainer.run(max(WARM_UP, given.steps))
            for _ in tqdm(range(given.rounds), leave=False):
                for side, trainer in sides.items():
                    seconds[side].append(trainer.run(given.steps).seconds)
                tqdm.write("  ".join(f"{side} {found[-1]:.1f} s" for side, found in seconds.items()))
        finally:
            for trainer in sides.values():
                trainer.stop()
    tokens = shape.image_tokens + (LONG_OF_EIGHT * LONG + (8 - LONG_OF_EIGHT) * SHORT) / 8
    padded = (shape.image_tokens + LONG) / tokens
    print(f"rows padded to {padded:.2f} times their tokens; stage {given.stage}, {os.cpu_count()} cores")
    per_step = tokens * shape.micro_batch * given.steps / 1000
    for side, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, seconds["sorted"], strict=True))
        print(f"{side:8s} {statistics.median(found) / per_step:7.3f} s per 1,000 tokens  {ratio:5.2f}x of sorted")


if __name__ == "__main__":
    main()
