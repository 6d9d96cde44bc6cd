"""What training makes of records, for people: marked text, images after preprocessing, figures of a folder."""

import base64
import html
import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.label_check import WITHOUT_LABELS
from megatron_patch.data.loading.task_encoder import EncodedRecord, EncodedText, TaskEncoder
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import REASONS, RecordError
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.tile_plan import TilePlan

COLOURS = {"trained": "#157a2e", "other": "#444444", "image": "#1a5fb4"}
ANSI = {"trained": "\x1b[1;32m", "other": "\x1b[0m", "image": "\x1b[36m"}
PERCENTILES = (50, 90, 99, 100)


class TokenSpan(NamedTuple):
    """Neighbouring tokens of one kind: `trained`, `other`, or the placeholders of one `image`."""

    kind: str
    start: int  # first token
    end: int  # behind the last token
    text: str


def unshifted_labels(encoded: EncodedText) -> np.ndarray:
    """int64 [S]: each token itself where it is trained, IGNORE_LABEL elsewhere."""
    return np.concatenate(([IGNORE_LABEL], encoded.labels[:-1]))


def find_spans(encoded: EncodedText, tokenizer: Any) -> list[TokenSpan]:
    """The tokens of a record as spans with their text."""
    labels = unshifted_labels(encoded)
    videos = {number for number, plan in enumerate(encoded.plans) if plan.frames}
    kinds = np.where(labels != IGNORE_LABEL, 1, 0)
    for number, (start, end) in enumerate(encoded.image_spans):
        kinds[start:end] = 2 + number
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    spans, ids, text = [], [], ""
    for start, end in itertools.pairwise(borders):
        if start == end:
            continue
        if kinds[start] >= 2:
            mark = "<video>" if kinds[start] - 2 in videos else "<image>"
            spans.append(TokenSpan("image", start, end, f"{mark} {start}..{end}"))
            ids, text = [], ""
            continue
        # A sentencepiece tokenizer drops the space at the front of what it decodes, so what stands before comes along.
        ids = [*ids, *encoded.tokens[start:end].tolist()]
        whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append(TokenSpan("trained" if kinds[start] else "other", start, end, whole[len(text) :]))
        text = whole
    return spans


def visible(text: str) -> str:
    """Control characters as their Unicode images, so that a record's text cannot steer a terminal."""
    return "".join(
        chr(0x2400 + ord(letter)) if ord(letter) < 32 and letter != "\n" else "␡" if letter == "\x7f" else letter
        for letter in text
    )


def to_terminal(spans: Sequence[TokenSpan], colours: bool) -> str:
    """Trained text green, images blue; without colours trained parts stand between ⟦ and ⟧."""
    if colours:
        return "".join(f"{ANSI[span.kind]}{_shown(span)}" for span in spans) + ANSI["other"]
    return "".join(f"⟦{_shown(span)}⟧" if span.kind == "trained" else _shown(span) for span in spans)


def _shown(span: TokenSpan) -> str:
    return f"[{span.text}]" if span.kind == "image" else visible(span.text)


def describe(encoded: EncodedText) -> str:
    """One line: id, lengths, spans."""
    trained = int((encoded.labels != IGNORE_LABEL).sum())
    grids = [_told(plan) for plan in encoded.plans]
    grids += [""] * (len(encoded.image_spans) - len(grids))  # fixed tiles have a span each, and no grid
    told = (f"{start}..{end}{grid}" for (start, end), grid in zip(encoded.image_spans, grids, strict=True))
    spans = ", ".join(told) or "none"
    cut = ", cut at the end" if encoded.truncated else ""
    return f"{encoded.record_id}: {len(encoded.tokens)} tokens{cut}, {trained} trained, images at {spans}"


def _told(plan: TilePlan) -> str:
    """What stands behind the place of an image or video."""
    if plan.frames:
        return f" (video of {plan.frames} frames, {plan.shown[0]} x {plan.shown[1]} features each)"
    return f" ({plan.grid[0]} x {plan.grid[1]} tiles)" if any(plan.grid) else ""


# ------------------------------------------------------------------------------------------------ a whole folder


@dataclass
class Figures:
    """Counts over the records of a folder."""

    lengths: list[int] = field(default_factory=list)  # tokens per record, image placeholders included
    trained: int = 0
    truncated: int = 0
    images: Counter[int] = field(default_factory=Counter)  # images per record -> records
    frames: Counter[int] = field(default_factory=Counter)  # frames of a video -> videos
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> records
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first such record, and the particulars

    @property
    def records(self) -> int:
        """Records looked at."""
        return len(self.lengths) + self.rejected.total()

    @property
    def without_labels(self) -> int:
        """Records that template, tokenizer or length leave without anything to learn."""
        return sum(self.rejected[reason] for reason in WITHOUT_LABELS)

    def percentile(self, share: float) -> int:
        """Smallest length that `share` per cent of the records do not exceed."""
        return int(np.percentile(self.lengths, share, method="inverted_cdf"))

    def lines(self) -> list[str]:
        """The figures as text."""
        lines = [f"{self.records} records: {len(self.lengths)} encoded + {self.rejected.total()} rejected"]
        for reason, count in self.rejected.most_common():
            meaning = REASONS.get(reason, "the shard is damaged")
            lines.append(f"  rejected: {reason}: {count} ({meaning}; for example {self.examples[reason]})")
        lines.append(f"without labels: {self.without_labels} ({self.without_labels / max(self.records, 1):.1%})")
        if self.lengths:
            tokens = sum(self.lengths)
            told = ", ".join(f"{share}% up to {self.percentile(share)}" for share in PERCENTILES)
            lines.append(f"tokens per record: {told}; {tokens} in all, {self.trained / tokens:.1%} of them trained")
            lines.append(f"cut at the end: {self.truncated} ({self.truncated / self.records:.1%})")
            told = ", ".join(f"{count} with {number}" for number, count in sorted(self.images.items()))
            lines.append(f"images per record: {told}")
        if self.frames:
            told = ", ".join(f"{count} of {number}" for number, count in sorted(self.frames.items()))
            lines.append(f"videos by their frames: {told}")
        return lines


def collect_figures(dataset: Dataset, encoder: TaskEncoder, indices: Iterable[int], with_images: bool) -> Figures:
    """Encode records as training does and count.  with_images False: images are neither read nor checked."""
    figures = Figures()
    for index in indices:
        try:
            whole = with_images or encoder.config.sizes_matter
            parts = dataset[index] if whole else dataset.read_text(index)
            if parts is None:
                raise RecordError("excluded", "named in the folder's split.yaml")
            record = cook(parts)
            encoded = encoder.encode_record(record) if with_images else encoder.encode_text(record)
        except RecordError as error:
            figures.rejected[error.reason] += 1
            figures.examples.setdefault(error.reason, f"{dataset.name(index)}: {visible(error.detail)}")
            continue
        except (OSError, ValueError, tarfile.TarError) as error:
            figures.rejected["damaged shard"] += 1
            figures.examples.setdefault("damaged shard", f"{dataset.name(index)}: {error}")
            continue
        figures.lengths.append(len(encoded.tokens))
        figures.trained += int((encoded.labels != IGNORE_LABEL).sum())
        figures.truncated += encoded.truncated
        figures.images[len(record.images)] += 1
        figures.frames.update(len(frames) for frames in record.videos)
    return figures


def plot_lengths(figures: Figures) -> bytes:
    """Histogram of the lengths, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(figsize=(8, 4), dpi=100)
    axes.hist(figures.lengths, bins=min(60, max(10, len(set(figures.lengths)))), color=COLOURS["image"])
    for share, style in ((50, ":"), (99, "--")):
        axes.axvline(figures.percentile(share), color="black", linestyle=style, label=f"{share}% of the records")
    axes.set(xlabel="tokens per record, image placeholders included", ylabel="records")
    axes.legend()
    chart.tight_layout()
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png")
    pyplot.close(chart)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ page and sheet


@dataclass(frozen=True)
class Shown:
    """A record to be shown: its place, and what training makes of it or why it does not."""

    place: str
    encoded: EncodedRecord | None
    spans: list[TokenSpan]
    problem: str = ""


def show(dataset: Dataset, encoder: TaskEncoder, index: int, tokenizer: Any) -> Shown:
    """One record of a folder."""
    try:
        parts = dataset[index]
        if parts is None:
            raise RecordError("excluded", "named in the folder's split.yaml")
        encoded = encoder.encode(parts)
    except (RecordError, OSError, ValueError, tarfile.TarError) as error:
        return Shown(dataset.name(index), None, [], visible(str(error)))
    return Shown(dataset.name(index), encoded, find_spans(encoded, tokenizer))


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [3, side, side] -> RGB image."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def as_png(image: Image.Image) -> bytes:
    """Encoded bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _embedded(png: bytes, name: str) -> str:
    """An image of an HTML page."""
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def to_page(title: str, shown: Sequence[Shown], figures: Figures | None, chart: bytes | None) -> str:
    """One HTML file with everything in it."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>"
        "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "article{display:flex;gap:1em;border-top:1px solid #ccc;padding:1em 0}"
        "article>div:first-child{flex:none}article img{display:block;margin-bottom:.5em;max-width:224px}"
        "pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.5em 0}.problem{color:#a51d2d}"
        + "".join(f".{kind}{{color:{colour}}}" for kind, colour in COLOURS.items())
        + f".trained{{background:#d9f2df}}</style><h1>{html.escape(title)}</h1>"
        "<p>The text as the model sees it; <span class=trained>what it is trained on</span>; "
        "<span class=image>images</span>, beside it as they are after preprocessing.</p>"
    ]
    if figures is not None:
        parts.append(f"<pre>{html.escape(chr(10).join(figures.lines()))}</pre>")
    if chart is not None:
        parts.append(_embedded(chart, "tokens per record"))
    for record in shown:
        images = "".join(
            _embedded(as_png(to_image(pixels)), f"image {number}") for number, pixels in enumerate(_pixels(record))
        )
        text = "".join(f"<span class={span.kind}>{html.escape(_shown(span))}</span>" for span in record.spans)
        told = describe(record.encoded) if record.encoded else record.problem
        kind = "" if record.encoded else " class=problem"
        parts.append(
            f"<article><div>{images}</div><div><b>{html.escape(record.place)}</b>"
            f"<div{kind}>{html.escape(told)}</div><pre>{text}</pre></div></article>"
        )
    return "".join(parts)


def _pixels(record: Shown) -> Sequence[np.ndarray]:
    """The images of a record, none where it has none."""
    return () if record.encoded is None or record.encoded.pixels is None else list(record.encoded.pixels)


SHEET_WIDTH, IMAGE_SIDE, MARGIN, LINE = 1200, 160, 12, 18
FRAME_SIDE = 40  # of a video, 4 x 4 of them in the place of an image
SHEET_LINES = 9  # per record; the page has the rest


def to_sheet(shown: Sequence[Shown]) -> Image.Image:
    """Contact sheet: per record its first image, or frames of its first video, after preprocessing beside the beginning
    of its coloured text."""
    font = ImageFont.load_default(size=14)
    height = max(IMAGE_SIDE, LINE * (SHEET_LINES + 1)) + 2 * MARGIN
    sheet = Image.new("RGB", (SHEET_WIDTH, max(height * len(shown), 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, record in enumerate(shown):
        top = number * height + MARGIN
        for pixels, side, place in _on_sheet(record):
            sheet.paste(to_image(pixels).resize((side, side)), (MARGIN + place[0], top + place[1]))
        left = IMAGE_SIDE + 2 * MARGIN
        told = describe(record.encoded) if record.encoded else f"{record.place}: {record.problem}"
        spans = [TokenSpan("image", 0, 0, told + "\n"), *(span._replace(text=_shown(span)) for span in record.spans)]
        _write(draw, spans, left, top, font)
    return sheet


def _on_sheet(record: Shown) -> Iterator[tuple[np.ndarray, int, tuple[int, int]]]:
    """What is shown of a record: pixels, side in pixels and place (x, y); of a video frames over its whole length."""
    pixels = _pixels(record)
    if pixels and record.encoded.plans[0].frames:
        frames = record.encoded.plans[0].frames
        chosen = np.linspace(0, frames - 1, min(frames, (IMAGE_SIDE // FRAME_SIDE) ** 2), dtype=int).tolist()
        for number, frame in enumerate(chosen):
            row, column = divmod(number, IMAGE_SIDE // FRAME_SIDE)
            yield pixels[frame], FRAME_SIDE, (column * FRAME_SIDE, row * FRAME_SIDE)
    elif pixels:
        yield pixels[0], IMAGE_SIDE, (0, 0)


def _write(draw: ImageDraw.ImageDraw, spans: Sequence[TokenSpan], left: int, top: int, font: Any) -> None:
    """Coloured text from left to the sheet's edge, broken between any two letters, SHEET_LINES + 1 lines at most."""
    x, line = left, 0
    for span in spans:
        for letter in span.text:
            width = font.getlength(letter) if letter != "\n" else 0
            if letter == "\n" or x + width > SHEET_WIDTH - MARGIN:
                x, line = left, line + 1
            if line > SHEET_LINES:
                return
            if letter != "\n":
                draw.text((x, top + line * LINE), letter, fill=COLOURS[span.kind], font=font)
                x += width
