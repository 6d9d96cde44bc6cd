"""Compute once what a frozen vision tower makes of every image of a dataset, for training to read in place of it.

    cache_tower_features.py DATASET --checkpoint CKPT [--precision bf16] [--output DIR]

CKPT is the checkpoint that training starts from, or any other with the same tower; images are made as CKPT was trained,
else as training would begin from it, unless the options say otherwise.  The features grow in DIR.partial, shard by
shard, and are there as DIR at the end; interrupted, the same command goes on.  Then train with FEATURE_CACHE=DIR.

On several machines: N jobs with --part 1/N to N/N make every N-th shard each, the command with --join ends it; DIR has
the bytes of the command without them.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import shutil
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch import device
from megatron_patch.atomic_files import write_text
from megatron_patch.checkpoint_files import newest_iteration
from megatron_patch.data.loading.blend import is_blend
from megatron_patch.data.loading.config import IMAGE_ASPECT_RATIOS, DataConfig
from megatron_patch.data.preparation.journal import Journal, ended_parts
from megatron_patch.data.preparation.parts import Part, parts_in, refuse_another_count
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.object_storage import StorageError, is_url
from toolkits.multimodal_data_preprocessing.inspect_dataset import ALL_TOKENS, grid, positive, read_checkpoint

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # PR of the launchers; fp8 keeps the tower in bf16
COUNTED = 2000  # records whose images are counted to predict the size
TIMED = 512  # images that are read back to compare
KEY = "key.json"  # in DIR.partial: what its shards are of


def main() -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments()
    try:
        cache_features(arguments)
    except (UserError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="energon folder, as DATASET_PATH")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="converted or trained")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: DATASET-features-PRECISION")
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="as PR of the run (fp8: bf16)")
    parser.add_argument("--split", default="train", help="default: train, the one that training reads cached")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at once; default: 32")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode; default: 2")
    parser.add_argument("--part", metavar="I/N", help="make every N-th shard only, as one of N jobs")
    parser.add_argument("--join", action="store_true", help="make DIR of the parts when all are done")
    images = parser.add_argument_group("images", "default: as the checkpoint was trained, else as training's defaults")
    images.add_argument("--image-aspect-ratio", choices=IMAGE_ASPECT_RATIOS, help="how an image becomes square")
    images.add_argument("--image-tiles", type=grid, metavar="COLUMNSxROWS", help="tiles of an image; 1x1: none")
    switch = argparse.BooleanOptionalAction
    images.add_argument("--ignore-exif-orientation", action=switch, help="as LLaVA's original code")
    return parser.parse_args()


def read_settings(arguments: argparse.Namespace) -> DataConfig:
    """How images become pixels; the rest of it is not looked at.  Raises UserError."""
    known = read_checkpoint(arguments.checkpoint)
    if arguments.image_aspect_ratio is not None:
        known["image_aspect_ratio"] = arguments.image_aspect_ratio
    if arguments.image_tiles is not None:
        known["tile_columns"], known["tile_rows"] = arguments.image_tiles
    if arguments.ignore_exif_orientation is not None:
        known["apply_exif_orientation"] = not arguments.ignore_exif_orientation
    fixed = {"micro_batch_size": 1, "length_multiple": 1, "seed": 0, "num_workers": arguments.workers}
    return DataConfig(**known, decoder_seq_len=ALL_TOKENS, **fixed)


def cache_features(arguments: argparse.Namespace) -> None:
    """Make the folder of features, or what is missing of it.  Raises UserError."""
    part = None if arguments.part is None else Part.parse(arguments.part)
    if arguments.join and part is not None:
        raise UserError(f"--join --part {part}: exclude each other; give --join once, when all parts are done")
    if is_blend(arguments.dataset):
        raise UserError(f"{arguments.dataset}: is a list of folders; wanted one of them, each has features of its own")
    if is_url(arguments.dataset) and arguments.output is None:
        raise UserError(f"{arguments.dataset}: is in object storage; say with --output where the features go")
    device.install()  # before anything imports Megatron
    import torch

    from megatron_patch.data.loading.dataset import EnergonFolder
    from megatron_patch.data.loading.feature_cache import FeatureCache, FeatureKey, shard_rows, write_manifest
    from megatron_patch.training.feature_cache import hash_of, read_tower

    settings, folder = read_settings(arguments), LlavaFolder.of(arguments.checkpoint)
    geometry = folder.geometry()
    pixel_std = folder.image_processing(geometry.tower.side_px)["image_std"]
    dataset = EnergonFolder(arguments.dataset, arguments.split)
    dtype = getattr(torch, DTYPES[arguments.precision])
    weights = read_tower(newest_iteration(arguments.checkpoint))
    key = FeatureKey.of(dataset.fingerprint, settings, pixel_std, geometry.tower, hash_of(weights, dtype), dtype)
    output = arguments.output or Path(f"{arguments.dataset.rstrip('/')}-features-{arguments.precision}")
    if output.exists():
        refuse_another(output, FeatureCache(output).key, key)
        tell(output, None, arguments.precision)
        return
    partial = output.with_name(f"{output.name}.partial")
    if (partial / KEY).is_file():
        refuse_another(partial, FeatureKey(**json.loads((partial / KEY).read_text())), key)
    shape = (geometry.tower.image_tokens, geometry.tower.hidden)
    names = [name for name, _ in dataset.shards]
    own = [name for number, name in enumerate(names) if part is None or Part.of_job(number, part.count) == part]
    missing = [name for name in own if shard_rows(partial, name) is None]
    journals = ended_parts(partial, "--part").values() if arguments.join else ()
    if arguments.join and missing:
        raise UserError(f"{partial}: {', '.join(missing[:10])} are missing; give the commands of all parts again")
    if not arguments.join:
        refuse_sharing(partial, part)
    row_bytes = shape[0] * shape[1] * dtype.itemsize
    check_space(partial, predicted_images(dataset, settings.tiles) * row_bytes * len(missing) // len(dataset.shards))
    partial.mkdir(parents=True, exist_ok=True)
    if part is not None:
        Journal.begin(partial / part.journal, {})
        journal = Journal(partial / part.journal)  # and nobody else does this part now
    write_text(partial / KEY, json.dumps(asdict(key)))

    rate = None
    if missing:
        tower = Tower(geometry, weights, dtype, settings.image_mean, pixel_std)
        try:
            fill(partial, dataset, settings, tower, set(missing), arguments.batch_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"{partial}: the disk is full; make room, and the same command goes on") from None
        rate = tower.images / tower.seconds if tower.images else None
    if part is not None:
        journal.end()
        print(f"part {part}: {len(own)} of {len(dataset.shards)} shards are in {partial}")
        print("next: when all parts are done, the same command with --join in place of --part")
        return
    shards = [[name, records, shard_rows(partial, name)] for name, records in dataset.shards]
    write_manifest(partial / "features.json", key, shape=shape, shards=shards)
    for journal in journals:
        journal.close()
        journal.path.unlink()
    (partial / KEY).unlink()
    os.rename(partial, output)
    tell(output, rate, arguments.precision)


def refuse_sharing(partial: Path, part: Part | None) -> None:
    """Raise UserError where a folder was begun in other parts than now."""
    if part is None and (there := parts_in(partial)):
        raise UserError(
            f"{partial}: holds parts ({', '.join(map(str, there))}); give --join when all are done, or remove it"
        )
    if part is not None and (partial / KEY).is_file() and not parts_in(partial):
        raise UserError(f"{partial}: was begun without --part; go on with it so, or remove it")
    if part is not None:
        refuse_another_count(partial, part)


def refuse_another(folder: Path, found: Any, wanted: Any) -> None:
    """Raise UserError where a folder's key is another one."""
    if different := found.differences(wanted):
        raise UserError(
            f"{folder}: holds features of something else ({'; '.join(different)}); remove it, or give another --output"
        )


# ------------------------------------------------------------------------------------------------ size


def predicted_images(dataset: Any, tiles: int) -> int:
    """Images (tiles are images of their own) of the whole dataset, by what records spread over it hold."""
    from megatron_patch.data.record import cook
    from megatron_patch.data.rejection import RecordError

    looked_at = min(COUNTED, len(dataset))
    images = 0
    for number in range(looked_at):
        with contextlib.suppress(RecordError, OSError, ValueError, tarfile.TarError):
            if (parts := dataset.read_text(number * len(dataset) // looked_at)) is not None:
                images += len(cook(parts).images)
    return -(-images * tiles * len(dataset) // looked_at)


def check_space(place: Path, needed: int) -> None:
    """Say how much will be written; UserError where the disk has less."""
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    print(f"features will take about {needed / 2**30:.2f} GiB; {free / 2**30:.1f} GiB are free", flush=True)
    if needed > free:
        raise UserError(
            f"{existing}: {free / 2**30:.1f} GiB are free, the features need about {needed / 2**30:.1f}; make room, "
            "give --output on another disk, or --precision bf16"
        )


# ------------------------------------------------------------------------------------------------ tower


class Tower:
    """`tower(pixels)` -> features, and how long it took for how many images."""

    def __init__(self, geometry: Any, weights: dict, dtype: Any, pixel_mean: Any, pixel_std: Any) -> None:
        """weights: of read_tower()."""
        import torch

        from megatron_patch import patches

        here = device.current_device()
        torch.get_device_module(here).set_device(here)  # Megatron's tower makes its position_ids there
        # Megatron tells which packages are absent, which the device room has decided, and lists what its parser sets.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            patches.apply_all(device.backend().NAME)
            from megatron.core import mpu, tensor_parallel

            from megatron_patch.model.llava import of_pixels
            from megatron_patch.training.load_model import load_tower

            # One process, so nothing is ever sent; Megatron's layers ask for the groups all the same.
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            mpu.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(1234)
            self._model = load_tower(geometry, weights, dtype)
        self._geometry, self._here = geometry.tower, here
        self._mean, self._std = of_pixels(pixel_mean), of_pixels(pixel_std)
        self.images, self.seconds = 0, 0.0

    def __call__(self, pixels: Any) -> Any:
        """uint8 [N, 3, side, side] -> [N, P, hidden] on the CPU."""
        import torch

        from megatron_patch.model.llava import tower_features

        began = time.perf_counter()
        with torch.no_grad():
            seen = torch.from_numpy(pixels).to(self._here)
            features = tower_features(self._model, self._geometry, seen, self._mean, self._std).cpu()
        self.seconds += time.perf_counter() - began
        self.images += len(pixels)
        return features


# ------------------------------------------------------------------------------------------------ images


class Images:
    """`images[index]` -> (pixels uint8 [N, 3, side, side] of a record, what is wrong with its images or None).

    N = 0 for records that training leaves out for other reasons: it finds those itself.
    """

    def __init__(self, dataset: Any, settings: DataConfig) -> None:
        self._dataset, self._settings = dataset, settings

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, tuple[str, str] | None]:
        from megatron_patch.data.loading.task_encoder import decode_images
        from megatron_patch.data.record import cook
        from megatron_patch.data.rejection import RecordError

        none = decode_images((), self._settings)
        try:
            parts = self._dataset[index]
            images = () if parts is None else cook(parts).images
        except (RecordError, OSError, ValueError, tarfile.TarError):
            return none, None
        try:
            return decode_images(images, self._settings), None
        except RecordError as error:
            return none, (error.reason, error.detail)


def fill(folder: Path, dataset: Any, settings: DataConfig, tower: Tower, missing: set[str], batch_size: int) -> None:
    """Write the missing shards; images go through the tower in batches, within a shard."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from megatron_patch.data.loading.collator import as_it_is
    from megatron_patch.data.loading.feature_cache import ShardWriter

    spans, first = [], 0
    for name, records in dataset.shards:
        if name in missing:
            spans.append((name, range(first, first + records)))
        first += records
    wanted = [index for _, span in spans for index in span]
    loader = DataLoader(
        Images(dataset, settings),
        batch_size=None,
        sampler=wanted,
        num_workers=settings.num_workers,
        collate_fn=as_it_is,
        multiprocessing_context="fork" if settings.num_workers else None,
    )
    found = iter(loader)
    with tqdm(total=len(wanted), unit=" records", desc="caching features", mininterval=1.0) as bar:
        for name, span in spans:
            with ShardWriter(folder, name) as writer:
                for features in through(tower, writer, (next(found) for _ in span), batch_size, bar):
                    writer.add_features(features)


def through(tower: Tower, writer: Any, records: Iterator, batch_size: int, bar: Any) -> Iterator:
    """Features of the records' images in batches; the writer is told of each record."""
    import numpy as np

    waiting, count = [], 0
    for pixels, problem in records:
        writer.add_record(len(pixels), problem)
        bar.update()
        waiting.append(pixels)
        count += len(pixels)
        while count >= batch_size:
            together = np.concatenate(waiting)
            yield tower(together[:batch_size])
            waiting, count = [together[batch_size:]], count - batch_size
    if count:
        yield tower(np.concatenate(waiting))


# ------------------------------------------------------------------------------------------------ what it brings


def tell(output: Path, tower_rate: float | None, precision: str) -> None:
    """Size, and whether reading beats the tower (images/s)."""
    from megatron_patch.data.loading.feature_cache import FeatureCache

    cache = FeatureCache(output)
    size = sum(file.stat().st_size for file in output.rglob("*.features"))
    print(f"features: {output}, {size / 2**30:.2f} GiB, {len(cache)} records, {precision}")
    rate = reading_rate(cache, output)
    if tower_rate is not None and rate is not None:
        print(f"tower: {tower_rate:.1f} images/s; reading: {rate:.0f} images/s from this disk")
        if rate <= tower_rate:
            print("reading is no faster than the tower: FEATURE_CACHE does not pay here")
            return
        print(f"reading is {rate / tower_rate:.0f} times as fast as the tower")
    print(f"next: put FEATURE_CACHE={output.absolute()} in front of the launcher's command, with PR={precision}")


def reading_rate(cache: Any, output: Path) -> float | None:
    """Images/s of a single process, from the disk where the system lets go of what it remembers of the files."""
    from megatron_patch.data.rejection import RecordError

    for file in output.rglob("*.features"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    step = max(1, len(cache) // TIMED)
    began, images = time.perf_counter(), 0
    for index in range(0, len(cache), step):
        with contextlib.suppress(RecordError):
            images += len(cache.read(index))
    return images / (time.perf_counter() - began) if images else None


if __name__ == "__main__":
    sys.exit(main())
