"""What may stand where TAB is pressed behind a launcher: for examples/completion.bash, from the launchers' own rows."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_patch.launch.commands import find_command
from megatron_patch.launch.job_words import STAGES
from megatron_patch.launch.rows import Argument, Command

KNOWN = "known: "  # begins what a rule says of a word that is in no list of files


def joined(words: Sequence[str]) -> list[str]:
    """Words as they were typed; bash hands `NAME=VALUE` and `s3://` over in pieces, as COMP_WORDBREAKS says."""
    found: list[str] = []
    for word in words:
        if found and (word in ("=", ":") or found[-1][-1:] in ("=", ":")):
            found[-1] += word
        else:
            found.append(word)
    return found


def _values(command: Command, row: Argument) -> Iterable[str]:
    """Of a row that has few; none: a number, a text, or a path, which bash completes."""
    if row.name == "PRESET":
        return command.presets
    if row.rule.choices:
        return row.rule.choices
    said = row.rule.problem("") or ""
    return said.removeprefix(KNOWN).split() if said.startswith(KNOWN) else ()


def _of_rows(command: Command, words: Sequence[str]) -> Iterable[str]:
    *before, last = words
    if command.paths and before[:1] in (["--config"], ["--from"]):
        rows = {row.name: row for row in (*command.arguments, *command.options)}
        if len(before) == 1:
            return ()
        name, equals, _ = last.partition("=")
        return _values(command, rows[name]) if equals and name in rows else (f"{one}=" for one in rows)
    if len(before) >= len(command.arguments):
        return ()
    first = ("--config", "--from", "--help") if not before and command.paths else ("--help",) if not before else ()
    return (*first, *_values(command, command.arguments[len(before)]))


def _of_parser(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterable[str]:
    *before, last = words
    options = parser._option_string_actions
    action = options.get(before[-1]) if before else None
    if action is not None and action.nargs != 0:
        return map(str, action.choices or ())
    return options if last.startswith("-") else ()


def candidates(name: str, words: Sequence[str]) -> list[str]:
    """What may stand in place of the last word.

    Args:
        name: of the command.
        words: behind the launcher, the last one as far as it is typed.
    Returns:
        Words that begin so; behind `NAME=` the values alone, as bash counts words.
    """
    command = find_command(name)
    if isinstance(command, Command):
        found = _of_rows(command, words)
    elif hasattr(command, "parser"):
        for place, word in enumerate(words[:-1], 1):
            if (launcher := os.path.basename(word)) in STAGES:  # the job that is planned or rehearsed
                return candidates(f"stage{STAGES[launcher]}", words[place:])
        found = (*_of_parser(command.parser(), words), *(STAGES if name in ("plan", "rehearse") else ()))
    else:
        found = ("--json", "--help")
    begun = words[-1].rpartition("=")[2]
    return [word for word in found if word.startswith(begun)]


@dataclass(frozen=True)
class Completion:
    """The command."""

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Print one candidate a line; words: name of the command, then what is typed."""
        name, *typed = words
        print(*candidates(name, joined(typed) or [""]), sep="\n")


COMMAND = Completion()
