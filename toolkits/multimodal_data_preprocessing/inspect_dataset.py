"""Show what the model will be trained on: tokens, labels, images and lengths, exactly as training makes them.

A folder that training reads (or a YAML list of such folders):

    inspect_dataset.py FOLDER --checkpoint CKPT [--template v1] [--split train] [--records 0,5,17] [--all]

prints records with their trained text marked and the figures of the folder, and writes report.html, records.png and
lengths.png.  Template and images are as CKPT was trained, else as training would begin from it.  In place of
--checkpoint: --tokenizer, --template, --image-tokens and --side-px.

One record of a JSON file, without a folder:

    inspect_dataset.py --record R.json --template v1 --tokenizer DIR --image-tokens 576 [--json]

prints its text, or with --json {token_ids, labels, image_spans}: placeholders expanded, labels not shifted and -100
where not trained, spans as [start, end).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.loading.config import IMAGE_ASPECT_RATIOS, DataConfig
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from megatron_patch.object_storage import StorageError

ALL_TOKENS = 1 << 30  # longest record where --max-length sets no other limit
LOOKED_AT = 2000  # records of a folder whose figures are taken, without --all
DECODER_LENGTHS = (1024, 2048, 4096, 8192)  # offered as DECODER_SEQ_LEN


def main() -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments()
    try:
        if (arguments.folder is None) == (arguments.record is None):
            raise UserError("wanted a folder, or --record with a JSON file, one of them; see --help")
        if arguments.record is not None:
            inspect_record(arguments)
        else:
            inspect_folder(arguments)
    except (UserError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="energon folder or YAML, as DATASET_PATH")
    parser.add_argument("--record", type=Path, metavar="R.json", help="one record in LLaVA's form, instead of FOLDER")
    parser.add_argument("--json", action="store_true", help="with --record: print JSON and nothing else")
    parser.add_argument("--image-root", type=Path, action="append", metavar="DIR", help="with --record: read images")
    model = parser.add_argument_group("the model")
    model.add_argument("--checkpoint", type=Path, metavar="CKPT", help="converted checkpoint; gives what follows")
    model.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with the tokenizer")
    model.add_argument("--template", metavar="NAME", help="a conversation template, or a template file")
    model.add_argument("--image-tokens", type=positive, metavar="N", help="tokens of one image")
    model.add_argument("--image-token-id", type=int, metavar="ID", help="id of <image>, where not the tokenizer's")
    model.add_argument("--side-px", type=positive, metavar="PX", help="images become PX x PX; default: 336")
    parser.add_argument("--max-length", type=positive, metavar="N", help="as DECODER_SEQ_LEN; default: no limit")
    images = parser.add_argument_group("images", "default: as the checkpoint was trained, else as training's defaults")
    switch = argparse.BooleanOptionalAction
    images.add_argument("--image-conv-front", action=switch, help="images stand before the conversation")
    images.add_argument("--image-start-end", action=switch, help="images stand between <im_start>, <im_end>")
    images.add_argument(
        "--image-aspect-ratio", choices=IMAGE_ASPECT_RATIOS, help="how an image becomes square, or anyres"
    )
    images.add_argument("--image-tiles", type=grid, metavar="COLUMNSxROWS", help="tiles of an image; 1x1: none")
    images.add_argument("--ignore-exif-orientation", action=switch, help="as LLaVA's original code")
    folder = parser.add_argument_group("with FOLDER")
    folder.add_argument("--split", default="train", help="default: train")
    folder.add_argument("--records", type=numbers, metavar="0,5,17", help="the records to show")
    folder.add_argument("--count", type=positive, default=4, metavar="N", help="records to show otherwise; default: 4")
    folder.add_argument("--all", action="store_true", help=f"figures of all records; default: {LOOKED_AT} of them")
    folder.add_argument("--skip-pictures", action="store_true", help="figures without reading images: quicker")
    folder.add_argument("--output", type=Path, metavar="DIR", help="for the report; default: inspect_<FOLDER>_<split>")
    return parser.parse_args()


def positive(text: str) -> int:
    """`576` -> 576."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def numbers(text: str) -> list[int]:
    """`0,5,17` -> [0, 5, 17]."""
    return [int(part) for part in text.split(",")]


def grid(text: str) -> tuple[int, int]:
    """`2x3` -> (2, 3): columns and rows."""
    columns, rows = text.split("x")
    return positive(columns), positive(rows)


# ------------------------------------------------------------------------------------------------ what the model wants


def read_model(arguments: argparse.Namespace) -> tuple[DataConfig, Any]:
    """Settings of the data room and the tokenizer, from the checkpoint or the arguments.  Raises UserError."""
    from megatron_patch.data.conversation import IMAGE_MARK
    from megatron_patch.tokenizer_files import load_tokenizer
    from megatron_patch.vision_towers import OF_OPENAI_FILES, VISION_TOWERS

    known = {"side_px": 336, "image_mean": VISION_TOWERS[OF_OPENAI_FILES].image_mean}  # LLaVA-1.5's tower
    known |= image_options(TrainingSettings(None))
    if arguments.checkpoint is not None:
        known |= read_checkpoint(arguments.checkpoint)
    given = {"template": arguments.template, "image_tokens": arguments.image_tokens, "side_px": arguments.side_px}
    if arguments.tokenizer is not None:
        given["tokenizer_path"] = str(arguments.tokenizer)
    given |= {"image_aspect_ratio": arguments.image_aspect_ratio, "image_start_end": arguments.image_start_end}
    given["image_conv_front"] = arguments.image_conv_front
    if arguments.ignore_exif_orientation is not None:
        given["apply_exif_orientation"] = not arguments.ignore_exif_orientation
    if arguments.image_tiles is not None:
        given["tile_columns"], given["tile_rows"] = arguments.image_tiles
    known |= {name: value for name, value in given.items() if value is not None}
    options = {"tokenizer_path": "--tokenizer", "template": "--template", "image_tokens": "--image-tokens"}
    if missing := [option for name, option in options.items() if name not in known]:
        raise UserError(f"{', '.join(missing)} missing; give them, or --checkpoint CKPT, whose llava/ folder has them")
    tokenizer = load_tokenizer(known["tokenizer_path"])
    if IMAGE_MARK not in tokenizer.get_vocab():
        from transformers import AddedToken

        # The next id, as hf2mcore_convertor_llava.sh gives it.
        tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    known.setdefault("image_token_id", tokenizer.convert_tokens_to_ids(IMAGE_MARK))
    settings = DataConfig(
        **known,
        decoder_seq_len=arguments.max_length or ALL_TOKENS,
        micro_batch_size=1,
        length_multiple=1,
        seed=0,
        num_workers=0,
    )
    return settings, tokenizer


def image_options(trained_with: TrainingSettings) -> dict[str, Any]:
    """Fields of DataConfig that say what a training did with images."""
    return {
        "image_aspect_ratio": trained_with.image_aspect_ratio,
        "image_conv_front": trained_with.image_conv_front,
        "image_start_end": trained_with.image_start_end,
        "apply_exif_orientation": trained_with.exif_orientation,
        "tile_columns": trained_with.image_tiles[0],
        "tile_rows": trained_with.image_tiles[1],
    }


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's llava/ folder says.  Raises UserError."""
    from megatron_patch.arguments import auto_template

    folder = LlavaFolder.of(checkpoint)
    if not folder.path.is_dir():
        raise UserError(
            f"{checkpoint}: no {folder.path.name}/ folder in it; wanted a checkpoint of hf2mcore_convertor_llava.sh "
            "or of training; without one give --tokenizer, --template, --image-tokens and --side-px"
        )
    geometry = folder.geometry()
    images = folder.image_processing(geometry.tower.side_px)
    del images["image_std"]  # images are normalised on the device
    return {
        "tokenizer_path": str(folder.tokenizer),
        "template": auto_template(folder),
        "image_token_id": geometry.image_token_id,
        "video_token_id": geometry.video_token_id,
        "image_tokens": geometry.tower.image_tokens,
        "side_px": geometry.tower.side_px,
        **images,
        "any_resolution": geometry.any_resolution,
        **image_options(folder.settings),
    }


# ------------------------------------------------------------------------------------------------ one record


def inspect_record(arguments: argparse.Namespace) -> None:
    """Print one record of a JSON file."""
    from megatron_patch.data.loading.inspection import describe, find_spans, to_terminal, unshifted_labels
    from megatron_patch.data.loading.task_encoder import TaskEncoder

    settings, tokenizer = read_model(arguments)
    encoder = TaskEncoder(settings, with_pixels=False, tokenizer=tokenizer)
    if settings.sizes_matter and not arguments.image_root:
        raise UserError(
            "--image-root is missing: an image's size decides how many tokens this model takes for it; give the folder "
            "of the record's images"
        )
    try:
        record = read_record(arguments.record, arguments.image_root)
        # Without --image-root the images are counted, not read.
        encoded = encoder.encode_record(record) if arguments.image_root else encoder.encode_text(record)
    except RecordError as error:
        raise UserError(f"{arguments.record}: {error}; training would leave this record out") from None
    if not arguments.json:
        print(describe(encoded))
        print(to_terminal(find_spans(encoded, tokenizer), in_colours()))
        print("next: --json prints token ids and labels; a FOLDER in place of --record shows images and figures")
        return
    tokens = encoded.tokens
    spans = encoded.image_spans
    if arguments.image_token_id is not None:
        for start, end in spans:
            tokens[start:end] = arguments.image_token_id
    content = {"token_ids": tokens.tolist(), "labels": unshifted_labels(encoded).tolist(), "image_spans": spans}
    print(json.dumps(content))


def read_record(path: Path, image_roots: Sequence[Path] | None) -> Any:
    """The one record of a JSON file, as training's Record.  Raises UserError and RecordError."""
    from itertools import islice

    from megatron_patch.data.preparation.sources.llava import LlavaSource
    from megatron_patch.data.record import Record, read_exchanges

    source = LlavaSource(path, image_roots or [])
    items = list(islice(source.items(), 2))
    if len(items) != 1:
        raise UserError(f"{path}: holds {'no record' if not items else 'several records'}, wanted one")
    found = source.read(items[0])
    exchanges = read_exchanges(found.conversations, len(found.images))
    images = tuple(source.read_image(name) for name in found.images) if image_roots else ()
    return Record(str(found.record_id), exchanges, images, found.system)


def in_colours() -> bool:
    """Is the output a terminal that wants colours?  (no-color.org)"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


# ------------------------------------------------------------------------------------------------ a folder


def inspect_folder(arguments: argparse.Namespace) -> None:
    """Print and write what training makes of a folder."""
    from megatron_patch.data.loading import inspection
    from megatron_patch.data.loading.dataset import Dataset
    from megatron_patch.data.loading.task_encoder import TaskEncoder

    if arguments.json or arguments.image_root or arguments.image_token_id is not None:
        raise UserError("--json, --image-root and --image-token-id go with --record, not with a folder")
    settings, tokenizer = read_model(arguments)
    dataset = Dataset(arguments.folder, arguments.split)
    indices = chosen_records(arguments, len(dataset))
    output = make_output(arguments)

    painter = TaskEncoder(settings, with_pixels=True, tokenizer=tokenizer)
    shown = [inspection.show(dataset, painter, index, tokenizer) for index in indices]
    for record in shown:
        print(f"\n== {record.place}")
        told = inspection.describe(record.encoded) if record.encoded else f"left out: {record.problem}"
        print(f"{told}\n{inspection.to_terminal(record.spans, in_colours())}")

    counter = TaskEncoder(settings, with_pixels=False, tokenizer=tokenizer)
    with_images = not arguments.skip_pictures
    figures = inspection.collect_figures(dataset, counter, counted_records(arguments, len(dataset)), with_images)
    title = f"{arguments.folder}, split {arguments.split}, template {settings.template}"
    print("\n".join((f"\n== {title}, {len(dataset)} records", *figures.lines())))

    chart = inspection.plot_lengths(figures) if figures.lengths else None
    files = {
        "report.html": inspection.to_page(title, shown, figures, chart).encode(),
        "records.png": inspection.as_png(inspection.to_sheet(shown)),
        **({"lengths.png": chart} if chart else {}),
    }
    write_files(output, files)
    print(f"report: {', '.join(str(output / name) for name in files)}")
    print(f"next: {advice(figures, settings, arguments)}")


def spread(count: int, total: int) -> list[int]:
    """At most `count` of `total` places, at equal distances, the first and the last among them."""
    count = min(count, total)
    return [number * (total - 1) // max(count - 1, 1) for number in range(count)]


def chosen_records(arguments: argparse.Namespace, total: int) -> list[int]:
    """The records to show.  Raises UserError for one that is not there."""
    indices = spread(arguments.count, total) if arguments.records is None else arguments.records
    for index in indices:
        if not 0 <= index < total:
            raise UserError(
                f"--records {index}: split {arguments.split} of {arguments.folder} has the records 0 to {total - 1}"
            )
    return indices


def counted_records(arguments: argparse.Namespace, total: int) -> Iterable[int]:
    """The records whose figures are taken, with a progress bar."""
    from tqdm import tqdm

    places = spread(total if arguments.all else LOOKED_AT, total)
    return tqdm(places, unit=" records", desc="looking", mininterval=0.5)


def make_output(arguments: argparse.Namespace) -> Path:
    """The folder of the report.  Raises UserError."""
    output = arguments.output or Path(f"inspect_{Path(arguments.folder).resolve().name}_{arguments.split}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror}); name another folder") from None
    return output


def write_files(output: Path, files: dict[str, bytes]) -> None:
    """Each file beside its place, then under its name.  Raises UserError."""
    try:
        for name, data in files.items():
            beside = output / f".{name}.{os.getpid()}"
            beside.write_bytes(data)
            beside.replace(output / name)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another folder") from None


def advice(figures: Any, settings: DataConfig, arguments: argparse.Namespace) -> str:
    """The one sentence that says what to do."""
    from megatron_patch.data.loading.label_check import too_many

    if too_many(figures.without_labels, figures.records, settings.max_skipped_share):
        return (
            f"training would refuse this: {figures.without_labels} of {figures.records} records carry no label; raise "
            "DECODER_SEQ_LEN (--max-length here) or choose another template, and look again"
        )
    if figures.records == figures.rejected["excluded"]:
        return "the folder's split.yaml leaves out every record that was looked at; convert the data again"
    rejected = figures.rejected.total() - figures.rejected["excluded"]
    if too_many(rejected, figures.records, settings.max_skipped_share):
        reason = figures.rejected.most_common(1)[0][0]
        return (
            f"training would refuse this: {rejected} of {figures.records} records are unusable, most of them for: "
            f"{reason}; fix the data (its converter names each record), choose another template, or raise MAX_SKIPPED"
        )
    if figures.truncated > settings.max_skipped_share * figures.records:
        return (
            f"raise DECODER_SEQ_LEN (--max-length here): {figures.truncated} of {figures.records} records lose the end "
            "of their answers"
        )
    if arguments.max_length is None:
        longest = figures.percentile(99)
        length = next((length for length in DECODER_LENGTHS if length >= longest), longest)
        return (
            f"train with DECODER_SEQ_LEN={length} (10th argument), which holds 99% of the records; look again with "
            f"--max-length {length} to see what it cuts"
        )
    return (
        f"give {arguments.folder} to run_mcore_llava.sh as DATASET_PATH (18th argument), with "
        f"CONVERSATION_TEMPLATE={settings.template} and DECODER_SEQ_LEN={arguments.max_length}"
    )


if __name__ == "__main__":
    sys.exit(main())
