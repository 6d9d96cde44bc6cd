"""For all tests: how many programs were started warm, and why the others were not."""

import pytest

from tests.warm import interpreter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per reason, behind the results."""
    for reason, count in sorted(interpreter.account().items()):
        terminalreporter.write_line(f"{count} starts {reason}")
