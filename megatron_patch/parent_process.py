"""A process that must not outlive the one that started it."""

import contextlib
import ctypes
import signal


def end_with_parent() -> None:
    """Have the system kill this process when its parent dies: nobody else would after a `kill -9` of it.

    Else the same command, typed again, would meet the old processes still writing to its folder.  Linux only; a process
    that this one forks does not inherit it.
    """
    pr_set_pdeathsig = 1  # linux/prctl.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
