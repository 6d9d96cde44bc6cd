"""Qwen3 with SigLIP through the public launchers: norms of query and key heads, squeezed images, another token count.

Losses are compared with those of one process, relative 1e-4 as in test_layouts (the gradient of a head norm itself is
compared with transformers in tests/model/test_parity.py).
"""

from pathlib import Path

import pytest

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from tests import tiny_models
from tests.training.launching import Workspace, losses, run


@pytest.mark.slow
def test_qwen3_with_siglip_trains_alike_at_tp2(workspace: Workspace, tmp_path: Path) -> None:
    tiny_models.make_tiny_llava(tmp_path / "hf", "qwen3", tower="siglip")
    convert_to_megatron(tmp_path / "hf", None, tmp_path / "start", precision="fp32", model_size="tiny")
    mine = Workspace(tmp_path / "start", workspace.dataset)
    changes = {"TRAIN_ITERS": 6, "CONVERSATION_TEMPLATE": "auto"}
    alone = losses(run(mine, tmp_path / "alone", **changes))
    cut = losses(run(mine, tmp_path / "cut", TP=2, SEQUENCE_PARALLEL="true", **changes))
    assert len(alone) == 6 and alone[6] < alone[1]
    assert cut == {iteration: pytest.approx(loss, rel=1e-4) for iteration, loss in alone.items()}
    trained = tmp_path / "cut/checkpoint"
    convert_to_huggingface(
        trained, tmp_path / "back", model_size="tiny", precision="fp32", hf_checkpoint=tmp_path / "hf"
    )
