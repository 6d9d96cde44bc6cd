"""The C++ compiler of this machine, for the compiled kernels and for whoever tells about the machine."""

import os
import shutil

COMPILERS = "c++", "g++", "clang++"


def cpp_compiler() -> list[str] | None:
    """The command that compiles C++ here: CXX, as make reads it, or the first of COMPILERS; None without one."""
    chosen = os.environ.get("CXX", "").split()
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([path] for name in COMPILERS if (path := shutil.which(name))), None)


def why_none() -> str | None:
    """A clause on why there is no compiler; None where CXX=none asks to do without."""
    chosen = os.environ.get("CXX", "")
    return None if chosen == "none" else f"there is no C++ compiler ({chosen or ', '.join(COMPILERS)})"
