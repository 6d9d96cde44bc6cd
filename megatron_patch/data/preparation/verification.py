"""A finished folder is opened again, and a batch of each split is read back, before it gets its name."""

import io
import itertools
import json
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from megatron_patch.data.image import check_image
from megatron_patch.data.preparation.shard_writer import END_OF_ARCHIVE

BATCH = 4  # samples of each split that are read back


def reopen(folder: Path) -> dict[str, int]:
    """Read `.nv-meta`, every index and a batch of each split, by energon's rules; returns {split: records}.

    Raises AssertionError: a folder that cannot be read back is a fault of the converter, not of the user.
    """
    counts = json.loads((folder / ".nv-meta/.info.json").read_text())["shard_counts"]
    splits = yaml.safe_load((folder / ".nv-meta/split.yaml").read_text())["split_parts"]
    named = [name for names in splits.values() for name in names]
    assert sorted(named) == sorted(counts) == sorted(path.name for path in folder.glob("*.tar")), named
    for name, count in counts.items():
        offsets = np.fromfile(folder / f"{name}.idx", dtype="<u8")
        size = (folder / name).stat().st_size
        assert len(offsets) == count + 1 and (np.diff(offsets.astype(np.int64)) > 0).all(), name
        assert offsets[0] == 0 and offsets[-1] + len(END_OF_ARCHIVE) == size, name
    for names in splits.values():
        places = [(name, number) for name in names[:BATCH] for number in range(min(BATCH, counts[name]))]
        for name, number in [*places[: BATCH - 1], (names[-1], counts[names[-1]] - 1)]:
            _read_sample(folder / name, number)
    return {split: sum(counts[name] for name in names) for split, names in splits.items()}


def _read_sample(shard: Path, number: int) -> None:
    """Find a sample through the index, and its parts as any reader of tar files does."""
    start, end = (int(offset) for offset in np.fromfile(f"{shard}.idx", dtype="<u8")[number : number + 2])
    with shard.open("rb") as file:
        file.seek(start)
        sample = file.read(end - start)
    with tarfile.open(fileobj=io.BytesIO(sample), mode="r:") as archive:
        parts = {member.name: archive.extractfile(member).read() for member in archive}
    assert len({name.split(".")[0] for name in parts}) == 1, (shard, list(parts))
    *images, (name, content) = parts.items()
    assert name.endswith(".json") and json.loads(content)["conversations"], (shard, name)
    for _, image in images:
        check_image(image)


def reopen_with_energon(folder: Path, splits: Sequence[str]) -> dict[str, int]:
    """Reopen the folder with energon's own loader and read a few records of each split; returns {split: records}.

    Its import takes half a gigabyte of memory and a few seconds (torch).  Raises whatever energon raises: a folder that
    cannot be read back is a fault of the converter, not of the user.
    """
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless
    from megatron.energon.errors import reraise_exception

    class RawEncoder(DefaultTaskEncoder):
        """Hands samples over as they are."""

        decoder = None
        cookers = [Cooker(stateless(lambda sample: sample))]

        @stateless
        def batch(self, samples: list) -> list:
            """A batch is the list of its samples."""
            return samples

    found = {}
    for split in splits:
        dataset = get_val_dataset(
            str(folder),
            split_part=split,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception),
            batch_size=1,
            task_encoder=RawEncoder(),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'pin_memory'")
            for (sample,) in itertools.islice(get_loader(dataset), 4):
                json.loads(sample["json"])
        found[split] = len(dataset)
    return found
