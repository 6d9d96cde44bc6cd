"""The kernels' sources -> a shared library in the user's cache, built once by the C++ compiler of this machine.

Its name says what it was built from (sources, compiler, processor), so a home folder that machines share
holds one for each kind of them.  CXX names the compiler, as it does for make; CXX=none leaves the kernels out.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from megatron_patch.atomic_files import atomic_file
from megatron_patch.cpp_compiler import cpp_compiler, why_none

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("elementwise.cpp", "attention.cpp")]
HEADER = FOLDER / "common.h"
# No -ffast-math: it would round and flush otherwise in the whole process, torch's operators included.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
PATIENCE_S = 120
CPUINFO = Path("/proc/cpuinfo")

_POINTER, _INDEX, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_HEADS = [_POINTER, *[_INDEX] * 3]  # a tensor [S, B, heads, d]: its place, and strides in elements
_GROUPS = [_POINTER, *[_INDEX] * 4]  # a tensor [S, B, groups, heads, d] likewise
_ATTENTION = [_INDEX, _INDEX, _POINTER, *[_INDEX] * 4, *_GROUPS * 3, _POINTER, _POINTER, _REAL]
_SIGNATURES = {
    "rms_norm": [_INDEX, _INDEX, _POINTER, _POINTER, _REAL, _POINTER, _POINTER],
    "rms_norm_backward": [_INDEX, _INDEX, *[_POINTER] * 6],
    "swiglu": [_INDEX, _INDEX, _POINTER, _POINTER],
    "swiglu_backward": [_INDEX, _INDEX, _POINTER, _POINTER, _POINTER],
    "rotate": [*[_INDEX] * 4, *_HEADS, _POINTER, _POINTER, _REAL, _POINTER],
    "row_largest": [_INDEX, _INDEX, _INDEX, _POINTER, _POINTER],
    "exponentials": [_INDEX, _INDEX, _INDEX, _POINTER, _POINTER, _POINTER],
    "add": [_INDEX, _POINTER, _POINTER],
    "squares": [_INDEX, _INDEX, _POINTER, _POINTER],
    "adamw": [_INDEX, *[_POINTER] * 5, *[_REAL] * 8],
    "attention": [*_ATTENTION, *_GROUPS, _POINTER],
    "attention_backward": [*_ATTENTION, _POINTER, *_GROUPS * 4],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if they are not there yet; None where they cannot be, which is said once."""
    command = cpp_compiler()
    if command is None:
        if reason := why_none():
            _say(reason)
        return None
    try:
        loaded = ctypes.CDLL(str(_built(command)))
        for name, arguments in _SIGNATURES.items():
            for suffix in ("_fp32", "_bf16"):
                function = getattr(loaded, name + suffix)
                function.argtypes, function.restype = arguments, None
    except subprocess.CalledProcessError as error:
        _say(f"{' '.join(command)} failed: {error.stderr.strip()[-300:]}")
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        _say(str(error))
    else:
        return loaded
    return None


def _say(reason: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one process of a machine is enough
        return
    warnings.warn(
        f"steps are slower, because the compiled kernels cannot be used: {reason}; install g++, name a compiler by "
        "CXX, or say CXX=none to leave them out",
        stacklevel=3,
    )


def _built(command: list[str]) -> Path:
    """Where the library lies.

    Raises:
        OSError: no folder for it can be written.
        subprocess.CalledProcessError: the compiler refused.
    """
    program = Path(shutil.which(command[0])).resolve()
    state = program.stat()
    sources = [source.read_text() for source in (*SOURCES, HEADER)]
    origin = [*sources, *FLAGS, *command, str(program), str(state.st_mtime_ns), _processor()]
    name = f"kernels-{hashlib.sha256(chr(0).join(origin).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_megatron"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # no home: built anew by each process
        folder = Path(_own_folder().name)
    target = folder / name
    if not target.exists():
        with atomic_file(target) as beside:
            subprocess.run(
                [*command, *FLAGS, *map(str, SOURCES), "-o", str(beside)],
                check=True,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                stdin=subprocess.DEVNULL,
            )
    return target


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory:
    """One that goes with this process."""
    return tempfile.TemporaryDirectory(prefix="llava_megatron_")


def cpuinfo() -> str:
    """What Linux tells of the processor; nothing where there is no /proc."""
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor() -> str:
    """What -march=native depends on."""
    lines = cpuinfo().splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({platform.machine(), *(line for line in lines if line.startswith(wanted))}))
