"""A table that Hugging Face's `datasets` saved on disk, read row by row; images stay as they were encoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.conversation import IMAGE_MARK
from megatron_patch.data.preparation.sources.base import Source, SourceRecord
from megatron_patch.data.preparation.sources.chat import read_turns
from megatron_patch.data.preparation.sources.image_folders import ImageFolders
from megatron_patch.data.preparation.sources.question_answer import turns_of
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError

ROWS_AT_ONCE = 256  # texts
IMAGE_ROWS_AT_ONCE = 16
# The files are mapped into memory, where pages that were read stay until the mapping is closed: it is opened anew after
ROWS_PER_OPENING = 20_000
IMAGE_BYTES_PER_OPENING = 16 << 20


@dataclass(frozen=True)
class Columns:
    """Names of the columns; None: guessed, or absent."""

    image: str | None = None  # images, lists of images, or their file names
    conversation: str | None = None  # lists of turns, in any form that sources/chat.py reads
    question: str | None = None
    answer: str | None = None
    caption: str | None = None  # a text about the image, without a question
    identifier: str | None = None


USUAL_NAMES = {
    "image": ("image", "images"),
    "conversation": ("conversations", "messages"),
    "question": ("question",),
    "answer": ("answer",),
    "caption": ("caption", "text"),
    "identifier": ("id",),
}


class HfDatasetSource(Source):
    """One split of a folder that save_to_disk wrote."""

    def __init__(self, path: Path, split: str | None, columns: Columns, image_roots: Sequence[Path] = ()) -> None:
        self._path = path
        self._split = split
        self._folders = ImageFolders(image_roots)
        dataset = self._open()
        self._rows = len(dataset)
        self._columns = _find_columns(path, columns, dataset.column_names)
        self._forget()

    @property
    def name(self) -> str:
        """Path of the folder."""
        return str(self._path)

    def describe(self) -> dict[str, Any]:
        """Folder, split, rows and columns; what is in them is compared record by record."""
        return {
            "source": str(self._path.resolve()),
            "source_split": self._split,
            "rows": self._rows,
            "columns": vars(self._columns),
            "image_roots": self._folders.describe(),
        }

    def places(self) -> list[Path]:
        """Folder of the table, and of images that it names."""
        return [self._path, *self._folders.places()]

    def count(self) -> int:
        """Rows."""
        return self._rows

    def items(self) -> Iterator[dict[str, Any]]:
        """The columns of each row, with the names of its images in place of the images."""
        columns = self._columns
        texts = {key: column for key, column in vars(columns).items() if column is not None and key != "image"}
        for start in range(0, self._rows, ROWS_AT_ONCE):
            if start % ROWS_PER_OPENING < ROWS_AT_ONCE:
                dataset = self._open().with_format("arrow")
            table = dataset[start : min(start + ROWS_AT_ONCE, self._rows)]
            values = {key: table[column].to_pylist() for key, column in texts.items()}
            names = _image_names(table[columns.image], start) if columns.image else [[]] * len(table)
            for place in range(len(table)):
                row = {key: found[place] for key, found in values.items()}
                yield {**row, "id": row.get("identifier"), "row": start + place, "image": names[place]}

    def read(self, item: dict[str, Any]) -> SourceRecord:
        """A row in LLaVA's form."""
        names, row = item["image"], item["row"]
        system = None
        if self._columns.conversation:
            turns, system, inside = read_turns(_as_list_of_turns(item["conversation"]))
            if inside:
                raise RecordError("malformed", "images are named in the messages, wanted them in a column")
        elif self._columns.question:
            if not isinstance(item["question"], str):
                raise RecordError("malformed", f"the question is {type(item['question']).__name__}, wanted text")
            turns = turns_of(item["question"], item["answer"], len(names))
        else:
            turns = turns_of(IMAGE_MARK if names else "", item["caption"], len(names))
        images = [(row, number, name) for number, name in enumerate(names)]
        image = names if len(names) > 1 else names[0] if names else None
        return SourceRecord(item["id"], turns, image, images, system)

    def read_image(self, reference: tuple[int, int, str]) -> bytes:
        """Bytes of an image: those of the row, or of the file that the row names."""
        row, number, name = reference
        value = self._image_column(row)[row % IMAGE_ROWS_AT_ONCE]
        if _is_list(value.type):
            value = value.values[number]
        found = value.as_py()
        data = found.get("bytes") if isinstance(found, dict) else found if isinstance(found, bytes) else None
        if data is None:
            return self._folders.read(name)
        self._bytes_read += len(data)
        return data

    def _image_column(self, row: int) -> Any:
        """The images of the rows around this one."""
        start = row - row % IMAGE_ROWS_AT_ONCE
        if self._window is None or self._window[0] != start:
            if self._images is None or self._bytes_read > IMAGE_BYTES_PER_OPENING:
                self._forget()
                self._images = self._open().select_columns([self._columns.image]).with_format("arrow")
            rows = self._images[start : min(start + IMAGE_ROWS_AT_ONCE, self._rows)]
            self._window = (start, rows[self._columns.image])
        return self._window[1]

    def _forget(self) -> None:
        """Close the mapped files."""
        self._images: Any = None
        self._window: tuple[int, Any] | None = None
        self._bytes_read = 0

    def _open(self) -> Any:
        """The dataset, its files mapped into memory.  Raises UserError."""
        from datasets import DatasetDict, load_from_disk

        try:
            found = load_from_disk(str(self._path), keep_in_memory=False)
        except Exception as error:  # FileNotFoundError, JSON and Arrow errors: whatever a foreign folder causes
            raise UserError(
                f"{self._path}: is no folder that datasets' save_to_disk wrote ({type(error).__name__}: {error})"
            ) from None
        if not isinstance(found, DatasetDict):
            if self._split is not None:
                raise UserError(f"{self._path}: holds one table without splits; leave out --source-split {self._split}")
            return found
        if self._split is None and len(found) == 1:
            return next(iter(found.values()))
        if self._split not in found:
            asked = "none was named" if self._split is None else f"{self._split} is not among them"
            raise UserError(f"{self._path}: has the splits {', '.join(found)}, {asked}; name one with --source-split")
        return found[self._split]


def _find_columns(path: Path, wanted: Columns, there: Sequence[str]) -> Columns:
    """Named columns, and guesses for those that were not named.  Raises UserError."""
    for key, column in vars(wanted).items():
        if column is not None and column not in there:
            raise UserError(f"{path}: has no column {column!r} for the {key}, only {', '.join(there)}")
    named_text = any((wanted.conversation, wanted.question, wanted.answer, wanted.caption))
    found = dict(vars(wanted))
    for key, names in USUAL_NAMES.items():
        # Whoever names one column with texts means that one.
        if found[key] is None and (key in ("image", "identifier") or not named_text):
            found[key] = next((name for name in names if name in there), None)
    if found["conversation"]:
        found |= {"question": None, "answer": None, "caption": None}
    elif found["question"] and found["answer"]:
        found |= {"caption": None}
    elif named_text and (found["question"] or found["answer"]):
        raise UserError(f"{path}: --question-column and --answer-column belong together; name both")
    elif found["caption"]:
        found |= {"question": None, "answer": None}
    else:
        raise UserError(
            f"{path}: columns are {', '.join(there)}; wanted conversations or messages, or question and answer, or "
            "caption or text; name them with --conversation-column, --question-column and --answer-column, or "
            "--caption-column"
        )
    return Columns(**found)


def _as_list_of_turns(value: Any) -> Any:
    """{from: [...], value: [...]}, as datasets stores a Sequence of a dict, -> a list of turns."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]


def _is_list(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _image_names(column: Any, first_row: int) -> list[list[str]]:
    """Names of each row's images: their own file names, or their places in the table."""
    import pyarrow
    from pyarrow import compute

    rows = len(column)
    if _is_list(column.type):
        counts = [count or 0 for count in compute.list_value_length(column).to_pylist()]
        column = compute.list_flatten(column)
    else:
        counts = [int(valid) for valid in compute.is_valid(column).to_pylist()]
        column = column.drop_null()
    if pyarrow.types.is_struct(column.type):
        paths = compute.struct_field(column, "path").to_pylist()
    elif pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
        paths = [None] * len(column)
    else:
        paths = column.to_pylist()
    remaining = iter(paths)
    names = []
    for row in range(rows):
        own = [next(remaining) for _ in range(counts[row])]
        names.append([str(path) if path else f"row {first_row + row}.{place}" for place, path in enumerate(own)])
    return names
