"""The files of a benchmark.  What is wrong with them is a UserError that names file and record."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_patch.errors import UserError


class Record:
    """One record of a file: its values by name, each of a kind that the reader expects."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: is {type(values).__name__}, wanted an object")
        self._values = values
        self.where = where

    def has(self, name: str) -> bool:
        """Is there a value, and not null?"""
        return self._values.get(name) is not None

    def value(self, name: str, *kinds: type) -> Any:
        """The value of this name, of one of these kinds.  Raises UserError."""
        if name not in self._values:
            raise self.error(f"has no {name!r}; it has {', '.join(map(str, self._values)) or 'nothing'}")
        value = self._values[name]
        if not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise self.error(f"{name!r} is {type(value).__name__} ({str(value)[:40]!r}), wanted {wanted}")
        return value

    def text(self, name: str) -> str:
        """A text, or a number as one."""
        return str(self.value(name, str, int))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, not empty."""
        found = self.value(name, list)
        if not found or not all(isinstance(text, str) for text in found):
            raise self.error(f"{name!r} is {str(found)[:60]}, wanted a list of texts")
        return tuple(found)

    def records(self, name: str) -> list["Record"]:
        """A list of objects."""
        return [Record(values, f"{self.where}, {name} {n}") for n, values in enumerate(self.value(name, list))]

    def letter_of(self, name: str, count: int) -> str:
        """A letter that is one of the first `count`."""
        letter = self.text(name).strip().upper()
        if len(letter) != 1 or not 0 <= ord(letter) - ord("A") < count:
            raise self.error(f"{name!r} is {letter!r}, wanted the letter of one of {count} choices")
        return letter

    def error(self, what: str) -> UserError:
        """A UserError about this record, to be raised."""
        return UserError(f"{self.where}: {what}")


class Source:
    """Where a benchmark lies: a folder (or its one file), and the folder of its images if that is elsewhere.

    left_out: questions that the reader left out, by reason.
    """

    def __init__(self, data: Path, images: Path | None = None) -> None:
        if not data.exists():
            raise UserError(f"{data}: no such file or folder; wanted the benchmark's data, as it was published")
        if images is not None and not images.is_dir():
            raise UserError(f"{images}: no such folder; wanted the benchmark's images")
        self.data = data
        self.folder = data if data.is_dir() else data.parent
        self._images = images
        self.left_out: Counter[str] = Counter()

    def places(self) -> list[Path]:
        """Where data and images lie."""
        return [self.folder] if self._images is None else [self.folder, self._images]

    def file(self, *patterns: str) -> Path:
        """The data if it is a file, else the only file of one of these patterns in it; the first that fits counts."""
        if self.data.is_file():
            return self.data
        for pattern in patterns:
            found = sorted(self.data.glob(pattern))
            if len(found) > 1:
                names = ", ".join(path.name for path in found)
                raise UserError(f"{self.data}: holds {names}; name one of them as the data")
            if found:
                return found[0]
        raise UserError(f"{self.data}: no such file in it as {' or '.join(patterns)}")

    def files(self, *patterns: str) -> list[Path]:
        """The data if it is a file, else all files of these patterns in it, by name."""
        if self.data.is_file():
            return [self.data]
        found = sorted({path for pattern in patterns for path in self.data.glob(pattern)})
        if not found:
            raise UserError(f"{self.data}: no such file in it as {' or '.join(patterns)}")
        return found

    def image(self, record: Record, name: str, *folders: str) -> Path:
        """The file of this name in one of the folders (of the data), or in the images' folder.  Raises UserError."""
        places = [self._images] if self._images is not None else [self.folder / folder for folder in folders]
        for place in places:
            if (place / name).is_file():
                return place / name
        looked = " or ".join(map(str, places))
        raise record.error(f"its image {name} is not in {looked}; name their folder: --images, EVAL_BENCHMARK_IMAGES")


def read_json(path: Path) -> Any:
    """The content of a JSON file.  Raises UserError."""
    return _decode(_text(path), str(path))


def read_object(path: Path) -> Record:
    """A JSON file that is one object."""
    return Record(read_json(path), str(path))


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSON list, or one per line.  Raises UserError."""
    text = _text(path)
    if text.lstrip().startswith("["):
        for number, values in enumerate(_decode(text, str(path))):
            yield Record(values, f"{path}, record {number}")
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Record(_decode(line, where), where)


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file, as the Hugging Face hub stores data sets.  Raises UserError."""
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            for values in batch.to_pylist():
                yield Record(values, f"{path}, row {number}")
                number += 1
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None


def image_in_row(record: Record, name: str) -> bytes:
    """The bytes of an image column of the hub: {bytes, path}, with the bytes in it."""
    image = Record(record.value(name, Mapping), f"{record.where}, {name}")
    return image.value("bytes", bytes)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from None
