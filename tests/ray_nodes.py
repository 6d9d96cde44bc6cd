"""A Ray cluster of two nodes for the tests that need one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_patch.ray_cluster import PACKAGE
from tests.package_cache import installed

WITH = ("msgpack==1.2.4", "requests==2.34.2", "certifi==2026.10.19.post1", "charset-normalizer==3.5.3")


class Nodes:
    """The cluster of ray_cluster.py."""

    def __init__(self, packages: Path) -> None:
        self.environment = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        script = Path(__file__).with_name("ray_cluster.py")
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )
        self.address = self._process.stdout.readline().strip()
        assert self.address

    def tell(self, line: str) -> None:
        """Do so, and wait until it is done."""
        print(line, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline().strip() == "done"

    def begin(self, words: Sequence[object]) -> subprocess.Popen:
        """A command on this cluster, begun."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        line = [*map(str, words), "--ray-address", self.address]
        return subprocess.Popen(line, env=self.environment, **pipes)

    def close(self) -> None:
        """The end of the cluster."""
        self._process.stdin.close()
        self._process.wait(60)


def wait_until(running: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """While a command is running."""
    while not happened():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)


def succeed(running: subprocess.Popen) -> str:
    """Wait for the end of a command; what it printed."""
    printed, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    return printed


def kill(running: subprocess.Popen) -> None:
    """Without a word."""
    running.send_signal(signal.SIGKILL)
    running.communicate()


def two_nodes() -> Iterator[Nodes]:
    """What a fixture gives: started once, ended by the fixture; skips where Ray cannot be installed."""
    try:
        packages = installed(PACKAGE, *WITH)
    except FileNotFoundError as error:
        pytest.skip(f"Ray cannot be installed: {error}")
    cluster = Nodes(packages)
    yield cluster
    cluster.close()
