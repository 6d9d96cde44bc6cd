"""CUDA: Megatron's home.  Nothing is replaced here."""

import os

import torch

NAME = "cuda"


def current_device() -> torch.device:
    """GPU of this process: LOCAL_RANK, as torchrun counts."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def install() -> None:
    """Nothing to prepare."""


def peak_memory() -> int:
    """Bytes of GPU memory in tensors, at their peak."""
    return torch.cuda.max_memory_allocated()


def megatron_arguments(have_transformer_engine: bool) -> list[str]:
    """Transformer Engine where it imports; otherwise the local layers without the fusions that need Apex or it."""
    if have_transformer_engine:
        return ["--transformer-impl", "transformer_engine", "--distributed-backend", "nccl"]
    return [
        *("--transformer-impl", "local", "--distributed-backend", "nccl"),
        *("--no-rope-fusion", "--no-persist-layer-norm", "--no-gradient-accumulation-fusion"),
    ]
