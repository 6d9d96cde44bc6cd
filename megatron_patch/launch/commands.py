"""The launchers by name."""

import importlib
from typing import Any

ASKING = ("chat", "serve", "inference", "evaluate")
# name -> module and what gives the command; imported when it is asked for
_COMMANDS = {
    "stage1": ("training", lambda module: module.stage(1)),
    "stage2": ("training", lambda module: module.stage(2)),
    "convert": ("conversion", lambda module: module.COMMAND),
    "rehearse": ("rehearsal", lambda module: module.COMMAND),
    "plan": ("plan", lambda module: module.COMMAND),
    "complete": ("completion", lambda module: module.COMMAND),
    "doctor": ("doctor", lambda module: module.COMMAND),
    **{name: ("asking", lambda module, name=name: module.COMMANDS[name]) for name in ASKING},
}


def find_command(name: str) -> Any:
    """The command of this name: a rows.Command, or one whose run(words, environment) gives the program, or none."""
    module, get = _COMMANDS[name]
    return get(importlib.import_module(f"megatron_patch.launch.{module}"))
