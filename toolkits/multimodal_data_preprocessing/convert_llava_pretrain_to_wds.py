"""LLaVA-format JSON and its images -> shards that the launchers train on (webdataset + energon's .nv-meta)."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.preparation.sources import LlavaSource
from megatron_patch.errors import UserError
from toolkits.multimodal_data_preprocessing.command_line import add_image_root, find_image_roots, parser_of, run

# LLaVA-Pretrain's and CC3M-595K's; both lie beside other JSON files that hold no conversations.
KNOWN_NAMES = ("blip_laion_cc_sbu_558k.json", "chat.json")


def main() -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help=f"folder with {' or '.join(KNOWN_NAMES)} (or one *.json) and the images; shards go to DIR/wds",
    )
    parser.add_argument("--json", metavar="NAME.json", help="the JSON file, within DIR or a path of its own")
    add_image_root(parser, "DIR/images, then DIR")
    return run(parser.parse_args(), make)


def make(arguments: argparse.Namespace) -> tuple[LlavaSource, Path]:
    """The source that the arguments name.  Raises UserError."""
    folder = arguments.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted the one with the JSON file and the images")
    source = find_json(folder, arguments.json)
    return LlavaSource(source, find_image_roots(folder, arguments.image_root)), folder / "wds"


def find_json(folder: Path, name: str | None) -> Path:
    """The file with the conversations: the one named, else one of KNOWN_NAMES, else the only one.  Raises UserError."""
    if name is not None:
        return next((path for path in (folder / name, Path(name)) if path.is_file()), folder / name)
    known = [folder / name for name in KNOWN_NAMES if (folder / name).is_file()]
    found = known or sorted(path for path in folder.glob("*.json*") if path.suffix in (".json", ".jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{folder}: wanted {' or '.join(KNOWN_NAMES)} or a single *.json in it, got {names}; name it with --json"
        )
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
