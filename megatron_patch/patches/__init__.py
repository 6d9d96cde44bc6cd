"""Changes to megatron-core, one file each: why, where upstream, and how to see that it is no longer needed.

A patch module has `TARGETS` (module, dotted name) pairs that must exist, `applies(backend)` and `apply()`.
They are written for one version of megatron-core; another one is refused, because a patch that silently misses its
target is worse than none.
"""

import importlib
import importlib.metadata
from functools import reduce
from types import ModuleType

from megatron_patch.errors import UserError
from megatron_patch.patches import (
    allow_cpu_initialization,
    cpu_rng_state,
    distributed_optimizer_state,
    interleaved_loader_state,
    parameter_group_keys,
    skip_compile_helpers,
    whole_tracker,
)

MEGATRON_CORE_VERSION = "0.19.2"
ALL: tuple[ModuleType, ...] = (
    allow_cpu_initialization,
    cpu_rng_state,
    distributed_optimizer_state,
    interleaved_loader_state,
    parameter_group_keys,
    skip_compile_helpers,
    whole_tracker,
)

_applied: set[str] = set()


def check_version(installed: str | None = None) -> None:
    """Refuse any megatron-core but the one these patches were written for.

    Raises:
        UserError: another version is installed, or none.
    """
    if installed is None:
        try:
            installed = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            installed = "none"
    if installed != MEGATRON_CORE_VERSION:
        raise UserError(
            f"megatron-core {installed} is installed, the patches of this toolkit are written for "
            f"{MEGATRON_CORE_VERSION}; run `pip install megatron-core=={MEGATRON_CORE_VERSION}`"
        )


def check_targets(patch: ModuleType) -> None:
    """Raise UserError when a symbol that `patch` replaces is not there."""
    for module_name, attribute in patch.TARGETS:
        module = importlib.import_module(module_name)
        try:
            reduce(getattr, attribute.split("."), module)
        except AttributeError:
            raise UserError(
                f"patch {patch.__name__}: {module_name}.{attribute} does not exist in the installed megatron-core; "
                f"install megatron-core=={MEGATRON_CORE_VERSION}"
            ) from None


def apply_all(backend: str) -> list[str]:
    """Apply every patch that `backend` ("cpu" or "cuda") needs; returns their names.  Later calls do nothing.

    Raises:
        UserError: wrong megatron-core version or a missing symbol.
    """
    check_version()
    names = []
    for patch in ALL:
        name = patch.__name__.rsplit(".", 1)[-1]
        if not patch.applies(backend):
            continue
        names.append(name)
        if name in _applied:
            continue
        check_targets(patch)
        patch.apply()
        _applied.add(name)
    return names
