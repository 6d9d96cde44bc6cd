"""Rows as text: --help, and the tables of the READMEs."""

import shlex
from collections.abc import Iterable, Sequence

from megatron_patch.launch.rows import Argument, Command, Option


def table(title: str, rows: Iterable[Argument], numbered: bool = False) -> str:
    """A table of --help."""
    lines = ["", title]
    for number, row in enumerate(rows, 1):
        if isinstance(row, Option):
            lines.append(f"  {row.name:<30}  {row.default:<16}  {row.rule.text}")
        elif numbered:
            lines.append(f"  {number:2d}  {row.name:<24}  {row.rule.text}")
        else:
            lines.append(f"  {row.name:<30}  {row.rule.text}")
        lines.append(f"      {row.meaning}")
    return "\n".join(lines)


def help_text(command: Command, program: str) -> str:
    """--help of a launcher."""
    names = " ".join(row.name for row in command.arguments)
    usage = f"usage: bash {shlex.quote(program)} {names}" + (f" [{command.rest}]" if command.rest else "")
    parts = [
        f"{usage}\n\n{command.title}",
        table("Arguments", command.arguments, numbered=True),
        table("Options, from the environment: name, default, value", command.options),
        command.more_help(),
    ]
    return "\n".join(filter(None, parts))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
