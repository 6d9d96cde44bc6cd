"""For all tests: no GPU is seen; what takes long begins first; how many programs were started warm, why others not."""

import os
import signal
from collections import Counter
from typing import Any

import pytest

from tests.warm import interpreter

# The tests are the CPU's: on a machine with GPUs their gloo processes would get CUDA tensors.  Set before torch looks.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A shell's background job ignores Ctrl-C, and so would every program that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


STARTS = "starts"
# They take minutes, the first an hour: begun last, they would leave one process with work and the others without.
LONG = (
    "training/test_smollm2_lora.py",
    "training",
    "transformer_engine",
    "older_formats",
    "conversion",
    "launchers",
    "patches",
)
_of_workers: Counter[str] = Counter()


COLLECTED = pytest.StashKey[list[str]]()  # names of all tests, those too that -m leaves out


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The rooms and files of LONG first; within a room the order stays."""
    config.stash[COLLECTED] = [item.nodeid for item in items]

    def place(item: pytest.Item) -> int:
        return next((rank for rank, name in enumerate(LONG) if item.nodeid.startswith(f"tests/{name}")), len(LONG))

    items.sort(key=place)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its count over."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output[STARTS] = dict(interpreter.account())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The other end."""
    _of_workers.update(getattr(node, "workeroutput", {}).get(STARTS, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per reason, behind the results."""
    for reason, count in sorted((interpreter.account() + _of_workers).items()):
        terminalreporter.write_line(f"{count} starts {reason}")
