"""What digits.yaml refers to: lmms-eval's questions are LLaVA's pairs of turns, one by one.  Needs nothing of ours."""

from pathlib import Path

from PIL import Image

IMAGES = Path("data/heldout/images")


def one_per_question(records):
    """Records of LLaVA's format (a table of `datasets`) -> a row for each question."""

    def pairs(batch):
        rows = [
            (name, human["value"].replace("<image>", "").strip(), gpt["value"])
            for name, turns in zip(batch["image"], batch["conversations"], strict=True)
            for human, gpt in zip(turns[::2], turns[1::2], strict=True)
        ]
        return dict(zip(("image", "question", "answer"), map(list, zip(*rows, strict=True)), strict=True))

    return records.map(pairs, batched=True, remove_columns=records.column_names)


def image(row):
    """The images of a question: one."""
    return [Image.open(IMAGES / row["image"]).convert("RGB")]


def question(row):
    """The text, without a mark for the image: lmms-eval puts one."""
    return row["question"]


def answer(row):
    """What is right."""
    return row["answer"]
