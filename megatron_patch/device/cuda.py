"""CUDA: Megatron's home.  Nothing is replaced here."""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False  # typing's own, without an import that the launchers would wait for
if TYPE_CHECKING:
    import torch

NAME = "cuda"

# ---------------------------------------------------------------- for the launchers

DEVICES = "GPUs"
COUNTED_BY = "GPUS, CUDA_VISIBLE_DEVICES, nvidia-smi -L"
VISIBLE = "CUDA_VISIBLE_DEVICES"
REFUSED: dict[str, str] = {}
# flash-attn or cuDNN, whichever is there and faster; or cuDNN only
ATTENTION_BACKENDS = ("auto", "fused")


def _listed() -> tuple[int, list[str]]:
    """GPUs that nvidia-smi lists, or else /dev; and the UUIDs of all their parts, where nvidia-smi says them."""
    if any(os.access(os.path.join(folder, "nvidia-smi"), os.X_OK) for folder in os.get_exec_path()):
        import subprocess

        asked = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if asked.returncode == 0:
            gpus = sum(line.startswith("GPU ") for line in asked.stdout.splitlines())
            return gpus, re.findall(r"\(UUID: ([^)]+)\)", asked.stdout)
    return sum(name[:6] == "nvidia" and name[6:].isdecimal() for name in os.listdir("/dev")), []


def _entries(visible: str) -> list[str]:
    """Of CUDA_VISIBLE_DEVICES, which CUDA ends at the first invalid entry."""
    ids = visible.split(",")
    return ids[: next((index for index, entry in enumerate(ids) if not entry or entry.startswith("-")), len(ids))]


def count(chosen: str = "") -> int:
    """GPUs that a process started here would see: those of this machine, as far as they are chosen, or visible."""
    found, _ = _listed()
    visible = chosen or os.environ.get(VISIBLE)
    return found if not found or visible is None else len(_entries(visible))


def choice_problem(chosen: str) -> tuple[str, str] | None:
    """What CUDA would say nothing of: it leaves out what it does not find, and the entries behind it."""
    visible = os.environ.get(VISIBLE)
    if chosen and visible is not None and visible != chosen:
        return "GPUS", f"must be left out, or {VISIBLE}={visible!r} be unset: each chooses GPUs"
    name, entries = ("GPUS" if chosen else VISIBLE), _entries(chosen or visible or "")
    found, uuids = _listed() if entries else (0, [])
    if not found:  # a dry run for another machine
        return None
    for entry in entries:
        if int(entry) >= found if entry.isdecimal() else uuids and not any(one.startswith(entry) for one in uuids):
            return (
                name,
                f"must name GPUs of this machine, 0 to {found - 1} or their UUIDs (nvidia-smi -L); {entry} is none",
            )
        if entries.count(entry) > 1:
            return name, f"must name each GPU once; {entry} stands there {entries.count(entry)} times"
    return None


def choice(chosen: str) -> dict[str, str]:
    """The GPUs by the numbers that nvidia-smi shows; CUDA's own count from the fastest."""
    return {VISIBLE: chosen, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if chosen else {}


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
READS_IN_PARTS = True
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
