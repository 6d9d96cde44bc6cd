"""What the training loader alone delivers: images and tokens per second for 0, 1, 2, ... workers.

    python toolkits/benchmark/benchmark_loading.py [--workers 0 1 2 4] [--step-records 32 --step-seconds 1.2]
    python toolkits/benchmark/benchmark_loading.py --workers 2 8 --store-latency-ms 30 [--store-mb-per-s 200]
    python toolkits/benchmark/benchmark_loading.py --dataset WDS --checkpoint CKPT [--decoder-seq-len 2048]

Without --dataset the records are made here: a photo-like JPEG of COCO's sizes, 336 px for the model, 576 tokens of the
image and 40 of text.  The shards are dropped from the system's cache before each measurement, so that they are read
from the disk (a store may keep a cache of its own).  With --store-latency-ms the same folder is read from a store that
answers so late as well (slow_store.py), in turns with the disk.  With --step-records and --step-seconds, those of one
rank, it says how many workers (NUM_WORKERS) a step needs.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: a worker is one core
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "multimodal_data_preprocessing"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401

# isort: split
from benchmark_pictures import MEAN, SIZES, photo_like
from inspect_dataset import read_checkpoint
from slow_store import BUCKET
from tqdm import tqdm
from workload import SHAPES, WORDS, convert, write_model

from megatron_patch.data.loading import DataConfig, build_train_loader
from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.errors import UserError
from megatron_patch.object_storage import is_url

SHAPE = dataclasses.replace(SHAPES["7B-576+40"], weights=False)
HEADROOM = 1.25  # times what a step takes on average: records differ, and workers share memory and disk


@dataclass(frozen=True)
class Rate:
    """What a loader delivered in so many seconds."""

    source: str  # disk or store
    workers: int
    seconds: float
    records: int
    images: int
    tokens: int
    cpu_seconds: float

    def row(self) -> str:
        """Of the table."""
        each = max(1, self.workers)
        images, tokens = self.images / self.seconds, self.tokens / self.seconds
        numbers = (images, images / each, tokens, tokens / each, self.images / self.cpu_seconds)
        return f"| {self.source} | {self.workers} | {' | '.join(f'{number:.0f}' for number in numbers)} |"


HEADER = (
    "| from | workers | images/s | per worker | tokens/s | per worker | images per CPU second |\n" + "|---" * 7 + "|"
)


def write_photos(folder: Path, records: int) -> Path:
    """An energon folder of photo-like images with a caption each."""
    (folder / "images").mkdir(parents=True)
    listed = []
    for number in tqdm(range(records), desc="making images", leave=False):
        (folder / f"images/{number}.jpg").write_bytes(photo_like(*SIZES[number % len(SIZES)], seed=number))
        caption = " ".join(f"w{(number + word) % WORDS}" for word in range(SHAPE.text_tokens - 1))
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        listed.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    return convert(folder, listed)


def config_of_photos(model: Path) -> DataConfig:
    """Settings for them; `model` has the tokenizer."""
    write_model(model, SHAPE)
    return DataConfig(
        tokenizer_path=str(model),
        template="plain",
        image_token_id=json.loads((model / "config.json").read_text())["image_token_index"],
        image_tokens=SHAPE.image_tokens,
        side_px=SHAPE.side_px,
        image_mean=MEAN,
        image_aspect_ratio="crop",
        decoder_seq_len=2048,
        micro_batch_size=4,
        length_multiple=1,
        seed=1234,
        num_workers=0,
    )


def drop_from_cache(dataset: Dataset) -> None:
    """Let the system forget the shards that lie on its disks."""
    for folder in dataset.folders:
        if is_url(folder.path):
            continue
        for name, _ in folder.shards:
            with Path(folder.path, name).open("rb") as shard:
                os.fsync(shard.fileno())
                os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cpu_seconds() -> float:
    """Of this process and the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(path: str, config: DataConfig, workers: int, seconds: float) -> Rate:
    """What a loader delivers, once its workers are at work."""
    loader = build_train_loader(path, dataclasses.replace(config, num_workers=workers), 0, 1)
    drop_from_cache(Dataset(path, "train"))
    cpu = cpu_seconds()
    for _ in range(1 + 2 * workers):  # what they have prepared before anyone asked
        next(loader)
    before, began = dict(loader.work), time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        next(loader)
    done = {name: loader.work[name] - before[name] for name in ("records", "images", "tokens")}
    share = done["images"] / max(1, loader.work["images"])  # of all that was loaded, while the clock ran
    del loader  # ends the workers, whose seconds count from then on
    source = "store" if is_url(path) else "disk"
    return Rate(source, workers, passed, **done, cpu_seconds=(cpu_seconds() - cpu) * share)


def workers_needed(rates: list[Rate], step_records: int, step_seconds: float) -> int:
    """NUM_WORKERS of a rank that trains on so many records in a step of so many seconds."""
    each = statistics.median(rate.records / rate.seconds / max(1, rate.workers) for rate in rates)
    return math.ceil(HEADROOM * step_records / step_seconds / each)


def rates(paths: list[str], config: DataConfig, workers: list[int], seconds: float) -> Iterator[Rate]:
    """One after the other, the paths in turns."""
    for number, path in tqdm(list(itertools.product(workers, paths)), leave=False):
        yield measure(path, config, number, seconds)


@contextlib.contextmanager
def slow_store(folder: str, latency_ms: float, mb_per_s: float) -> Iterator[str]:
    """URL of the folder in a store that ends with the block."""
    words = [folder, "--latency-ms", str(latency_ms), "--mb-per-s", str(mb_per_s)]
    command = [sys.executable, Path(__file__).parent / "slow_store.py", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{int(process.stdout.readline())}"
            os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
            yield f"s3://{BUCKET}"
        finally:
            process.kill()


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", metavar="WDS", help="energon folder or YAML, as DATASET_PATH; with --checkpoint")
    parser.add_argument("--checkpoint", type=Path, metavar="CKPT", help="converted or trained: tokenizer, images")
    parser.add_argument("--decoder-seq-len", type=int, default=2048, metavar="N")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--images", type=int, default=512, help="made, without --dataset")
    parser.add_argument("--work", type=Path, metavar="DIR", help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--step-records", type=int, metavar="N", help="records of a step of one rank")
    parser.add_argument("--step-seconds", type=float, metavar="S", help="time of a step")
    parser.add_argument("--store-latency-ms", type=float, metavar="MS", help="from a store that answers so late, too")
    parser.add_argument("--store-mb-per-s", type=float, default=0, metavar="MB", help="of each connection; 0: any")
    given = parser.parse_args()
    try:
        if (given.dataset is None) != (given.checkpoint is None):
            raise UserError("--dataset and --checkpoint go together; give both, or none for images made here")
        if (given.step_records is None) != (given.step_seconds is None):
            raise UserError("--step-records and --step-seconds go together; give both, or none")
        if given.store_latency_ms is not None and given.dataset and not Path(given.dataset).is_dir():
            raise UserError(
                f"--store-latency-ms wants a folder on a disk as --dataset, got {given.dataset}; leave it out"
            )
        with contextlib.ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark_loading_", dir=given.work))
            if given.dataset is None:
                path, config = (
                    str(write_photos(Path(name, "data"), given.images)),
                    config_of_photos(Path(name, "model")),
                )
            else:
                fixed = {"micro_batch_size": 4, "length_multiple": 1, "seed": 1234, "num_workers": 0}
                known = read_checkpoint(given.checkpoint)
                path, config = given.dataset, DataConfig(**known, decoder_seq_len=given.decoder_seq_len, **fixed)
            paths = [path]
            if given.store_latency_ms is not None:
                paths.append(stack.enter_context(slow_store(path, given.store_latency_ms, given.store_mb_per_s)))
            print(HEADER)
            found = []
            for rate in rates(paths, config, given.workers, given.seconds):
                tqdm.write(rate.row())
                found.append(rate)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{os.cpu_count()} cores, of which this process may use {len(os.sched_getaffinity(0))}")
    if given.step_seconds is not None:
        for source in dict.fromkeys(rate.source for rate in found):
            of_source = [rate for rate in found if rate.source == source]
            needed = workers_needed(of_source, given.step_records, given.step_seconds)
            records = f"{given.step_records} records in {given.step_seconds:g} s from {source}"
            print(f"{records}: NUM_WORKERS={needed} for each rank")
    return 0


if __name__ == "__main__":
    sys.exit(main())
