"""--help of a launcher, read back, and the tables of examples/llava_mcore/README.md made from it.

`python -m tests.launchers.readme_tables` prints the tables, to paste them after a change of a row.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron_patch.launch.machine import cluster_rows
from megatron_patch.launch.tables import markdown
from tests.launchers.launching import CONVERTER, STAGE_1, STAGE_2, start


class Row(NamedTuple):
    """One row of a table of --help; number only for arguments, default only for options."""

    name: str
    rule: str
    meaning: str
    number: int | None = None
    default: str | None = None


@dataclass(frozen=True)
class Help:
    """The tables of --help."""

    arguments: list[Row]
    options: list[Row]
    cluster: list[Row]
    presets: list[Row]


@cache
def rows_of_help(script: Path) -> Help:
    """All rows that a launcher shows."""
    result = start(script, ["--help"])
    assert result.returncode == 0 and result.stderr == ""
    tables: dict[str, list[Row]] = {"Arguments": [], "Options": [], "Presets": [], "Required": []}
    title = None
    lines = iter(result.stdout.splitlines())
    for line in lines:
        if line and not line.startswith(" "):
            title = re.split(r"[,: ]", line)[0]
        elif line:
            cells = re.split(r"\s{2,}", line.strip())
            meaning = next(lines).strip()
            if title == "Arguments":
                tables[title].append(Row(cells[1], cells[2], meaning, number=int(cells[0])))
            elif title == "Options":
                tables[title].append(Row(cells[0], cells[2], meaning, default=cells[1]))
            else:
                tables[title].append(Row(cells[0], cells[1], meaning))
    return Help(tables["Arguments"], tables["Options"], tables["Required"], tables["Presets"])


def readme_tables() -> list[str]:
    """The README's tables: training arguments, options, cluster variables; conversion arguments, options."""
    first, second, converter = rows_of_help(STAGE_1), rows_of_help(STAGE_2), rows_of_help(CONVERTER)
    assert (first.arguments, first.cluster, first.presets) == (second.arguments, second.cluster, second.presets)
    options = []
    for one, two in zip(first.options, second.options, strict=True):
        default = one.default if one.default == two.default else f"{one.default}; stage 2: {two.default}"
        options.append([one.name, default, one.rule, one.meaning])
    numbered = ["#", "name", "value", "meaning"]
    named = ["name", "default", "value", "meaning"]
    return [
        markdown(numbered, [[str(row.number), row.name, row.rule, row.meaning] for row in first.arguments]),
        markdown(named, options),
        markdown(["preset", "source", "values"], [[row.name, row.rule, row.meaning] for row in first.presets]),
        markdown(
            ["ENV", "name", "value", "meaning"],
            [[name, row.name, row.rule.text, row.meaning] for name, row in cluster_rows()],
        ),
        markdown(numbered, [[str(row.number), row.name, row.rule, row.meaning] for row in converter.arguments]),
        markdown(named, [[row.name, row.default or "", row.rule, row.meaning] for row in converter.options]),
    ]


if __name__ == "__main__":
    print("\n\n".join(readme_tables()))
