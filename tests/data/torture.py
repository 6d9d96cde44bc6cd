"""Writes a folder of odd records and images, and says what must become of each.

    python -m tests.data.torture DIR

DIR/data.json and DIR/images; DIR/expected.json lists, record by record, why the converter rejects it and why training
skips it when it was written into shards without any check (null: it is used).
"""

import io
import json
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.factories import image_bytes


@dataclass(frozen=True)
class Case:
    """A record and the reasons for which it is left out; None: it is used."""

    record: Any
    converter: str | None
    training: str | None


def turns(*values: Any) -> list[dict[str, Any]]:
    """Turns of human and gpt in alternation."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def make_torture(root: Path) -> list[Case]:
    """Write the folder; returns its cases in the order of data.json."""
    images = root / "images"
    (images / "sub.dir").mkdir(parents=True)
    (root / "secret.png").write_bytes(image_bytes(5))
    cases = [*_image_cases(images), *_name_cases(images, root), *_mark_cases(), *_turn_cases(), *_record_cases()]
    (root / "data.json").write_text(json.dumps([case.record for case in cases]))
    expected = [{"converter": case.converter, "training": case.training} for case in cases]
    (root / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return cases


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG file that announces this size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _image_cases(images: Path) -> list[Case]:
    """Images of every kind, sound and broken; the caption is the file's name."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    frames = [colours.resize((20, 20)).convert("P"), colours.transpose(Image.Transpose.ROTATE_90).convert("P")]
    jpeg, png = encoded(colours, "JPEG"), encoded(colours, "PNG")
    palette = colours.convert("P")
    sound = {
        "rgb.jpg": jpeg,
        "rgb.png": png,
        "rgba.png": encoded(colours.convert("RGBA"), "PNG"),
        "la.png": encoded(colours.convert("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette with a transparent colour.png": encoded(palette, "PNG", transparency=3),
        "one bit.png": encoded(colours.convert("1"), "PNG"),
        "grey.jpg": encoded(colours.convert("L"), "JPEG"),
        "sixteen bits.png": encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        "floats.tif": encoded(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"),
        "cmyk.jpg": encoded(colours.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(colours, "JPEG", progressive=True),
        "on its side.jpg": encoded(colours, "JPEG", exif=exif),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "a gif.jpg": encoded(palette, "GIF"),
        "a png.jpg": png,
        "a webp.png": encoded(colours, "WEBP"),
        "bitmap.bmp": encoded(colours, "BMP"),
        "one pixel.png": encoded(colours.crop((0, 0, 1, 1)), "PNG"),
        "20000 pixels wide.png": encoded(Image.new("RGB", (20_000, 40), "red"), "PNG"),
        "bytes after the end.jpg": jpeg + b"more",
    }
    broken = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "image truncated"),
        "truncated.png": (png[: len(png) // 2], "image truncated"),
        "end mark missing.jpg": (jpeg[:-2], "image truncated"),
        "wrong checksum.png": (png[:100] + bytes([png[100] ^ 1]) + png[101:], "image unreadable"),
        "empty.png": (b"", "image truncated"),
        "a page.jpg": (b"<html><body>404 not found</body></html>", "not an image"),
        "bomb by its header.png": (_png_of_size(60_000, 60_000), "image too large"),
    }
    cases = []
    for name, (data, reason) in ({name: (data, None) for name, data in sound.items()} | broken).items():
        (images / name).write_bytes(data)
        record = {"id": name, "image": name, "conversations": turns("<image>\nwhat is it?", name)}
        cases.append(Case(record, reason, reason))
    return cases


def _name_cases(images: Path, root: Path) -> list[Case]:
    """Names of every kind.  What the converter does not find was not written, so training misses the image."""
    there = [
        "sub.dir/a.b.c.JPG",
        "two  spaces .png",
        "übung 図 🎉.png",
        "no_suffix",
        "quote'\"$(touch x);&.png",
        "-rf.png",
    ]
    for number, name in enumerate(there):
        (images / name).write_bytes(image_bytes(100 + number, kind="JPEG" if "JPG" in name else "PNG"))
    absent = {
        "nowhere": "nowhere.png",
        "outside": "../secret.png",
        "outside by a detour": "sub.dir/../../secret.png",
        "absolute": str(root / "secret.png"),
        "a folder": "sub.dir",
        "below a file": "rgb.png/x.png",
        "a name with a null": "rgb\0.png",
        "a name too long": "x" * 5000,
        "wrong capitals": "RGB.PNG",
        "a lone surrogate": "\udcff.png",
    }
    question = turns("<image>\nwhat?", "an image")
    return [
        *(Case({"id": name, "image": name, "conversations": question}, None, None) for name in there),
        *(
            Case({"id": title, "image": name, "conversations": question}, "image missing", "image marks")
            for title, name in absent.items()
        ),
    ]


def _mark_cases() -> list[Case]:
    """Marks and images that agree or do not."""
    one, two = {"image": "rgb.png"}, {"image": ["rgb.png", "rgba.png"]}

    def case(title: str, record: dict[str, Any], reason: str | None) -> Case:
        return Case({"id": title, **record}, reason, reason)

    return [
        case("two images", {**two, "conversations": turns("<image> or <image>?", "b")}, None),
        case("two in two turns", {**two, "conversations": turns("<image> a?", "b", "<image> c?", "d")}, None),
        case("the same twice", {"image": ["rgb.png"] * 2, "conversations": turns("<image><image>", "b")}, None),
        case("mark at the end", {**one, "conversations": turns("what?\n<image>", "b")}, None),
        case("mark in a later turn", {**one, "conversations": turns("q", "a", "<image>", "b")}, None),
        case("mark twice in a turn", {**one, "conversations": turns("<image> <image>", "b")}, None),
        case("one of a list", {"image": ["rgb.png"], "conversations": turns("<image>", "b")}, None),
        case("image without mark", {**one, "conversations": turns("what?", "a")}, "image marks"),
        case("mark without image", {"conversations": turns("<image>\nwhat?", "a")}, "image marks"),
        case("two images, one mark", {**two, "conversations": turns("<image>", "a")}, "image marks"),
        case("mark in the answer", {**one, "conversations": turns("<image>", "an <image>")}, "image marks"),
        case("marks in two turns", {**one, "conversations": turns("<image>", "a", "<image>", "b")}, "image marks"),
    ]


def _turn_cases() -> list[Case]:
    """Conversations of every kind."""

    def case(title: str, conversations: Any, reason: str | None, **more: Any) -> Case:
        return Case({"id": title, "conversations": conversations, **more}, reason, reason)

    return [
        case("text only", turns("hello", "你好 🎉", "more", "yes"), None),
        case("null image", turns("hello", "b"), None, image=None),
        case("gpt first", turns("", "x", "q", "b")[1:], None),
        Case({"id": "very long", "conversations": turns("q " * 5000, "a " * 5000)}, None, "no trained token"),
        case("characters of control", turns("nul \0, bell \a", "tab \t, escape \x1b, line\u2028"), None),
        case("system sentence", turns("q", "a"), None, system="Answer in one letter."),
        case("more keys", [{**turn, "lang": "en"} for turn in turns("q", "a")], None, source="somewhere"),
        case("empty answer", turns("q", ""), "no answer"),
        case("blank answer", turns("q", " \n"), "no answer"),
        case("no answer at all", turns("q"), "no answer"),
        case("last turn is a question", turns("q", "a", "r"), "no answer"),
        case("only an answer", turns("q", "a")[1:], "no answer"),
        case("human twice", turns("q", "a")[:1] * 2, "roles"),
        case("roles swapped", [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}], "no answer"),
        case("unknown role", [{"from": "tool", "value": "q"}, *turns("q", "a")], "roles"),
        case("a system turn", [{"from": "system", "value": "x"}, *turns("q", "a")], "roles"),
        case("null value", turns(None, "a"), "malformed"),
        case("number value", turns("q", 3), "malformed"),
        case("turn of text", ["q", "a"], "malformed"),
        case("turn of another form", [{"role": "user", "content": "q"}], "malformed"),
        case("no turns", [], "malformed"),
        case("turns of an object", {"from": "human", "value": "q"}, "malformed"),
        case("null turns", None, "malformed"),
        case("lone surrogate", turns("\ud800", "a"), "malformed"),
        case("system number", turns("q", "a"), "malformed", system=7),
    ]


def _record_cases() -> list[Case]:
    """Ids, repetitions, and what is no record.  Training does not look for repetitions, nor at names of images."""
    question, same = turns("q", "a"), {"id": "same", "conversations": turns("q", "a")}
    fine = [
        {"conversations": turns("no id", "a")},
        {"id": 17, "conversations": question},
        {"id": "dots.and/slashes\n", "conversations": question},
        {"id": "", "conversations": question},
        {"id": None, "conversations": turns("null id", "a")},
        same,
        {**same, "conversations": turns("q", "b")},
    ]
    malformed = [{"id": "no conversations", "image": "rgb.png"}, {}, "just text", None, [1, 2], 3, True]
    marked = turns("<image>", "a")
    return [
        *(Case(record, None, None) for record in fine),
        Case(same, "duplicate", None),
        Case({"conversations": turns("no id", "a")}, "duplicate", None),
        *(Case(record, "malformed", "malformed") for record in malformed),
        Case({"id": "image is a number", "image": 7, "conversations": marked}, "malformed", "image marks"),
        Case({"id": "image is a list of null", "image": [None], "conversations": marked}, "malformed", "image marks"),
        Case({"id": "image is an object", "image": {"a": 1}, "conversations": marked}, "malformed", "image marks"),
    ]


if __name__ == "__main__":
    made = make_torture(Path(sys.argv[1]))
    print(f"{len(made)} records in {sys.argv[1]}/data.json, {sum(case.converter is None for case in made)} to be used")
