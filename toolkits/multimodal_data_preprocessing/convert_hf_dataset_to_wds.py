"""A folder that Hugging Face's `datasets` wrote with save_to_disk -> shards that the launchers train on.

Columns are found by their usual names: image or images; conversations or messages, else question and answer, else
caption or text; id.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.preparation.sources import Columns, HfDatasetSource
from toolkits.multimodal_data_preprocessing.command_line import parser_of, run


def main() -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="shards go to DIR-wds")
    parser.add_argument("--source-split", metavar="NAME", help="which of its splits, where it has several")
    parser.add_argument("--image-column", metavar="NAME", help="images, lists of images, or their file names")
    parser.add_argument("--conversation-column", metavar="NAME", help="lists of turns, as ShareGPT or ChatML")
    parser.add_argument("--question-column", metavar="NAME", help="with --answer-column")
    parser.add_argument("--answer-column", metavar="NAME", help="with --question-column")
    parser.add_argument("--caption-column", metavar="NAME", help="texts about the images, without questions")
    parser.add_argument("--id-column", metavar="NAME", help="the records' own ids")
    parser.add_argument(
        "--image-root",
        type=Path,
        action="append",
        metavar="DIR",
        help="where the names in the image column start, when it holds names; may be repeated",
    )
    return run(parser.parse_args(), make)


def make(arguments: argparse.Namespace) -> tuple[HfDatasetSource, Path]:
    """The source that the arguments name.  Raises UserError."""
    columns = Columns(
        arguments.image_column,
        arguments.conversation_column,
        arguments.question_column,
        arguments.answer_column,
        arguments.caption_column,
        arguments.id_column,
    )
    folder = arguments.folder.absolute()
    source = HfDatasetSource(arguments.folder, arguments.source_split, columns, arguments.image_root or ())
    return source, folder.with_name(f"{folder.name}-wds")


if __name__ == "__main__":
    sys.exit(main())
