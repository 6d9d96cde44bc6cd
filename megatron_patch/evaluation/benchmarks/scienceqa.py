"""ScienceQA: problems.json {id: {question, choices, answer (number from 0), hint, image or null, subject}} and
pid_splits.json {test: [ids]}; or LLaVA's file of it, [{id, image?, conversations}] with `(A) text (B) text` as choices
and the answer's letter in the gpt turn.

data: a folder with both files and images/test/ID/IMAGE, or LLaVA's .json or .jsonl file.
"""

import re
from collections.abc import Iterator

from megatron_patch.data.conversation import IMAGE_MARK
from megatron_patch.evaluation.question import LETTER_ANSWER, LETTERS, Question
from megatron_patch.evaluation.source import Record, Source, read_object, read_records

METRIC = "multiple_choice"
SPLIT = "test"
CHOICES = re.compile(r"\(([A-E])\) ")
ANSWER = re.compile(r"\b([A-E])\b")


def read(source: Source) -> Iterator[Question]:
    """Questions of the test split.  Tasks: `image` for those with one, which are reported apart, else `text`."""
    if source.data.is_file() and source.data.name != "problems.json":
        yield from _of_llava(source)
        return
    problems = read_object(source.folder / "problems.json")
    for name in read_object(source.folder / "pid_splits.json").texts(SPLIT):
        record = Record(problems.value(name, dict), f"{source.folder / 'problems.json'}, problem {name}")
        choices, answer = record.texts("choices"), record.value("answer", int)
        if not 0 <= answer < len(choices):
            raise record.error(f"'answer' is {answer}, wanted a number from 0 to {len(choices) - 1}")
        hint = record.text("hint") if record.has("hint") else ""
        question = record.text("question")
        images = ()
        if record.has("image"):
            file = f"{name}/{record.text('image')}"
            images = (source.image(record, file, f"images/{SPLIT}", "images", SPLIT, "."),)
        yield Question(
            id=name,
            text=f"Context: {hint}\n{question}" if hint else question,
            references=(LETTERS[answer],),
            images=images,
            choices=choices,
            suffix=LETTER_ANSWER,
            task="image" if images else "text",
        )


def _of_llava(source: Source) -> Iterator[Question]:
    """The prompt as it stands in the file, choices taken out of it and written as LLaVA-1.5 does."""
    for record in read_records(source.data):
        turns = record.records("conversations")
        if len(turns) < 2:
            raise record.error(f"'conversations' has {len(turns)} turns, wanted a question and its answer")
        text, *parts = CHOICES.split(turns[0].text("value").replace(IMAGE_MARK, "").strip())
        choices = tuple(part.strip() for part in parts[1::2])
        found = ANSWER.findall(turns[1].text("value"))
        if parts[::2] != list(LETTERS[: len(choices)]) or not choices or not found:
            raise record.error("wanted choices as `(A) text (B) text` in the question, and a letter in the answer")
        if found[-1] not in LETTERS[: len(choices)]:
            raise record.error(f"its answer is {found[-1]}, wanted the letter of one of {len(choices)} choices")
        images = ()
        if record.has("image"):
            images = (source.image(record, record.text("image"), f"images/{SPLIT}", "images", SPLIT, "."),)
        yield Question(
            id=record.text("id"),
            text=text.strip().removesuffix("Options:").strip(),
            references=(found[-1],),
            images=images,
            choices=choices,
            suffix=LETTER_ANSWER,
            task="image" if images else "text",
        )
