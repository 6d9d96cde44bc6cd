"""Transformer Engine's Python on a CPU, for tests alone: imported past device/cpu.py, over stand_in.py.

install() does what a run on a GPU meets by itself: Transformer Engine is there, the layers of its kind are asked for,
whatever the precision, and the patches of GPU runs are applied.  TRANSFORMER_ENGINE_FILES says where its files are
(fetch.py).  Its optimizers stay hidden, so that Adam is torch's as in the runs that are compared, but with
FUSED_ADAM=true.
"""

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch import device
from megatron_patch.device import cpu, cuda

HIDDEN = ("transformer_engine", "transformer_engine_torch")  # of cpu.CUDA_PACKAGES
ONNX = "transformer_engine.pytorch.onnx_extensions"  # the export of a model, which imports onnx and onnxscript


class _NoExport(types.ModuleType):
    """Its names are imported beside the layers, and called in an export alone."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


def _asked_by_transformer_engine() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("transformer_engine.")


def _claim_cuda() -> None:
    """Tell Transformer Engine, and nobody else, that there is CUDA and that tensors lie there."""
    import torch

    really, where = torch.cuda.is_available, torch.Tensor.is_cuda
    torch.cuda.is_available = lambda: _asked_by_transformer_engine() or really()
    torch.cuda.is_current_stream_capturing = lambda: False  # the graphs of CUDA; without a driver the question fails
    torch.Tensor.is_cuda = property(lambda tensor: _asked_by_transformer_engine() or where.__get__(tensor))


def _import(files: str) -> None:
    """Import transformer_engine.pytorch without the libraries that its package loads at first."""
    from tests.transformer_engine import stand_in

    for name in HIDDEN:
        del sys.modules[name]
    sys.path.append(files)
    sys.modules["transformer_engine_torch"] = stand_in
    sys.modules[ONNX] = _NoExport(ONNX)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: no search for cuDNN, NVRTC and its core library
    specification = importlib.util.find_spec("transformer_engine")
    package = importlib.util.module_from_spec(specification)
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = _loaded
    specification.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")  # whose ImportError the package would swallow
    if os.environ.get("FUSED_ADAM") != "true":
        sys.modules["transformer_engine.pytorch.optimizers"] = None


def _loaded(framework: str) -> None:
    if framework != "torch":
        raise ImportError(f"no extension for {framework}")


def _arguments_of_a_gpu(_: bool) -> list[str]:
    """Those of CUDA with Transformer Engine, in fp32 too, on gloo."""
    words = cuda.megatron_arguments(True)
    return [cpu.DISTRIBUTED_BACKEND if word == cuda.DISTRIBUTED_BACKEND else word for word in words]


def _with_patches_of_a_gpu(apply_all: Callable[[str], list[str]], listed: Callable[[str], list[str]]) -> Callable:
    def apply_both(backend: str) -> list[str]:
        names = apply_all(backend)
        for name in listed(cuda.NAME):
            if name not in names:
                importlib.import_module(f"megatron_patch.patches.{name}").apply()
        return names

    return apply_both


def install() -> Any:
    """As device.install(), with Transformer Engine; returns the stand-in.  Once per process, before Megatron."""
    device.install()
    _claim_cuda()
    _import(os.environ["TRANSFORMER_ENGINE_FILES"])
    cpu.TRANSFORMER_ENGINE = True
    cpu.megatron_arguments = _arguments_of_a_gpu
    from megatron_patch import patches

    patches.apply_all = _with_patches_of_a_gpu(patches.apply_all, patches.listed)
    return sys.modules["transformer_engine_torch"]
