"""The launchers by name."""

import importlib

from megatron_patch.launch.rows import Command

TYPE_CHECKING = False  # typing's own, without its import
if TYPE_CHECKING:
    from megatron_patch.launch.asking import AskingCommand

ASKING = ("chat", "serve", "inference", "evaluate")
# name -> module and what gives the command; imported when it is asked for
_COMMANDS = {
    "stage1": ("training", lambda module: module.stage(1)),
    "stage2": ("training", lambda module: module.stage(2)),
    "convert": ("conversion", lambda module: module.COMMAND),
    **{name: ("asking", lambda module, name=name: module.COMMANDS[name]) for name in ASKING},
}


def find_command(name: str) -> "Command | AskingCommand":
    """The command of this name."""
    module, get = _COMMANDS[name]
    return get(importlib.import_module(f"megatron_patch.launch.{module}"))
