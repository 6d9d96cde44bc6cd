"""Data in object storage, looked at before anything is started; nothing is imported for it where there is none."""

import re
import sys
from collections.abc import Iterator, Mapping

from megatron_patch.object_storage import PATIENCE_AT_START_S, Absent, ObjectFolder, StorageError, is_url, patience


def data_problems(wanted: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """What is wrong with datasets that are URLs: (name, what it must be), the same trouble once.

    wanted: (dataset, split that is read of it) by the name of the argument.
    """
    told = set()
    for name, (path, split) in wanted.items():
        if is_url(path) and (found := _problem(path, split)) and found not in told:
            told.add(found)
            yield name, found


def _problem(url: str, split: str) -> str | None:
    """Why training cannot read the split; None: it can, as far as one small file tells."""
    if "site" not in sys.modules:  # started without site-packages
        import site

        site.main()
    with patience(PATIENCE_AT_START_S):
        try:
            if url.endswith((".yaml", ".yml")):
                folder, _, name = url.rpartition("/")
                ObjectFolder(folder).read(name)
                return None
            found = splits_in(_split_file(ObjectFolder(url)))
        except Absent:
            return "must be an energon dataset (it has no .nv-meta/split.yaml)"
        except StorageError as error:
            return f"must be readable ({error})"
    if found is not None and split not in found:
        return f"must have the split {split} (its .nv-meta/split.yaml has {', '.join(found) or 'none'})"
    return None


def _split_file(folder: ObjectFolder) -> str:
    try:
        return folder.read(".nv-meta/split.yaml").decode(errors="replace")
    except Absent:
        folder.read(".nv-meta/split.json", size=1)  # which the run itself reads
        return ""


def splits_in(text: str) -> list[str] | None:
    """Splits with shards of a split.yaml as energon writes it; None: they cannot be told from it.

    That is: split_parts, and below it names with lists.
    """
    parts = re.search(r"^split_parts:\s*\n((?:[ \t-].*\n?|\n)*)", text, re.M)
    names = re.findall(r"^[ \t]+(\w+):[ \t]*(\[\s*\])?", parts.group(1), re.M) if parts else []
    return [name for name, empty in names if not empty] if names else None
