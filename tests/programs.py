"""Programs of a few lines in a process of their own: what they import or stand in for must not reach the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_COMPILER = {"CXX": "none"}  # torch's operators in place of the compiled kernels
# How a program begins that builds Megatron's layers: patched, on the CPU, as the only rank.
ONLY_RANK = """
from megatron_patch import device
device.install()
import torch
from megatron_patch import patches
patches.apply_all("cpu")
from megatron.core import mpu, tensor_parallel
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
"""
WITH_AND_WITHOUT_COMPILER = pytest.mark.parametrize("environment", [{}, WITHOUT_COMPILER], ids=["compiled", "torch"])


def in_new_process(program: str, *words: object, **environment: str) -> str:
    """Standard output of a program that starts with nothing imported."""
    return _output_of(sys.executable, program, words, environment)


def in_warm_process(program: str, *words: object, **environment: str) -> str:
    """The same of one that finds torch and transformers imported, but not Megatron: in a quarter of the time."""
    return _output_of(interpreter.python(), program, words, interpreter.ENVIRONMENT | environment)


def _output_of(python: str, program: str, words: tuple[object, ...], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [python, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
