"""Shards of cached features: images of a dataset's shards through a tower, in batches, into their files."""

import contextlib
import io
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch import device
from megatron_patch.checkpoint_files import newest_iteration
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.ray_cluster import check_sight

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


def fill(
    folder: Path,
    dataset: Any,
    settings: DataConfig,
    tower: Tower,
    missing: set[str],
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the missing shards; images go through the tower in batches, within a shard.

    check: raises where a shard that has been read is not to be kept.
    """
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
                check()


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


# ------------------------------------------------------------------------------------------------ on a Ray cluster


@dataclass(frozen=True)
class ShardMaker:
    """What an actor is given to make shards; paths are absolute.  Called, it opens dataset and tower."""

    dataset: str
    split: str
    settings: DataConfig
    checkpoint: Path
    dtype: str  # as torch names it
    folder: Path  # where the shards go
    batch_size: int

    def __call__(self) -> "OpenShardMaker":
        """Open them.  Raises UserError."""
        device.install()  # before anything imports Megatron
        return OpenShardMaker(self)


class OpenShardMaker:
    """In an actor; make() is its piece."""

    def __init__(self, given: ShardMaker) -> None:
        import torch

        from megatron_patch.data.loading.dataset import EnergonFolder
        from megatron_patch.training.feature_cache import read_tower

        self._given = given
        self._dataset = EnergonFolder(given.dataset, given.split)
        folder, weights = LlavaFolder.of(given.checkpoint), read_tower(newest_iteration(given.checkpoint))
        geometry = folder.geometry()
        pixel_std = folder.image_processing(geometry.tower.side_px)["image_std"]
        self._tower = Tower(geometry, weights, getattr(torch, given.dtype), given.settings.image_mean, pixel_std)

    def make(self, name: str) -> tuple[int, float]:
        """Write one shard: images that the tower has seen, and its seconds.

        Raises UserError: the node does not see the dataset any more, and what was read of the shard is not to be kept.
        """
        given, tower = self._given, self._tower
        tower.images, tower.seconds = 0, 0.0
        fill(given.folder, self._dataset, given.settings, tower, {name}, given.batch_size, check_sight)
        return tower.images, tower.seconds
