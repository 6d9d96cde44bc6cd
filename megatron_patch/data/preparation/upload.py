"""A folder of shards into object storage: there it is a dataset when all of it is there, and none before."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_patch.errors import UserError
from megatron_patch.object_storage import ObjectFolder, StorageError, at_once

META = ".nv-meta/"
TOGETHER = 2  # files; MSC sends a large one in eight parts of 32 MiB at once, which are in memory
LAST = ".nv-meta/split.yaml"  # without it neither energon nor training finds a dataset


def check_target(url: str) -> None:
    """Raises UserError: the URL is none, cannot be listed, or has a dataset already.  Nothing is written."""
    try:
        present = ObjectFolder(url).sizes()
    except StorageError as error:
        raise UserError(str(error)) from None
    if LAST in present:
        raise UserError(f"{url}: holds a dataset already, of {len(present)} objects; remove it, or name another folder")


def upload_folder(folder: Path, url: str, on_file: Callable[[str], object] = lambda name: None) -> int:
    """Put all files of a folder below a URL that check_target() accepts, hidden ones too, split.yaml last.

    Each is sent with a checksum that the store compares; before the last, the store's list has all, with their sizes.
    After an interruption the same call sends everything again.

    Args:
        on_file: called with the name of each file that is there.
    Returns:
        Bytes.
    Raises:
        UserError: the folder is none of shards, or the store refuses; no dataset is there then.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    if LAST not in sizes:
        raise UserError(f"{folder}: no {LAST} in it; wanted a folder that a converter has written")
    target = ObjectFolder(url)
    names = sorted(sizes.keys() - {LAST}, key=lambda name: (name.startswith(META), name))
    try:
        sent = at_once([partial(target.upload, name, folder / name) for name in names], TOGETHER)
        for name, wait in zip(names, sent, strict=True):
            wait()
            on_file(name)
        there = target.sizes()
        if wrong := [name for name in names if there.get(name) != sizes[name]]:
            raise UserError(
                f"{url}: {len(wrong)} objects are not as they were sent, the first {wrong[0]} with "
                f"{there.get(wrong[0], 'no')} of {sizes[wrong[0]]} bytes; upload again"
            )
        target.upload(LAST, folder / LAST)
    except StorageError as error:
        raise UserError(f"{error}; what was sent is no dataset yet, upload again") from None
    on_file(LAST)
    return sum(sizes.values())
