"""LLaVA-format JSON and its pictures -> shards that the launchers train on (webdataset + energon's .nv-meta)."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.data.records import SPLITS, Ledger, convert
from megatron_patch.errors import UserError

PRETRAIN_JSON = "blip_laion_cc_sbu_558k.json"


def main() -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments()
    try:
        folder = arguments.folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; wanted the one with the JSON file and the pictures")
        source = find_json(folder, arguments.json)
        output = arguments.output or folder / "wds"
        ledger = convert(
            source,
            find_image_roots(folder, arguments.image_root),
            output,
            ratio=parse_ratio(arguments.split),
            samples_per_shard=arguments.samples_per_shard,
            overwrite=arguments.overwrite,
            keep_going=arguments.keep_going,
            progress=show_progress,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    report(ledger, output)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help=f"folder with {PRETRAIN_JSON} (or one *.json) and images/"
    )
    parser.add_argument("--json", metavar="NAME.json", help="the JSON file, within DIR or a path of its own")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the shards go; default: DIR/wds")
    parser.add_argument(
        "--image-root",
        type=Path,
        action="append",
        metavar="DIR",
        help="where the records' image names start; may be repeated; default: DIR/images, then DIR",
    )
    parser.add_argument("--split", default="9,1,0", metavar="A,B,C", help="shares of train, val, test; default: 9,1,0")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="at most; default: 1000")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--keep-going", action="store_true", help="go on when more than 1%% of the records are rejected"
    )
    return parser.parse_args()


def find_json(folder: Path, name: str | None) -> Path:
    """The file with the conversations: the one named, else LLaVA-Pretrain's, else the only one.  Raises UserError."""
    if name is not None:
        return next((path for path in (folder / name, Path(name)) if path.is_file()), folder / name)
    if (folder / PRETRAIN_JSON).is_file():
        return folder / PRETRAIN_JSON
    found = sorted(path for path in folder.glob("*.json*") if path.suffix in (".json", ".jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: wanted {PRETRAIN_JSON} or a single *.json in it, got {names}; name it with --json")
    return found[0]


def find_image_roots(folder: Path, named: list[Path] | None) -> tuple[Path, ...]:
    """The folders that image names are looked up in, in this order."""
    if named:
        return tuple(named)
    return tuple(path for path in (folder / "images", folder) if path.is_dir())


def parse_ratio(text: str) -> tuple[int, ...]:
    """`9,1,0` -> (9, 1, 0).  Raises UserError."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--split {text}: wanted whole numbers, shares of train, val and test, as in 9,1,0")
    return tuple(int(word) for word in words)


def show_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(items, total=total, unit=" records", desc="converting", mininterval=0.5)


def report(ledger: Ledger, output: Path) -> None:
    """The account, where everything lies, and what to do next."""
    written = ", ".join(f"{split} {ledger.written[split]}" for split in SPLITS)
    print(f"{ledger.records_in} records in = {sum(ledger.written.values())} written ({written})", end="")
    print(f" + {ledger.rejected.total()} rejected")
    for reason, count in ledger.rejected.most_common():
        print(f"  rejected: {reason}: {count}")
    if ledger.repeated_ids:
        print(f"  {ledger.repeated_ids} records share their id with another one of other content; they are kept")
    if ledger.rejected:
        print(f"  each of them is named in {output / 'rejected.jsonl'}")
    if not ledger.written["val"]:
        print("  no record for validation: give --split a second share, or another folder as VALID_DATASET_PATH")
    print(f"shards: {output}")
    print(f"next: give {output} to examples/llava_mcore/run_mcore_llava.sh as DATASET_PATH (18th argument)")
    print("      and VALID_DATASET_PATH (19th argument); it lists all its arguments with --help")


if __name__ == "__main__":
    sys.exit(main())
