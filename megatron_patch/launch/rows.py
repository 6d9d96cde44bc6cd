"""The rows of a command, and one call of it: its values by name, and all that is wrong with them."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron_patch.launch.rules import AUTO_BOOLEAN, BOOLEAN, PROGRAM, REPOSITORY, Rule, one_of
from megatron_patch.object_storage import is_url, without_credentials


@dataclass(frozen=True)
class Argument:
    """A positional argument.  own, megatron: the option of our parser or of Megatron's that it becomes."""

    name: str
    rule: Rule
    meaning: str
    own: str = ""
    megatron: str = ""

    def words(self, value: str) -> list[str]:
        """The option with its value; a switch stands alone, or not at all."""
        option = self.own or self.megatron
        if not option or value == "":
            return []
        if self.rule in (BOOLEAN, AUTO_BOOLEAN):
            off = [f"--no-{option[2:]}"] if self.rule is AUTO_BOOLEAN else []
            return {"true": [option], "false": off}.get(value, [])
        return [option, value]


@dataclass(frozen=True)
class Option(Argument):
    """An option from the environment.  A default in (brackets) is worked out later; until then it is empty."""

    default: str = ""

    @property
    def initial(self) -> str:
        """The value where none is given; empty: it is worked out later."""
        return "" if self.default.startswith("(") else self.default


def option(name: str, default: str, rule: Rule, meaning: str, own: str = "", megatron: str = "") -> Option:
    """A row, written as --help shows it."""
    return Option(name, rule, meaning, own, megatron, default)


ANY_PYTHON = "python3"  # the machine's, where there is no environment and none is named
COMMON_OPTIONS = (
    option("PYTHON", "(.venv or python3)", PROGRAM, "the Python interpreter that runs everything"),
    option("DRY_RUN", "0", one_of("0", "1"), "1: print the command, one argument per line, and write nothing"),
)


@dataclass(frozen=True)
class Command:
    """A launcher: its rows, what holds between them, and what it starts.

    check: adds to the complaints of a call, and returns what it has found; start: makes the program of a right call of
    that.
    """

    title: str
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]
    check: Callable[["Call"], Any]
    start: Callable[["Call", Any], "Program"]
    paths: tuple[str, ...] = ()  # names of the values that become absolute
    optional: int = 0  # so many of the last arguments may be absent
    rest: str = ""  # what words behind the arguments are for; "": there are none
    more_help: Callable[[], str] = lambda: ""
    presets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # values by preset and name


@dataclass(frozen=True)
class Program:
    """What a launcher becomes."""

    words: Sequence[str]
    environment: Mapping[str, str]


def quoted(value: str) -> str:
    """In single quotes, as a shell reads it."""
    if value.isprintable():
        return "'" + value.replace("'", "'\\''") + "'"
    return "$'" + value.encode("unicode_escape").decode().replace("'", "\\'") + "'"


class Call(Mapping[str, str]):
    """Values by name; those that are missing are empty.  `refuse` and `complain` collect what is wrong."""

    def __init__(self, command: Command, program: str, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """program: as it was called, for messages."""
        self.command, self.program, self.environment = command, program, environment
        self.rest = tuple(words[len(command.arguments) :])
        self.notes: list[str] = []  # what is told of arguments that are right
        self._values: dict[str, str] = {}
        self._wrong: set[str] = set()
        self._complaints: list[str] = []
        self._places = {row.name: place for place, row in enumerate(command.arguments, 1)}
        preset = self._preset()
        self._read_arguments(words, preset)
        for row in command.options:
            self._set(row, environment.get(row.name) or preset.get(row.name) or row.initial)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _preset(self) -> Mapping[str, str]:
        name = self.environment.get("PRESET", "")
        if not name or not self.command.presets:
            return {}
        if name not in self.command.presets:
            known = " ".join(self.command.presets)
            self.complain(f"environment PRESET={quoted(name)}", f"must be one of {known} for this stage")
        return self.command.presets.get(name, {})

    def _read_arguments(self, words: Sequence[str], preset: Mapping[str, str]) -> None:
        required = len(self.command.arguments) - self.command.optional
        for place, row in enumerate(self.command.arguments, 1):
            if place <= len(words):
                value = words[place - 1]
                self._set(row, preset.get(row.name, value) if value == "-" else value, given=True)
                continue
            self._values[row.name] = ""
            self._wrong.add(row.name)
            if place <= required:
                self.complain(f"argument {place} {row.name}", f"is missing: must be {row.rule.text}")

    def _set(self, row: Argument, value: str, given: bool = False) -> None:
        self._values[row.name] = value
        if value or given:
            problem = row.rule.problem(value)
            if problem is not None:
                self.refuse(row.name, f"must be {row.rule.text}" + (f" ({problem})" if problem else ""))

    def require(self, rows: Iterable[Argument]) -> None:
        """Read rows from the environment that must all be there, as those of a cluster."""
        for row in rows:
            self._set(row, self.environment.get(row.name, ""))
            if not self[row.name]:
                self._wrong.add(row.name)
                self.complain(f"environment {row.name}", f"is missing: must be {row.rule.text}")

    def right(self, *names: str) -> bool:
        """Were all of these given and right so far?"""
        return self._wrong.isdisjoint(names)

    @property
    def is_right(self) -> bool:
        """Is nothing wrong so far?"""
        return not self._complaints

    def int(self, name: str) -> int:
        """A value that is a whole number."""
        return int(self[name])

    def refuse(self, name: str, text: str) -> None:
        """One more thing wrong, about a row: position, name and value go in front."""
        self._wrong.add(name)
        place = self._places.get(name)
        where = f"argument {place}" if place else "environment"
        self.complain(f"{where} {name}={quoted(without_credentials(self[name]))}", text)

    def complain(self, label: str, text: str) -> None:
        """One more thing wrong, said once."""
        line = f"  {label} {text}"
        if line not in self._complaints:
            self._complaints.append(line)

    def end_if_wrong(self) -> None:
        """Say all that is wrong at once and end with exit code 2."""
        if self._complaints:
            refuse(self._complaints, self.program)

    def absolute(self, name: str) -> str:
        """A path: one that begins with a dash must not look like an option later.  `none`, "" and URLs stay."""
        value = self[name]
        return value if value in ("", "none") or value.startswith("/") or is_url(value) else f"{os.getcwd()}/{value}"

    def python(self) -> str:
        """The interpreter that runs everything."""
        return self["PYTHON"] or default_python()


def default_python() -> str:
    """The interpreter that runs everything, unless PYTHON names another."""
    own = os.path.join(REPOSITORY, ".venv/bin/python")
    return own if os.access(own, os.X_OK) else ANY_PYTHON


def python_path(environment: Mapping[str, str]) -> str:
    """PYTHONPATH of a program: this repository, then the caller's."""
    return os.pathsep.join(filter(None, (REPOSITORY, environment.get("PYTHONPATH"))))


def refuse(complaints: Sequence[str], program: str) -> NoReturn:
    """Say what is wrong and end."""
    print(f"error: {len(complaints)} wrong or missing; nothing was started or written", file=sys.stderr)
    print(*complaints, f"  all rules: bash {shlex.quote(program)} --help", sep="\n", file=sys.stderr)
    sys.exit(2)


def add_to_parser(group: Any, rows: Iterable[Argument]) -> None:
    """Give an argparse group the rows' own options, each with the launcher's default."""
    import argparse

    for row in rows:
        if not row.own:
            continue
        default = (row.initial or None) if isinstance(row, Option) else None
        named: dict[str, Any] = {"help": row.meaning.replace("%", "%%")}
        if row.rule is BOOLEAN:
            named["action"] = "store_true"  # a launcher says what is true
        elif row.rule is AUTO_BOOLEAN:
            named["action"] = argparse.BooleanOptionalAction  # neither: auto
        else:
            named |= {"type": row.rule.parse, "default": default}
            if row.rule.choices:
                named["choices"] = row.rule.choices
        group.add_argument(row.own, **named)
