"""Changes to Megatron.

touch_points.py                 every symbol of Megatron that this toolkit replaces or wraps, and why; the check of them
adamw_in_one_pass.py            gradients are divided and clipped, AdamW steps, weights are rounded: one pass on a CPU
adam_of_another_kind.py         a run goes on where Transformer Engine, and so FusedAdam, is there or not
allow_cpu_initialization.py     Megatron starts without CUDA
async_save_copies.py            asynchronous saves on a CPU write copies
cpu_rng_state.py                random states without CUDA
distributed_optimizer_state.py  Adam's step in the distributed optimizer
embedding_gradient.py           an embedding's gradient is that of its tokens' rows
ended_writer.py                 a run ends when the process that writes its asynchronous saves was killed
exchanged_in_place.py           gloo exchanges gradients and weights without copies
forked_writer.py                the process that writes asynchronous saves imports nothing anew
fused_adamw.py                  torch's AdamW in one pass over memory
gradient_norm.py                the norm of large gradients, exact on a CPU
gradients_in_parts.py           gradients in 16 bits are added to the buffer without a whole copy in 32
gradients_without_zeros.py      the first gradient of a step is written, not added to zeros
hooks_without_gradients.py      parameters say whether a gradient may go to the buffer past torch
interleaved_loader_state.py     the loader's state of an interleaved pipeline
loaded_in_place.py              a load on a CPU reads tensors to where they belong
missing_extra_states.py         a checkpoint of the local layers loads into those of Transformer Engine
own_optimizer_state.py          each rank saves and loads its own part of the distributed optimizer's state
parameter_group_keys.py         a resume with another learning rate
parts_saved_in_place.py         saves on a CPU copy no part of a tensor
rotary_in_one_pass.py           rotary positions without Transformer Engine's kernel
scale_in_place.py               gradients are clipped without copies
shifted_optimizer_state.py      optimizer state that Megatron saved shifted is refused
skip_compile_helpers.py         no `make` at the start
synchronous_save_queue.py       synchronous saves start no process
torch_fsdp2.py                  gradients, checkpoints and resumes of weights that FSDP shares out
unfused_weight_gradients.py     the output layer among Transformer Engine's layers, without Apex
whole_tracker.py                the tracker file is written whole
written_in_pieces.py            saves on a CPU write pieces of a size that a virtual machine has memory for

Beside the list, one file for each mistake of Megatron, with `apply()`: what is wrong, and where upstream.  They are
written for one version of megatron-core; another one is refused, because a patch that silently misses its target is
worse than none.
"""

import importlib
import importlib.metadata

from megatron_patch.errors import UserError
from megatron_patch.patches import touch_points
from megatron_patch.patches.touch_points import MEGATRON_CORE_VERSION, TOUCH_POINTS

_applied: set[str] = set()


def check_version(installed: str | None = None) -> None:
    """Refuse any megatron-core but the one the touch points were written for.

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


def check(backend: str) -> None:
    """Refuse a Megatron that `backend` ("cpu" or "cuda") cannot work with.  Imports nothing of it.

    Raises:
        UserError: wrong megatron-core version or a missing symbol.
    """
    check_version()
    touch_points.check(backend)


def listed(backend: str) -> list[str]:
    """Names of the patches that `backend` needs, as TOUCH_POINTS lists them."""
    layers = [layer for point in TOUCH_POINTS for layer in point.layers if layer.backend in (None, backend)]
    names = [layer.place.removeprefix("patches.") for layer in layers if layer.place.startswith("patches.")]
    return list(dict.fromkeys(names))


def apply_all(backend: str) -> list[str]:
    """Apply every patch that `backend` needs; returns their names.  Later calls do nothing.

    Raises:
        UserError: as check().
    """
    from megatron_patch.checkpoint_files import accept_newer_metadata  # torch, which check() does without

    check(backend)
    accept_newer_metadata()
    names = listed(backend)
    for name in names:
        if name not in _applied:
            importlib.import_module(f"{__name__}.{name}").apply()
            _applied.add(name)
    return names
