"""Which accelerator is here.  One file per kind, all with the same names, so one more kind is one more file.

A file is a kind by its name, which is a value of ACCELERATOR.  Importing it takes the standard
library alone: the launchers ask it, where they know of no torch.  Each kind provides

    NAME                        that of the file, as in torch.device
for the launchers:
    count(chosen)               how many devices a process started here would see, of those that GPUS=chosen names, if
                                it names any; None: as many as a model needs
    choice_problem(chosen)      what is wrong with that choice, or with the one of the environment: its variable, and
                                what it must be; None: nothing
    choice(chosen)              variables by which a process sees these devices alone
    DEVICES, COUNTED_BY         what a message calls them, and where their number comes from
    REFUSED                     NAME=VALUE of the launchers' arguments that this kind cannot have -> why
    notes()                     NAME=VALUE of the launchers' arguments -> what to know of them on this machine
    memory_here(processes)      bytes that each of so many processes has; None: not known
    ATTENTION_BACKENDS          Megatron's for FL=true and for FL=false; None: there is no choice
    environment(nodes)          variables of the processes, name -> value
for the run:
    is_available()              does torch see one?
    current_device()            the torch.device of this process
    install()                   make torch ready for Megatron; called once, before anything imports megatron
    DISTRIBUTED_BACKEND         torch.distributed's: nccl, gloo
    TRANSFORMER_ENGINE          may Transformer Engine be looked for?
    READS_IN_PARTS              do ranks with the same weights read a part of a checkpoint each, and send it?
    megatron_arguments(use_te)      the arguments for Megatron's parser that this kind needs
    memory(), peak_memory()     bytes of the device, and bytes that this process has held at most
    optimizer_offload(fraction) Megatron's arguments that keep this share of the optimizer state in host memory
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

TYPE_CHECKING = False  # typing's own, without an import that the launchers would wait for
if TYPE_CHECKING:
    import torch

FALLBACK = "cpu"  # is everywhere


def kinds() -> list[str]:
    """Names of all kinds, that of the fallback last."""
    files = [name for name in os.listdir(os.path.dirname(__file__)) if name.endswith(".py") and name[0] != "_"]
    return sorted((name.removesuffix(".py") for name in files), key=lambda name: (name == FALLBACK, name))


def kind(name: str) -> ModuleType:
    """The kind of this name."""
    return importlib.import_module(f"{__name__}.{name}")


def seen_here() -> ModuleType:
    """The kind whose devices a process started here would see, without torch; else the fallback."""
    return next(found for name in kinds() if (found := kind(name)).count() != 0)


def backend() -> ModuleType:
    """The kind in use: the first that torch sees, else the CPU (CUDA_VISIBLE_DEVICES="" hides the GPUs)."""
    return next(found for name in kinds() if (found := kind(name)).is_available())


def current_device() -> torch.device:
    """Device on which this process keeps parameters and batches."""
    return backend().current_device()


def install() -> None:
    """Prepare torch on this machine.  Must run before the first import of megatron; later calls do nothing."""
    backend().install()


def have_transformer_engine() -> bool:
    """True when Transformer Engine imports.  Only asked where it may be: its empty CPU shell raises on import."""
    if not backend().TRANSFORMER_ENGINE:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def megatron_arguments(sixteen_bits: bool) -> list[str]:
    """Arguments for Megatron's parser that follow from the device and from Transformer Engine being there.

    Its layers are for 16 bits and fp8 only: of fp32 they make TF32 without a word, whose 10 bits fail a comparison, and
    for packed rows and context parallelism they have no attention in fp32.
    """
    return backend().megatron_arguments(sixteen_bits and have_transformer_engine())


def peak_memory() -> int:
    """Bytes that this process has held at most: of the GPU what torch had given out, else resident memory."""
    return backend().peak_memory()
