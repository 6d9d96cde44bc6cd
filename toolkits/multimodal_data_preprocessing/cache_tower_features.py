"""Compute once what a frozen vision tower makes of every image of a dataset, for training to read in place of it.

    cache_tower_features.py DATASET --checkpoint CKPT [--precision bf16] [--output DIR]

CKPT is the checkpoint that training starts from, or any other with the same tower; images are made as CKPT was trained,
else as training would begin from it, unless the options say otherwise.  The features grow in DIR.partial, shard by
shard, and are there as DIR at the end; interrupted, the same command goes on.  Then train with FEATURE_CACHE=DIR.

On several machines: N jobs with --part 1/N to N/N make every N-th shard each, the command with --join ends it; DIR has
the bytes of the command without them.  Or, on a Ray cluster that runs already, --ray-address HOST:PORT: the tower is
loaded on each GPU of its nodes, which make the shards; any node may die, and so may the command, which then goes on.
"""

import argparse
import contextlib
import errno
import json
import os
import shutil
import sys
import tarfile
import time
from dataclasses import asdict
from operator import methodcaller
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
from megatron_patch.launch.asking import add_ray_options, ray_problems
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.object_storage import StorageError, is_url
from megatron_patch.ray_cluster import RayActors, ray_actors
from toolkits.multimodal_data_preprocessing.inspect_dataset import ALL_TOKENS, grid, positive, read_checkpoint
from toolkits.multimodal_data_preprocessing.tower_features import ShardMaker, Tower, fill

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
    add_ray_options(parser)
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
    is_shared = arguments.join or part is not None
    for problem in ray_problems(arguments.ray_address, arguments.ray_workers, is_shared, "--part and --join"):
        raise UserError(problem)
    if is_blend(arguments.dataset):
        raise UserError(f"{arguments.dataset}: is a list of folders; wanted one of them, each has features of its own")
    if is_url(arguments.dataset) and arguments.output is None:
        raise UserError(f"{arguments.dataset}: is in object storage; say with --output where the features go")
    device.install()  # before anything imports Megatron
    import torch

    from megatron_patch.data.loading.dataset import EnergonFolder
    from megatron_patch.data.loading.feature_cache import (
        FeatureCache,
        FeatureKey,
        remove_unfinished,
        shard_rows,
        write_manifest,
    )
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
    with nodes_of(arguments, settings, partial, missing) as nodes:
        partial.mkdir(parents=True, exist_ok=True)
        if part is not None:
            Journal.begin(partial / part.journal, {})
            journal = Journal(partial / part.journal)  # and nobody else does this part now
        write_text(partial / KEY, json.dumps(asdict(key)))

        rate = None
        if nodes is not None:
            rate = rate_of(*fill_on_nodes(nodes, dict(dataset.shards), missing))
        elif missing:
            tower = Tower(geometry, weights, dtype, settings.image_mean, pixel_std)
            try:
                fill(partial, dataset, settings, tower, set(missing), arguments.batch_size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(f"{partial}: the disk is full; make room, and the same command goes on") from None
            rate = rate_of(tower.images, tower.seconds)
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
    remove_unfinished(partial, names)
    os.rename(partial, output)
    tell(output, rate, arguments.precision)


def nodes_of(
    arguments: argparse.Namespace, settings: DataConfig, partial: Path, missing: list[str]
) -> contextlib.AbstractContextManager[RayActors | None]:
    """Makers of shards on the nodes of --ray-address; none without it, or where no shard is missing."""
    if arguments.ray_address is None or not missing:
        return contextlib.nullcontext()
    is_there = not is_url(arguments.dataset)
    dataset = str(Path(arguments.dataset).absolute()) if is_there else arguments.dataset
    maker = ShardMaker(
        dataset,
        arguments.split,
        settings,
        arguments.checkpoint.absolute(),
        DTYPES[arguments.precision],
        partial.absolute(),
        arguments.batch_size,
    )
    places = [maker.checkpoint, *([Path(dataset)] if is_there else [])]
    address, workers = arguments.ray_address, arguments.ray_workers
    return ray_actors(address, workers, maker, places, partial, "dataset, checkpoint, output")


def fill_on_nodes(nodes: RayActors, records: dict[str, int], missing: list[str]) -> tuple[int, float]:
    """Have the missing shards made: images that towers have seen, and the seconds of all.  Raises UserError.

    records: of each shard.
    """
    from tqdm import tqdm

    images, seconds = 0, 0.0
    total = sum(records[name] for name in missing)
    with tqdm(total=total, unit=" records", desc="caching features", mininterval=1.0) as bar:
        made = nodes.in_order(methodcaller("make", name) for name in missing)
        for name, (more_images, more_seconds) in zip(missing, made, strict=True):
            bar.update(records[name])
            images, seconds = images + more_images, seconds + more_seconds
    return images, seconds


def rate_of(images: int, seconds: float) -> float | None:
    """Images/s of a tower; None: it saw none."""
    return images / seconds if images else None


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
