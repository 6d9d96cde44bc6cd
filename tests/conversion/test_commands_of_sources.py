"""The shell command with its options, run for real: a projector and tokens in, the original layout out."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conversion.conftest import SCRIPT, tensors_of
from tests.conversion.original_folders import projector_weights
from tests.conversion.test_round_trip import same_bytes


def convert(*words: object, **environment: str) -> str:
    command = ["bash", str(SCRIPT.with_suffix(".sh")), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_projector_and_tokens_in_original_layout_out(hub, tmp_path: Path):
    before = projector_weights()
    torch.save(before, tmp_path / "mm_projector.bin")
    options = {"PROJECTOR_PATH": str(tmp_path / "mm_projector.bin"), "ADD_TOKENS": "<box> <p_0>..<p_1>"}
    out = convert("tiny", hub("llama"), hub("clip"), tmp_path / "ckpt", 2, 2, "false", "fp32", **options)
    assert "<box> is 320, <p_1> is 322" in out and "mlp2x_gelu from mm_projector.bin" in out
    options = {"EXPORT_LAYOUT": "original_without_tower", "VISION_TOWER_NAME": "openai/clip-vit-large-patch14-336"}
    words = ("tiny", tmp_path / "ckpt", "none", tmp_path / "hf", 1, 1, "true", "fp32", hub("llama"))
    assert "without the tower" in convert(*words, **options)
    after = tensors_of(tmp_path / "hf")
    assert all(same_bytes(before[name], after[name]) for name in before)
    assert after["lm_head.weight"].shape == (324, 64) and "vision_tower" not in str(list(after))
    assert json.loads((tmp_path / "hf/config.json").read_text())["mm_vision_tower"] == options["VISION_TOWER_NAME"]
