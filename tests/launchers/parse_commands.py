"""Python commands read by their own parsers and not run: `python tests/launchers/parse_commands.py COMMANDS.json`.

COMMANDS.json: a list of [PROGRAM.py, WORD...], paths from the repository.  One process for all, as the time goes to
what the programs import.  Prints a JSON list: the option strings of each command's parser, or what it says when it
refuses the words.  [PROGRAM.py, LIST_OPTIONS] is never refused.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST_OPTIONS = "--list-options"


class Parsed(BaseException):
    """The words were read; nothing more is to happen.  Not an Exception: no program may catch it."""


def _read_and_stop(parser: argparse.ArgumentParser, words: Sequence[str] | None = None, _: object = None) -> None:
    parser.allow_abbrev = False  # a README spells options out
    if sys.argv[1:] != [LIST_OPTIONS] and (unknown := parser.parse_known_args(words)[1]):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Parsed(sorted(parser._option_string_actions))


def parsed(program: str, words: Sequence[str]) -> list[str] | str:
    """The options that the program has, or what its parser says of words that it refuses."""
    path = sys.path[:]
    sys.argv = [str(ROOT / program), *words]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as Python has it for a script
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except Parsed as read:
        return read.args[0]
    except SystemExit:
        return said.getvalue()
    finally:
        sys.path[:] = path
    return "reads no words"


if __name__ == "__main__":
    argparse.ArgumentParser.parse_args = _read_and_stop
    commands = json.loads(Path(sys.argv[1]).read_text())
    sys.path.append(str(ROOT))
    print(json.dumps([parsed(program, words) for program, *words in commands]))
