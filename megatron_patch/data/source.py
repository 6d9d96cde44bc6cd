"""One split of an energon folder as a sequence of raw samples, read by energon at random positions."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_patch.errors import UserError

OPEN_SHARDS = 64


class EnergonFolder:
    """`folder[i]` -> parts of sample i as bytes (json, jpg, ...) with `__key__` and `__shard__`; None if excluded.

    Raises UserError when the path is no energon folder, or the split is absent, empty or has missing shards.
    """

    def __init__(self, path: str, split: str) -> None:
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
        from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

        meta = Path(path) / ".nv-meta"
        if not meta.is_dir():
            raise UserError(
                f"{path}: {'no .nv-meta folder in it' if Path(path).is_dir() else 'no such folder'}; wanted an energon "
                "folder, as toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py writes it"
            )
        self.path = path
        self.split = split
        self._root = EPath(Path(path).absolute())
        remedy = "convert again with a share for each split, as in --split 9,1,0"
        try:
            found = WebdatasetMeta.from_config(self._root, split_part=split)
        except AssertionError:
            raise UserError(f"{path}: .nv-meta/split.yaml has no split {split!r}; {remedy}") from None
        except (EmptyDatasetError, FileNotFoundError, KeyError, ValueError) as error:
            raise UserError(f"{path}: split {split!r} cannot be read ({error}); {remedy}") from None
        self._shards = found.shards
        self._excludes = found.sample_excludes
        self.shard_counts = [shard.count for shard in self._shards]
        if sum(self.shard_counts) == 0:
            raise UserError(f"{path}: split {split!r} has no records; {remedy}")
        sizes = []
        for shard in self._shards:
            tar = Path(path) / shard.name
            if not tar.is_file() or not Path(f"{tar}.idx").is_file():
                raise UserError(f"{path}: shard {shard.name} or its .idx file is missing; convert the data again")
            sizes.append([shard.name, shard.count, tar.stat().st_size])
        self.fingerprint = hashlib.sha256(json.dumps([split, sizes]).encode()).hexdigest()[:32]
        self._reader: Any = None
        self._reader_process = 0

    def __len__(self) -> int:
        return sum(self.shard_counts)

    def name(self, index: int) -> str:
        """`shard[number within it]`, for messages about a sample that could not be read."""
        for shard in self._shards:
            if index < shard.count:
                return f"{shard.name}[{index}]"
            index -= shard.count
        raise IndexError(index)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        # Forked workers would share the file positions of a reader opened before the fork.
        if self._reader is None or self._reader_process != os.getpid():
            from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader

            self._reader = ShardInfosITarReader(
                self._root,
                self._shards,
                sample_filter=lambda name: name not in self._excludes,
                itar_cache_size=OPEN_SHARDS,
            )
            self._reader_process = os.getpid()
        return self._reader[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}
