"""Do two machines see the same files?  Where pictures are not mounted, every record would be rejected as missing."""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

SUBFOLDERS = 64  # of each folder, the first by name; they may be mounts of their own

Sight = dict[str, str | None]


def look(places: Iterable[Path]) -> Sight:
    """{place: one file in it, or None where there is none} of files, folders, and folders directly below these."""
    seen: Sight = {}
    for place in places:
        path = os.path.realpath(place)
        seen[path] = path if os.path.isfile(path) else _file_in(path)
        if not os.path.isfile(path):
            # Outputs of conversions may come and go there.
            folders = (below for below in sorted(_list(path)[1]) if not os.path.isdir(f"{below}/.nv-meta"))
            seen |= {below: _file_in(below) for below in islice(folders, SUBFOLDERS)}
    return seen


def differences(there: Mapping[str, str | None], here: Iterable[str] = ()) -> list[str]:
    """What look() saw on another machine and this one does not see, and the reverse; here: what this one looked at."""
    found = []
    for place, file in there.items():
        if file is not None and not os.path.isfile(file):
            found.append(f"{file} is there and not here")
        elif file is None and (other := _file_in(place)) is not None:
            found.append(f"{other} is here and not there")
    return found + [f"{place} is here and not there" for place in here if place not in there]


def _file_in(folder: str) -> str | None:
    """The first file in a folder, or below it."""
    files, below = _list(folder, first_file=True)
    return files[0] if files else next((file for path in below if (file := _file_in(path)) is not None), None)


def _list(folder: str, first_file: bool = False) -> tuple[Sequence[str], Sequence[str]]:
    """Files and folders in a folder that can be read; not those that a conversion grows or ends in."""
    files, below = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    files.append(entry.path)
                    if first_file:
                        break
                elif entry.is_dir() and not entry.name.endswith(".partial"):
                    below.append(entry.path)
    except OSError:
        pass
    return files, below
