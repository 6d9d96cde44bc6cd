"""Asks an exported LLaVA folder questions about images and counts the answers that are exactly right.

    python -m examples.llava_mcore.quickstart.answer MODEL QUESTIONS --out DIR

MODEL      a Hugging Face LLaVA folder (LlavaForConditionalGeneration and AutoProcessor load it)
QUESTIONS  a folder with digits.json (LLaVA's JSON format, the gpt turns hold the truth) and images/
DIR        answers.jsonl (every answer) and answers.png (a contact sheet) are written here

Every question is asked twice: about its own image, and about another image. A model that looks at the images is
right the first time and falls to chance the second time.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from megatron_patch.arguments import auto_template
from megatron_patch.atomic_files import write_text
from megatron_patch.data.conversation import TEMPLATES, ConversationEncoder, Exchange
from megatron_patch.data.image import open_image
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings

BATCH = 128
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """One question about one image and its true answer."""

    image: str
    text: str
    truth: str


@dataclass(frozen=True)
class Score:
    """How a question fared over all images; shares are 0..1. `chance`: always giving its most frequent answer."""

    text: str
    count: int
    exact: float
    swapped: float
    chance: float


def read_questions(folder: Path) -> list[Question]:
    """Every (human, gpt) pair of folder/digits.json as a question of its own."""
    file = folder / "digits.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; make it with examples/llava_mcore/quickstart/make_digits.py")
    questions = []
    for record in json.loads(file.read_text()):
        turns = record["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            text = human["value"].replace("<image>", "").strip()
            questions.append(Question(record["image"], text, gpt["value"]))
    return questions


def swap_images(images: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Every image -> another one: a random cycle through all, so that none stays in its place."""
    order = np.random.default_rng(seed).permutation(sorted(set(images))).tolist()
    if len(order) < 2:
        raise UserError("swapping images needs at least two of them")
    return dict(zip(order, order[1:] + order[:1], strict=True))


def score(questions: Sequence[Question], answers: Sequence[str], swapped: Sequence[str]) -> list[Score]:
    """One row per question text, in the order of first appearance. An answer counts when it equals the truth."""
    rows = defaultdict(list)
    for question, answer, other in zip(questions, answers, swapped, strict=True):
        rows[question.text].append((question.truth, answer, other))
    return [
        Score(
            text=text,
            count=len(row),
            exact=sum(truth == answer for truth, answer, _ in row) / len(row),
            swapped=sum(truth == other for truth, _, other in row) / len(row),
            chance=max(Counter(truth for truth, _, _ in row).values()) / len(row),
        )
        for text, row in rows.items()
    ]


def total(scores: Sequence[Score]) -> Score:
    """All questions together, each weighing the same."""
    count = sum(row.count for row in scores)

    def mean(name: str) -> float:
        return sum(getattr(row, name) * row.count for row in scores) / count

    return Score("all", count, mean("exact"), mean("swapped"), mean("chance"))


def table(scores: Sequence[Score]) -> str:
    lines = [f"{'question':<32}{'asked':>7}{'exact':>9}{'other image':>15}{'chance':>9}"]
    for row in [*scores, total(scores)]:
        lines.append(f"{row.text:<32}{row.count:>7}{row.exact:>9.1%}{row.swapped:>15.1%}{row.chance:>9.1%}")
    return "\n".join(lines)


@torch.inference_mode()
def generate(
    model: LlavaForConditionalGeneration,
    processor: AutoProcessor,
    encoder: ConversationEncoder,
    asked: Sequence[tuple[Path, str]],
    exif_orientation: bool = True,
) -> list[str]:
    """(image file, question) pairs -> answers, greedily, in batches of BATCH.

    The prompt goes the way of every transformers user, text through the processor; its tokens are compared with those
    that the training saw for the same question, since a model answers badly when they differ.
    """
    answers = [""] * len(asked)
    # Batches of one question each: their prompts have equal lengths and need no padding.
    for text in sorted({text for _, text in asked}):
        exchange = [Exchange(f"<image>\n{text}", None)]
        prompt = encoder.prompt(exchange)
        trained_ids = encoder.encode(exchange).ids
        same = [index for index, (_, other) in enumerate(asked) if other == text]
        for start in range(0, len(same), BATCH):
            batch = same[start : start + BATCH]
            images = [open_image(asked[index][0].read_bytes(), exif_orientation) for index in batch]
            inputs = processor(text=[prompt] * len(batch), images=images, return_tensors="pt")
            if inputs.input_ids[0].tolist() != trained_ids:
                raise UserError(
                    f"{text!r}: the processor makes {inputs.input_ids[0].tolist()} of the prompt, the training saw "
                    f"{trained_ids}; the tokenizer was changed after the export"
                )
            inputs = inputs.to(model.device)
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            generated = processor.batch_decode(output[:, len(trained_ids) :], skip_special_tokens=True)
            for index, answer in zip(batch, generated, strict=True):
                answers[index] = answer.strip()
    return answers


def draw_sheet(file: Path, folder: Path, questions: Sequence[Question], answers: Sequence[str], most: int = 40) -> None:
    """Contact sheet of evenly chosen questions: image, question, answer (green or red), truth where it differs."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = np.linspace(0, len(questions) - 1, min(most, len(questions))).astype(int)
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2 * columns, 2.35 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, chosen, strict=False):
        question, answer = questions[index], answers[index]
        right = answer == question.truth
        axis.imshow(Image.open(folder / "images" / question.image))
        axis.set_title(question.text, fontsize=8)
        caption = answer if right else f"{answer or '(nothing)'}  (truth: {question.truth})"
        colour = "green" if right else "red"
        axis.text(0.5, -0.03, caption, color=colour, fontsize=10, ha="center", va="top", transform=axis.transAxes)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def make_encoder(model_folder: Path, template: str | None, tokenizer: object) -> ConversationEncoder:
    """Prompts as the model was trained with; template: in place of that one.

    Raises:
        UserError: it was trained on tiles, which no processor of transformers makes for it.
    """
    exported = LlavaFolder(model_folder)
    settings, geometry = exported.training_settings or TrainingSettings(None), exported.geometry()
    if settings.image_tiles != (1, 1):
        raise UserError(
            f"{model_folder} was trained with IMAGE_TILES={settings.spelled('image_tiles')}, wanted 1x1: its processor "
            "cuts no tiles; let training itself answer questions with SAMPLE_ANSWERS"
        )
    return ConversationEncoder(
        tokenizer,
        template or auto_template(exported),
        geometry.image_token_id,
        geometry.tower.image_tokens,
        image_conv_front=settings.image_conv_front,
        image_start_end=settings.image_start_end,
    )


def answer_all(model_folder: Path, folder: Path, out: Path, template: str | None = None) -> list[Score]:
    """Asks everything, writes answers.jsonl and answers.png to `out`, gives the scores."""
    questions = read_questions(folder)
    processor = AutoProcessor.from_pretrained(model_folder)
    model = LlavaForConditionalGeneration.from_pretrained(model_folder).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    encoder = make_encoder(model_folder, template, processor.tokenizer)
    turned = (LlavaFolder(model_folder).training_settings or TrainingSettings(None)).exif_orientation
    other = swap_images([question.image for question in questions])
    images = folder / "images"
    own = [(images / question.image, question.text) for question in questions]
    answers = generate(model, processor, encoder, own, turned)
    swapped = [(images / other[question.image], question.text) for question in questions]
    swapped_answers = generate(model, processor, encoder, swapped, turned)

    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({**asdict(question), "answer": answer, "answer_about_other_image": swap})
        for question, answer, swap in zip(questions, answers, swapped_answers, strict=True)
    ]
    write_text(out / "answers.jsonl", "\n".join(lines) + "\n")
    draw_sheet(out / "answers.png", folder, questions, answers)
    return score(questions, answers, swapped_answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported Hugging Face LLaVA folder")
    parser.add_argument("questions", type=Path, help="folder with digits.json and images/")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers.jsonl and answers.png")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit with 1 when less than this share is right")
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="default: the one the model was trained with")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        scores = answer_all(arguments.model, arguments.questions, arguments.out, arguments.template)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(table(scores))
    if total(scores).exact < arguments.at_least:
        parser.exit(1, f"error: {total(scores).exact:.1%} exactly right, wanted at least {arguments.at_least:.0%}\n")


if __name__ == "__main__":
    main()
