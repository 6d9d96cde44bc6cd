"""What the converters' command lines share: their options, the progress bar, the report and the exit code."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_patch.data.preparation.parts import Part
from megatron_patch.data.preparation.pipeline import (
    ENGINES,
    SPLITS,
    LengthLimit,
    Options,
    PreparationReport,
    Progress,
    prepare,
)
from megatron_patch.data.preparation.sources import JsonSource, Source
from megatron_patch.data.preparation.upload import check_target, upload_folder
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import CONFIG, LlavaFolder
from megatron_patch.tile_plan import fixed_tiles

FINE, WRONG_INPUT, INTERRUPTED = 0, 2, 130


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every converter has."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="where the shards go")
    add("--split", default="9,1,0", metavar="A,B,C", help="shares of train, val and test; default: 9,1,0")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="at most; default: 1000")
    add("--workers", type=int, metavar="N", help="processes that check images and write; default: the cores, up to 8")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--resume", action="store_true", help="go on with a conversion that was interrupted, if there is one")
    add("--part", metavar="I/N", help="make every N-th shard only, as one of N jobs; --join makes the output of all")
    add("--join", action="store_true", help="join the parts when all are done; the other options as given to them")
    add("--engine", choices=ENGINES, default="local", help="who makes shards: processes here, or a running Ray cluster")
    add("--ray-address", metavar="HOST:PORT", help="of its head; default: the cluster this machine is a node of")
    add(
        "--max-rejected", default="1%", metavar="SHARE", help="stop when more of the records are rejected; default: 1%%"
    )
    add("--keep-going", action="store_true", help="never stop for rejected records")
    add(
        "--duplicate-ids",
        choices=("keep", "reject"),
        default="keep",
        help="records with the id of an earlier one and other content; default: keep",
    )
    add(
        "--reopen-with-energon",
        action="store_true",
        help="read back with energon's own loader as well: some seconds and 0.6 GB of memory for its import",
    )
    add(
        "--upload",
        metavar="URL",
        help="put the shards into object storage at the end: msc://PROFILE/DIR, s3://BUCKET/DIR",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="reject longer records; needs --template and --model, or the last three",
    )
    add(
        "--model",
        type=Path,
        metavar="DIR",
        help="checkpoint or Hugging Face folder: its tokenizer, and its tokens for images of any size",
    )
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer (llava/ of a checkpoint)")
    add("--template", metavar="T", help="conversation template, as CONVERSATION_TEMPLATE of the launchers")
    add("--image-tokens", type=int, metavar="P", help="tokens per image, 576 for CLIP-L/14-336")
    return parser


def add_image_root(parser: argparse.ArgumentParser, default: str) -> None:
    """For sources whose records name their images."""
    parser.add_argument(
        "--image-root",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"where the records' image names start; may be repeated; default: {default}",
    )


def run(arguments: argparse.Namespace, make: Callable[[argparse.Namespace], tuple[Source, Path]]) -> int:
    """Convert what `make` finds: the source, and where its shards go by default.  Returns the exit code."""
    try:
        options = options_of(arguments)
        if arguments.upload is not None and options.part is not None:
            raise UserError("--upload is not for --part: a part is no dataset; give it to the command with --join")
        if arguments.upload is not None:
            check_target(arguments.upload)
        source, default_output = make(arguments)
        output = arguments.output or default_output
        ledger = prepare(source, output, options, show_progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        return INTERRUPTED
    report(ledger, output) if options.part is None else report_part(ledger, output, options.part)
    return FINE if arguments.upload is None else upload_converted(output, arguments.upload)


def upload_converted(output: Path, url: str) -> int:
    """The end of a conversion with --upload; the shards are here whatever becomes of it.  Returns the exit code."""
    again = f"upload_dataset.py {output} {url}"
    try:
        upload(output, url)
    except UserError as error:
        print(f"error: {error}, with {again}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"interrupted; {again} uploads it", file=sys.stderr)
        return INTERRUPTED
    return FINE


def upload(folder: Path, url: str) -> None:
    """Put a folder into object storage and say what to do with it.  Raises UserError."""
    from tqdm import tqdm

    begin = time.perf_counter()
    with tqdm(unit=" files", desc="uploading", mininterval=0.5) as bar:
        size = upload_folder(folder, url, lambda name: bar.update(1))
    print(f"uploaded: {url} ({size / 1e6:.1f} MB in {time.perf_counter() - begin:.1f} s)")
    print(f"next: give {url} to examples/llava_mcore/run_mcore_llava.sh as DATASET_PATH (18th argument)")


def options_of(arguments: argparse.Namespace) -> Options:
    """Command line -> options of the conversion.  Raises UserError."""
    return Options(
        ratio=parse_ratio(arguments.split),
        samples_per_shard=arguments.samples_per_shard,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        max_rejected_share=parse_share(arguments.max_rejected),
        keep_going=arguments.keep_going,
        reject_duplicate_ids=arguments.duplicate_ids == "reject",
        length_limit=length_limit_of(arguments),
        reopen_with_energon=arguments.reopen_with_energon,
        workers=arguments.workers,
        part=None if arguments.part is None else Part.parse(arguments.part),
        join=arguments.join,
        engine=arguments.engine,
        ray_address=arguments.ray_address,
    )


def length_limit_of(arguments: argparse.Namespace) -> LengthLimit | None:
    """--max-tokens and what it needs, or none of it.  Raises UserError."""
    by_model = arguments.model is not None
    values = {
        "--tokenizer": arguments.tokenizer,
        "--template": arguments.template,
        "--image-tokens": arguments.image_tokens,
        "--max-tokens": arguments.max_tokens,
    }
    if by_model and (named := [name for name in ("--tokenizer", "--image-tokens") if values.pop(name) is not None]):
        raise UserError(f"--model {arguments.model}: excludes {' and '.join(named)}, which it brings; give either")
    absent = [name for name, value in values.items() if value is None]
    if len(absent) == len(values) and not by_model:
        return None
    if absent:
        needed = ", ".join(["--model", *values] if by_model else values)
        raise UserError(f"{' '.join(absent)}: missing; lengths are checked with {needed} together")
    if not by_model:
        return LengthLimit(*values.values())
    return limit_of_model(arguments.model, arguments.template, arguments.max_tokens)


def limit_of_model(path: Path, template: str, max_tokens: int) -> LengthLimit:
    """As this model counts: of any resolution where it has a rule for that, whatever it was last trained with.

    path: a Megatron checkpoint or a Hugging Face folder.  Raises UserError.
    """
    folder = LlavaFolder(path) if (path / CONFIG).is_file() else LlavaFolder.of(path)
    geometry, settings = folder.geometry(), folder.settings
    return LengthLimit(
        str(folder.tokenizer),
        template,
        geometry.tower.image_tokens * fixed_tiles(*settings.image_tiles),
        max_tokens,
        geometry.any_resolution,
        settings.exif_orientation,
    )


def parse_ratio(text: str) -> tuple[int, ...]:
    """`9,1,0` -> (9, 1, 0).  Raises UserError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--split {text}: wanted whole numbers, shares of train, val and test, as in 9,1,0")
    return tuple(int(part) for part in parts)


def parse_share(text: str) -> float:
    """`1%` or `0.01` -> 0.01.  Raises UserError."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UserError(f"--max-rejected {text}: wanted a percentage, as in 1%") from None


def find_image_roots(folder: Path, named: Sequence[Path] | None) -> tuple[Path, ...]:
    """The folders that image names are looked up in, in this order."""
    return tuple(named) if named else tuple(path for path in (folder / "images", folder) if path.is_dir())


def show_progress(total: int) -> Progress:
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(total=total, unit=" records", desc="converting", mininterval=0.5)


def report(ledger: PreparationReport, output: Path) -> None:
    """The counts, where everything lies, and what to do next."""
    written = ", ".join(f"{split} {ledger.written[split]}" for split in SPLITS)
    print(f"{ledger.records_in} records in = {sum(ledger.written.values())} written ({written})", end="")
    print(f" + {ledger.rejected.total()} rejected")
    for reason, count in ledger.reasons():
        print(f"  rejected: {reason}: {count}")
    if ledger.repeated_ids:
        print(f"  {ledger.repeated_ids} records share their id with another one of other content; they are kept")
    if ledger.rejected:
        print(f"  each of them is named in {output / 'rejected.jsonl'}")
    if not ledger.written["val"]:
        print("  no record for validation: give --split a second share, or another folder as VALID_DATASET_PATH")
    speed = ledger.records_in / ledger.seconds
    print(f"converted in {ledger.seconds:.2f} s ({speed:.0f} records/s), reopened in {ledger.seconds_to_reopen:.2f} s")
    print(f"shards: {output}")
    print(f"next: give {output} to examples/llava_mcore/run_mcore_llava.sh as DATASET_PATH (18th argument)")
    print("      and VALID_DATASET_PATH (19th argument); it lists all its arguments with --help")


def report_part(ledger: PreparationReport, output: Path, part: Part) -> None:
    """What one part has done, and what to do next."""
    print(f"part {part}: {ledger.records_in} records in = {sum(ledger.written.values())} written", end="")
    print(f" + {ledger.rejected.total()} rejected (of all texts and the own images)", end="")
    print(f" + {ledger.of_other_parts} left to the other parts")
    print(f"done in {ledger.seconds:.2f} s: {output.name}.partial beside {output}")
    print("next: when all parts are done, the same command with --join in place of --part")


def run_on_json(description: str | None, source: type[JsonSource], what: str) -> int:
    """The whole command line of a converter of one JSON file; returns the exit code."""
    parser = parser_of(description)
    parser.add_argument("json", type=Path, metavar="FILE.json", help=f"{what}; shards go to wds/ beside it")
    add_image_root(parser, "images/ beside FILE.json, then its folder")

    def make(arguments: argparse.Namespace) -> tuple[Source, Path]:
        folder = arguments.json.parent
        return source(arguments.json, find_image_roots(folder, arguments.image_root)), folder / "wds"

    return run(parser.parse_args(), make)
