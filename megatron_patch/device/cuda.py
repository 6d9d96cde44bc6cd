"""CUDA: Megatron's home.  Nothing is replaced here."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing's own, without an import that the launchers would wait for
if TYPE_CHECKING:
    import torch

NAME = "cuda"

# ---------------------------------------------------------------- for the launchers

DEVICES = "GPUs"
COUNTED_BY = "CUDA_VISIBLE_DEVICES, nvidia-smi -L"
REFUSED: dict[str, str] = {}
# flash-attn or cuDNN, whichever is there and faster; or cuDNN only
ATTENTION_BACKENDS = ("auto", "fused")


def _listed() -> int:
    """GPUs that nvidia-smi lists, or else /dev."""
    if any(os.access(os.path.join(folder, "nvidia-smi"), os.X_OK) for folder in os.get_exec_path()):
        import subprocess

        asked = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if asked.returncode == 0:
            return sum(line.startswith("GPU ") for line in asked.stdout.splitlines())
    return sum(name[:6] == "nvidia" and name[6:].isdecimal() for name in os.listdir("/dev"))


def count() -> int:
    """GPUs that a process started here would see: those of this machine, as far as they are visible."""
    found = _listed()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or visible is None:
        return found
    ids = visible.split(",")
    # CUDA ends the list at the first invalid entry
    return next((index for index, entry in enumerate(ids) if not entry or entry.startswith("-")), len(ids))


def memory_here(processes: int) -> int | None:
    """Bytes of the smallest GPU's memory, as nvidia-smi says; None: it does not."""
    del processes  # each has a GPU of its own
    import subprocess

    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    sizes = [int(line) for line in asked.stdout.split() if line.isdecimal()]
    return min(sizes) << 20 if sizes else None


def environment(nodes: int) -> dict[str, str]:
    """Variables of the processes; one that is set already stays."""
    del nodes
    return {"CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") or "1"}


def notes() -> dict[str, str]:
    """Nothing."""
    return {}


# ---------------------------------------------------------------- for the run

TRANSFORMER_ENGINE = True
DISTRIBUTED_BACKEND = "nccl"


def is_available() -> bool:
    """Does torch see a GPU?"""
    import torch

    return torch.cuda.is_available()


def current_device() -> torch.device:
    """GPU of this process: LOCAL_RANK, as processes.py and torchrun count."""
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def install() -> None:
    """Have fp32 convolutions, the tower's first layer, compute in fp32: torch's default for them is TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def memory() -> int:
    """Bytes of a GPU's memory."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def peak_memory() -> int:
    """Bytes of GPU memory in tensors, at their peak."""
    import torch

    return torch.cuda.max_memory_allocated()


def megatron_arguments(use_transformer_engine: bool) -> list[str]:
    """Transformer Engine's layers, or the local ones without the fusions that need Apex or it."""
    if use_transformer_engine:
        return ["--transformer-impl", "transformer_engine", "--distributed-backend", DISTRIBUTED_BACKEND]
    return [
        *("--transformer-impl", "local", "--distributed-backend", DISTRIBUTED_BACKEND),
        *("--no-rope-fusion", "--no-persist-layer-norm", "--no-gradient-accumulation-fusion"),
    ]


def optimizer_offload(fraction: float) -> list[str]:
    """Megatron's HybridDeviceOptimizer, which steps this share of the parameters on the host."""
    return [
        "--optimizer-cpu-offload",
        "--optimizer-offload-fraction",
        f"{fraction:.2f}",
        "--use-precision-aware-optimizer",
    ]
