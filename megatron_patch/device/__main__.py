"""What the launchers ask: `python megatron_patch/device/__main__.py KIND NODES` prints what the kind says, one thing a
line; the kind auto is the one whose devices are here.

    count NUMBER                of the devices here; left out where the number is what a model needs
    devices, counted_by TEXT    for messages
    attention_backends ONE OTHER    for FL=true and FL=false; left out where there is no choice
    environment NAME=VALUE      a variable of the processes
    refused NAME=VALUE WHY      a value that an argument cannot have
    note NAME=VALUE WHAT        what to know of a value that it can have

It runs as a file, with the standard library alone: the dry run of a launcher must not wait for torch.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron_patch import device  # noqa: E402


def main(name: str, nodes: str) -> None:
    """Print the lines."""
    kind = device.seen_here() if name == "auto" else device.kind(name)
    count = kind.count()
    if count is not None:
        print("count", count)
    print("devices", kind.DEVICES)
    print("counted_by", kind.COUNTED_BY)
    if kind.ATTENTION_BACKENDS is not None:
        print("attention_backends", *kind.ATTENTION_BACKENDS)
    for variable, value in kind.environment(int(nodes)).items():
        print("environment", f"{variable}={value}")
    for value, why in kind.REFUSED.items():
        print("refused", value, why)
    for value, what in kind.notes().items():
        print("note", value, what)


if __name__ == "__main__":
    main(*sys.argv[1:])
