"""Which accelerator is here.  One file per kind, all with the same functions, so one more kind is one more file.

Each kind provides:
    NAME                        "cuda" or "cpu", as in torch.device
    current_device()            the torch.device of this process
    install()                   make torch ready for Megatron; called once, before anything imports megatron
    megatron_arguments(have_te)     the arguments for Megatron's parser that this kind needs
    peak_memory()               bytes that this process has held at most
"""

import contextlib
import ctypes
import signal
from types import ModuleType

import torch

from megatron_patch.device import cpu, cuda


def backend() -> ModuleType:
    """The kind in use: CUDA where torch sees a GPU, else the CPU (CUDA_VISIBLE_DEVICES="" hides the GPUs)."""
    return cuda if torch.cuda.is_available() else cpu


def current_device() -> torch.device:
    """Device on which this process keeps parameters and batches."""
    return backend().current_device()


def end_with_parent() -> None:
    """Have the system kill this process when its parent, torchrun, dies: nobody else would after a `kill -9` of it.

    Else the same command, typed again, would meet the old processes still writing to its folder.  Linux only.
    """
    pr_set_pdeathsig = 1  # linux/prctl.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def install() -> None:
    """Prepare torch on this machine.  Must run before the first import of megatron; later calls do nothing."""
    backend().install()


def have_transformer_engine() -> bool:
    """True when Transformer Engine imports.  Only asked on CUDA: its empty CPU shell raises on import."""
    if backend() is not cuda:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def megatron_arguments() -> list[str]:
    """Arguments for Megatron's parser that follow from the device and from Transformer Engine being there."""
    return backend().megatron_arguments(have_transformer_engine())


def peak_memory() -> int:
    """Bytes that this process has held at most: of the GPU what torch had given out, else resident memory."""
    return backend().peak_memory()
