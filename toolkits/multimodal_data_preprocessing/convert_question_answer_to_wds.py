"""Prompts and answers as files, k.jpg + k.txt (the answer) + k.json ({"question"}) -> shards for the launchers."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.preparation.sources import QuestionAnswerSource
from toolkits.multimodal_data_preprocessing.command_line import parser_of, run


def main() -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="a folder, or one or several uncompressed tars; shards go to SOURCE-wds, named after the first",
    )
    return run(parser.parse_args(), make)


def make(arguments: argparse.Namespace) -> tuple[QuestionAnswerSource, Path]:
    """The source that the arguments name.  Raises UserError."""
    # Beside the folder, not in it: its tars and images would be found as input by the next conversion.
    first = arguments.paths[0].absolute()
    return QuestionAnswerSource(arguments.paths), first.with_name(f"{first.name.removesuffix('.tar')}-wds")


if __name__ == "__main__":
    sys.exit(main())
