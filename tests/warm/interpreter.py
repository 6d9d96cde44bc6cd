"""The Python that tests start: one that is warm (server.py), or the real one with COLD_START=1 in the environment.

WARM_PYTHON in the environment names one that another process keeps warm (run_mutants.py, for all of its copies).
"""

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOM = 60_000  # bytes for the command line of a forked process; Linux allows 128 KiB for one argument
# What the launchers set for the CPU, which is what the runs of the tests have.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}

_folder: Path | None = None


@functools.cache
def python() -> str:
    """Path of the interpreter to start programs with.  The server is started with the first question."""
    if os.environ.get("COLD_START") == "1":
        return sys.executable
    if "WARM_PYTHON" in os.environ:
        return os.environ["WARM_PYTHON"]
    global _folder
    _folder = folder = Path(tempfile.mkdtemp(prefix="warm"))
    shim = folder / "python"
    call = f"main({sys.executable!r}, {str(folder / 'socket')!r})"
    shim.write_text("\n".join([f"#!{sys.executable} -IS", (HERE / "shim.py").read_text(), call, ""]))
    shim.chmod(0o755)
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("PYTHONPATH", None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, (folder / "printed").open("w") as printed:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        number = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-u", str(HERE / "server.py"), str(number), str(folder / "log"), "-" * ROOM],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
            pass_fds=[number],
        )
    atexit.register(_stop, server, folder)
    return str(shim)


def _stop(server: subprocess.Popen, folder: Path) -> None:
    server.stdin.close()
    server.wait(timeout=30)
    shutil.rmtree(folder, ignore_errors=True)


def account() -> Counter[str]:
    """How many starts were warm, and how many cold for which reason, so far."""
    log = _folder / "log" if _folder else None
    lines = log.read_text().splitlines() if log and log.is_file() else []
    return Counter(": ".join(filter(None, line.split("|")[:2])) for line in lines)
