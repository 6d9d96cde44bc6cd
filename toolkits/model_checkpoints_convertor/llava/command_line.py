"""What the commands of this folder share: an argument, and how they end."""

import argparse
import signal
import sys
from collections.abc import Callable

from megatron_patch.errors import UserError


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """--add-tokens, for the commands that make a tokenizer with `<image>`."""
    parser.add_argument(
        "--add-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="special tokens before <image>, single or as a range: '<extra_id_0>..<extra_id_7>'",
    )


def exit_code(work: Callable[[], int | None]) -> int:
    """Do the work: its code (None: 0), or 2 after one sentence on stderr when the input is wrong.

    SIGTERM ends it as an exception does, so that what was written beside the target goes too.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
