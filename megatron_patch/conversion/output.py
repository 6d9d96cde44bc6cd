"""Where results go: disk checked first, written beside, renamed at the end, progress shown; the disk kept busy."""

import ctypes
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_patch.atomic_files import atomic_folder
from megatron_patch.errors import UserError


def check_target(target: Path) -> None:
    """Refuse a target that exists and is not an empty folder.

    Raises:
        UserError: naming the target and the remedy.
    """
    if target.is_symlink() and not target.exists():
        raise UserError(f"{target} is a link to nothing; remove it or choose another target")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; wanted a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} exists and is not empty; remove it or choose another target")


def check_disk(target: Path, needed: int) -> None:
    """Refuse when the disk of the target has less than the needed bytes free (and 1% and 16 MB to spare).

    Raises:
        UserError: with both numbers.
    """
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    free, wanted = shutil.disk_usage(parent).free, needed + needed // 100 + 16 * 2**20
    if free < wanted:
        raise UserError(
            f"{parent} has {free / 1e9:.2f} GB free, the result needs {wanted / 1e9:.2f} GB; "
            "free some space or choose a target on another disk"
        )


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """An atomic_folder(), whose failures are sentences.

    Raises:
        UserError: the folder cannot be made or written, or another process made the target meanwhile.
    """
    check_target(target)
    try:
        with atomic_folder(target) as folder:
            yield folder
    except FileExistsError as error:
        raise UserError(f"{target} appeared while this ran ({error.strerror}); nothing was written") from None
    except OSError as error:
        raise UserError(f"writing {target} failed: {error}; nothing was left behind") from error


@contextmanager
def progress_bar(total_bytes: int, title: str, shown: bool):
    """Yield advance(bytes): a tqdm bar in GB and GB/s on stderr, or nothing."""
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5) as bar:
        yield bar.update


def ahead[Item](items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made in a thread while the caller writes this one: reading and writing overlap."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux


def start_writing_back(descriptor: int, offset: int, count: int) -> None:
    """Have the system begin to write these bytes to the disk, without waiting; else it begins with the final sync."""
    if _sync_file_range is not None and count:
        write = 2  # SYNC_FILE_RANGE_WRITE
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(write))
