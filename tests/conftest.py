"""For all tests: no GPU is seen, and how many programs were started warm, and why the others were not."""

import os

import pytest

from tests.warm import interpreter

# The tests are the CPU's: on a machine with GPUs their gloo processes would get CUDA tensors.  Set before torch looks.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per reason, behind the results."""
    for reason, count in sorted(interpreter.account().items()):
        terminalreporter.write_line(f"{count} starts {reason}")
