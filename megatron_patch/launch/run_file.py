"""The values of a run in a file: to start from (--config), and beside its checkpoints to start again (--from).

    launcher: run_mcore_llava.sh     # may be left out
    MODEL_SIZE: 7B                   # arguments and options by name; what is left out is missing, or its default
    LR: 1e-3
    MEGATRON: [--log-throughput]     # words for Megatron

JSON, TOML or YAML.  NAME=VALUE behind the file wins, then the environment, then the file.  OUTPUT_BASEPATH/run.json is
such a file, with every value as it was resolved.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.launch.rows import Argument, Call, Command, Option, quoted

FILE = "run.json"
VARIABLE = "LLAVA_RUN"  # in which the launcher hands the values to the run, which writes them
LAUNCHER, MEGATRON = "launcher", "MEGATRON"
MINDSPEED = {"dataset_param", "dataloader_param", "image_encoder", "text_decoder"}  # in its data.json and model.json
OF_THE_START = ("PRESET", "PYTHON", "DRY_RUN", "MASTER_PORT", "GPUS")  # are not a run's


def resolved(call: Call) -> str:
    """The values of a call, as JSON; paths are absolute."""
    values = {row.name: call[row.name] for row in (*call.command.arguments, *call.command.options)}
    kept = {name: value for name, value in values.items() if value and name not in OF_THE_START}
    for name in call.command.paths:
        if name in kept:
            kept[name] = call.absolute(name)
    return json.dumps(
        {LAUNCHER: os.path.basename(call.program)} | kept | ({MEGATRON: list(call.rest)} if call.rest else {})
    )


def read_run(output: str) -> dict[str, Any] | None:
    """run.json of an output folder; None: there is none that can be read."""
    try:
        found = json.loads(Path(output, FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def expand(
    command: Command, program: str, words: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """What `--config FILE ...` and `--from FOLDER ...` stand for.

    Returns:
        The positional words, the environment with the file's options, and what is wrong, one line each.
    """
    if len(words) < 2:
        return [], dict(environment), [f"  {words[0]} is missing its {'file' if words[0] == '--config' else 'folder'}"]
    where = Path(words[1]) if words[0] == "--config" else Path(words[1], FILE)
    values, problem = _read(where)
    if problem:
        return [], dict(environment), [f"  {words[0]} {quoted(words[1])} {problem}"]
    if MINDSPEED & values.keys():
        text = (
            f"{where}: is a file of MindSpeed-MM; a run here takes its model's numbers from PRETRAIN_CHECKPOINT_PATH, "
            "and the rest by name, as in examples/llava_mcore/stage1.yaml: DATASET_PATH, BATCH_SIZE, ..."
        )
        return [], dict(environment), [f"  {text}"]
    complaints = []
    launcher = values.pop(LAUNCHER, None)
    if launcher not in (None, os.path.basename(program)):
        complaints.append(f"  {where}: is a run of {launcher}; start it with that")
    rest = values.pop(MEGATRON, [])
    if not isinstance(rest, list) or not all(isinstance(word, str | int | float) for word in rest):
        complaints.append(f"  {where}: {MEGATRON} must be a list of words")
        rest = []
    rows: dict[str, Argument] = {row.name: row for row in (*command.arguments, *command.options)}
    typed, behind = {}, list(words[2:])
    while behind and re.match("[A-Za-z_][A-Za-z0-9_]*=", behind[0]):
        name, _, value = behind.pop(0).partition("=")
        typed[name] = value
    texts = {}
    for source, found in ((str(where), values), ("command line", typed)):
        for name, value in found.items():
            text = _as_typed(value)
            if name not in rows:
                near = difflib.get_close_matches(name.upper(), rows, 1)
                complaints.append(f"  {source}: {name} is no argument or option" + (f"; {near[0]}?" if near else ""))
            elif text is None:
                complaints.append(f"  {source}: {name} must be a text, a number or true or false, not {value!r}")
            elif source == "command line" or not (isinstance(rows[name], Option) and environment.get(name)):
                texts[name] = text
    positions = [texts.pop(row.name, None) for row in command.arguments]
    while positions and positions[-1] is None:
        positions.pop()
    # one that is missing between others is refused by its rule, as an empty word
    given = [value if value is not None else "-" for value in positions]
    return [*given, *map(str, rest), *behind], {**environment, **texts}, complaints


def _as_typed(value: object) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else None


def _read(where: Path) -> tuple[dict[str, Any], str | None]:
    """The file's values, or what is wrong with it."""
    try:
        text = where.read_text(encoding="utf-8")
        if where.suffix == ".json":
            values = json.loads(text)
        elif where.suffix == ".toml":
            import tomllib

            values = tomllib.loads(text)
        elif where.suffix in (".yaml", ".yml"):
            values = _yaml(text)
        else:
            return {}, "must be a .yaml, .json or .toml file"
    except OSError as error:
        return {}, f"must be a file of a run's values: {where}: {error.strerror}"
    except ImportError:
        return {}, "is YAML, which this Python does not read: bash examples/setup_environment.sh, or use .json"
    except ValueError as error:
        return {}, f"cannot be read: {' '.join(str(error).split())}"
    return (values, None) if isinstance(values, dict) else ({}, "must hold NAME: value, one a line")


def _yaml(text: str) -> Any:
    if "site" not in sys.modules:  # started without site-packages
        import site

        site.main()
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
