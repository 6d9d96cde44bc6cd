"""MME: a folder per task, with images and, for each, a text file of two lines QUESTION<tab>Yes or No.

data: MME_Benchmark_release_version.  In some tasks images and texts lie side by side, in others in images/ and
questions_answers_YN/.  Questions end with `Please answer yes or no.`, for which LLaVA-1.5 puts its own suffix.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_patch.errors import UserError
from megatron_patch.evaluation.question import SHORT_ANSWER, Question
from megatron_patch.evaluation.source import Source

METRIC = "mme"
SUFFIXES = (".png", ".jpg", ".jpeg")
ASKS_FOR = "Please answer yes or no."


def read(source: Source) -> Iterator[Question]:
    """Tasks are the folders; the group is the image."""
    for folder in sorted(path for path in source.folder.iterdir() if path.is_dir()):
        texts = sorted([*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt")])
        for path in texts:
            yield from _of_image(folder.name, path, _image_of(folder, path))


def _image_of(folder: Path, text: Path) -> Path:
    """The image whose questions these are.  Raises UserError."""
    for place in (text.parent, folder / "images"):
        for suffix in SUFFIXES:
            if (found := place / f"{text.stem}{suffix}").is_file():
                return found
    raise UserError(f"{text}: has no image {text.stem}{' or '.join(SUFFIXES)} beside it or in {folder / 'images'}")


def _of_image(task: str, path: Path, image: Path) -> Iterator[Question]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines()):
        if not line.strip():
            continue
        text, tab, answer = line.rpartition("\t")
        label = answer.strip().lower()
        if not tab or label not in ("yes", "no"):
            raise UserError(f"{path}, line {number + 1}: is {line[:60]!r}, wanted QUESTION<tab>Yes or No")
        name = f"{task}/{path.stem}"
        text = text.replace(ASKS_FOR, "").strip()
        yield Question(f"{name}/{number}", text, (label,), (image,), (), SHORT_ANSWER, task, name)
