"""Fifty steps of AdamW: our trainer against a plain PyTorch loop over transformers' LlavaForConditionalGeneration.

The loop has nothing of Megatron's: transformers' model and loss positions, torch's AdamW and clipping, the schedule by
its formula.  Only the batches are the loader's, with the padding that the trainer leaves out.  Tolerance 2.5e-4
relative, for Adam magnifies differences of summation in gradients near zero, step after step (2.5e-5 is seen); the
first step, with none behind it, must agree within 3.6e-7 (3.6e-8 is seen).
"""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.data.loading import DataConfig, build_train_loader
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.training.config import read_config
from tests import tiny_models
from tests.training.launching import Workspace, command, losses, run

STEPS, WARMUP, LR, MIN_LR = 50, 5, 1e-3, 1e-4
MICRO_BATCH, MICRO_BATCHES = 2, 4
SETTINGS = {"TRAIN_ITERS": STEPS, "LR_WARMUP_ITERS": WARMUP, "WEIGHT_DECAY": 0.1, "CLIP_GRAD": 0.5}


def settings_of(workspace: Workspace, output: Path) -> DataConfig:
    """What the trainer gives its loader."""
    words, environment = command(workspace, output, **SETTINGS, PADDING_FREE="false", DRY_RUN=1)
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    start = next(number for number, word in enumerate(printed) if word.endswith("pretrain_llava.py"))
    return read_config(printed[start + 1 :]).data


def learning_rate(step: int) -> float:
    """Of a step, counted from 1: linear warm-up from 0, then a cosine towards MIN_LR; both count the steps before it.

    transformers' get_cosine_schedule_with_warmup begins with a step at 0, too.
    """
    before = step - 1
    if before <= WARMUP:
        return LR * before / WARMUP
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (before - WARMUP) / (STEPS - WARMUP)))


def plain_loop(folder: Path, workspace: Workspace, settings: DataConfig) -> list[float]:
    """Mean loss over the labels of each step."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    statistics = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    # Megatron's rule: vectors (norms, biases) do not decay
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": SETTINGS["WEIGHT_DECAY"]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    loader = build_train_loader(str(workspace.dataset), settings, 0, 1)
    found = []
    for step in range(1, STEPS + 1):
        batches = [next(loader) for _ in range(MICRO_BATCHES)]
        count = sum(int((batch["labels"] != IGNORE_LABEL).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            pixels = (batch["pixels"].float() / 255 - mean) / std if len(batch["pixels"]) else None
            logits = model(input_ids=batch["tokens"], pixel_values=pixels).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], SETTINGS["CLIP_GRAD"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total / count)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [{}, {"TP": 2, "PP": 2}])
def test_fifty_steps_agree_with_a_plain_loop(parallelism: dict, workspace: Workspace, tmp_path: Path) -> None:
    tiny_models.make_tiny_llava(tmp_path / "hf", "mistral")  # the weights that the workspace's checkpoint holds
    settings = settings_of(workspace, tmp_path / "out")
    assert settings.micro_batch_size == MICRO_BATCH
    expected = plain_loop(tmp_path / "hf", workspace, settings)
    found = losses(run(workspace, tmp_path / "out", **SETTINGS, **parallelism))
    differences = [abs(found[step] / expected[step - 1] - 1) for step in range(1, STEPS + 1)]
    print(f"first step {differences[0]:.1e}, largest {max(differences):.1e}, at the end {differences[-1]:.1e}")
    assert expected[-1] < 0.5 * expected[0], "a run that does not learn proves little"
    assert differences[0] <= 3.6e-7
    assert max(differences) <= 2.5e-4
