"""Measure the way of images into training, side by side with transformers' CLIPImageProcessor (PIL backend).

    OMP_NUM_THREADS=1 python toolkits/multimodal_data_preprocessing/benchmark_pictures.py

Prints two tables: JPEG bytes to uint8 [3, 336, 336] on one core, by image size and over all of them, and the same
through torch's DataLoader with no, one and two workers.  The images are made here, photo-like, from a fixed seed.
"""

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: per core means per core
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401

# isort: split
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPImageProcessorPil

from megatron_patch.data.image import check_image, image_to_pixels, open_image

SIDE_PX = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
SIZES = ((500, 375), (640, 480), (640, 427), (480, 640), (375, 500))  # the most frequent ones of COCO and Visual Genome
BATCH_SIZE = 16

Prepare = Callable[[bytes], np.ndarray]


def photo_like(width: int, height: int, seed: int) -> bytes:
    """JPEG of smooth noise in four sizes of detail; 55 kB on average over SIZES."""
    random = np.random.default_rng(seed)
    values = np.zeros((height, width, 3))
    for detail in (4, 16, 64, 256):
        small = random.integers(0, 256, (max(2, height * detail // 500), max(2, width * detail // 500), 3))
        image = Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        values += np.asarray(image, dtype=np.float64) / detail**0.5
    values = (values - values.min()) * (255 / np.ptp(values))
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours(data: bytes) -> np.ndarray:
    """uint8 [3, 336, 336]: what a loader worker hands over."""
    return image_to_pixels(open_image(data), SIDE_PX, "crop", MEAN)


def huggingface(normalised: bool) -> Prepare:
    """The processor as users call it (float32, normalised), or before it rescales (uint8)."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE_PX},
        crop_size={"height": SIDE_PX, "width": SIDE_PX},
        do_rescale=normalised,
        do_normalize=normalised,
    )
    return lambda data: np.asarray(processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0])


def per_second(prepare: Prepare, images: Sequence[bytes]) -> float:
    """Images per CPU second of this process in one pass over them."""
    start = time.process_time()
    for data in images:
        prepare(data)
    return len(images) / (time.process_time() - start)


class _Images(Dataset):
    """`images[number]` -> one batch, uint8 [BATCH_SIZE, 3, 336, 336]; batches are made whole, as the loader does."""

    def __init__(self, images: Sequence[bytes], batches: int) -> None:
        self._images = images
        self._batches = batches

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, number: int) -> torch.Tensor:
        pixels = np.empty((BATCH_SIZE, 3, SIDE_PX, SIDE_PX), dtype=np.uint8)
        for row in range(BATCH_SIZE):
            pixels[row] = ours(self._images[(number * BATCH_SIZE + row) % len(self._images)])
        return torch.from_numpy(pixels)


def through_loader(images: Sequence[bytes], batches: int, workers: int) -> tuple[float, float]:
    """Images per second of wall time once the workers have started, and per CPU second of all processes together."""
    cpu_before = sum(os.times()[:4])
    loader = DataLoader(
        _Images(images, batches + 1 + 2 * workers),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    iterator = iter(loader)
    started = 1 + 2 * workers  # batches that the workers prepared while they started do not count
    for _ in range(started):
        next(iterator)
    start = time.perf_counter()
    seen = sum(len(batch) for batch in iterator)
    wall_seconds = time.perf_counter() - start
    del iterator  # ends the workers; their CPU time is known from then on
    return seen / wall_seconds, (seen + started * BATCH_SIZE) / (sum(os.times()[:4]) - cpu_before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; every figure is the median of the rounds, and the ways take turns within each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20, help="of each size (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--batches", type=int, default=32, help="through the DataLoader in each round (default: 32)")
    options = parser.parse_args(arguments)
    if min(options.pictures, options.rounds, options.batches) < 1:
        parser.error("--pictures, --rounds and --batches must be at least 1")

    sets = {
        f"{width} x {height}": [photo_like(width, height, seed) for seed in range(options.pictures)]
        for width, height in SIZES
    }
    everything = [data for images in sets.values() for data in images]
    ways = {"ours": ours, "uint8": huggingface(False), "float32": huggingface(True)}
    difference = max(int(np.abs(ours(data).astype(int) - ways["uint8"](data).astype(int)).max()) for data in everything)
    rates: dict[tuple[str, str], list[float]] = {}
    loaded: dict[int, list[tuple[float, float]]] = {workers: [] for workers in (0, 1, 2)}
    checked = []
    for _ in tqdm(range(options.rounds), unit="round"):
        for size, images in sets.items():
            for way, prepare in ways.items():
                rates.setdefault((size, way), []).append(per_second(prepare, images))
        for workers, figures in loaded.items():
            figures.append(through_loader(everything, options.batches, workers))
        checked.append(per_second(check_image, everything))

    median = {key: statistics.median(figures) for key, figures in rates.items()}
    for way in ways:  # over all images: as many of each size, so the mean of the times
        median["all", way] = len(sets) / sum(1 / median[size, way] for size in sets)
    print(f"\nJPEG bytes ({len(everything)} images, {len(b''.join(everything)) // len(everything)} bytes on average) ")
    print(f"to 3 x {SIDE_PX} x {SIDE_PX}, images per CPU second of one core, median of {options.rounds} rounds.")
    print(f"Largest difference to the processor's uint8: {difference}\n")
    print("| images | this toolkit, uint8 | HF processor, float32 | ratio | HF processor, uint8 | ratio |")
    print("|---|---|---|---|---|---|")
    for size in [*sets, "all"]:
        own, uint8, float32 = (median[size, way] for way in ("ours", "uint8", "float32"))
        print(f"| {size} | {own:.0f} | {float32:.0f} | {own / float32:.2f} | {uint8:.0f} | {own / uint8:.2f} |")
    print(
        f"\nThrough torch's DataLoader, batches of {BATCH_SIZE}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print("(wall time tells only where the cores are free; CPU time tells what two free cores would give):\n")
    print("| workers | images per second | to no worker | per CPU second, all processes |\n|---|---|---|---|")
    alone = statistics.median(wall for wall, _ in loaded[0])
    for workers, figures in loaded.items():
        wall, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {workers} | {wall:.0f} | {wall / alone:.2f} | {cpu:.0f} |")
    print(f"\nThe converter's check without decoding: {statistics.median(checked):.0f} images per CPU second.")
    print("What the pixels are and where they differ from LLaVA's: megatron_patch/data/image.py")


if __name__ == "__main__":
    main()
