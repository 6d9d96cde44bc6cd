"""What was trained is what is exported: transformers finds the loss that Megatron prints next.

Train at TP 2, export, let transformers compute the loss of the following batch, then let Megatron go on.  Tolerance
1e-5 relative, as for the first step.
"""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_patch.conversion import convert_to_huggingface
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.loader import build_train_loader
from tests import tiny_models
from tests.training.launching import Workspace, losses, run

ITERATIONS, BATCH_SIZE, GLOBAL_BATCH_SIZE = 4, 2, 8


def next_loss_by_transformers(exported: Path, workspace: Workspace) -> float:
    """Loss of the batch after ITERATIONS iterations, in nats per trained token."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    statistics = json.loads((exported / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    settings = DataConfig(
        tokenizer_path=str(workspace.checkpoint / "llava"),
        template="mistral",
        image_token_id=model.config.image_token_id,
        image_tokens=tiny_models.IMAGE_TOKENS,
        side_px=tiny_models.IMAGE_SIDE_PX,
        image_mean=tuple(statistics["image_mean"]),
        image_aspect_ratio="crop",
        decoder_seq_len=128,
        micro_batch_size=BATCH_SIZE,
        length_multiple=1,
        seed=1234,
        num_workers=0,
    )
    loader = build_train_loader(str(workspace.dataset), settings, 0, 1)
    steps = GLOBAL_BATCH_SIZE // BATCH_SIZE
    for _ in range(ITERATIONS * steps):
        next(loader)
    total, count = 0.0, 0
    for _ in range(steps):
        batch = next(loader)
        pixels = (batch["pixels"].float() / 255 - mean) / std
        with torch.no_grad():
            logits = model(input_ids=batch["tokens"], pixel_values=pixels if len(pixels) else None).logits
        labels = batch["labels"]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def test_transformers_finds_the_next_loss_and_tensorboard_has_it(workspace: Workspace, tmp_path: Path) -> None:
    words = {"TP": 2, "BATCH_SIZE": BATCH_SIZE, "GLOBAL_BATCH_SIZE": GLOBAL_BATCH_SIZE}
    before = losses(run(workspace, tmp_path / "out", TRAIN_ITERS=ITERATIONS, **words))
    convert_to_huggingface(
        tmp_path / "out/checkpoint",
        tmp_path / "exported",
        model_size="tiny",
        precision="fp32",
        hf_checkpoint=workspace.dataset.parents[1] / "hf",
    )
    card = (tmp_path / "exported/README.md").read_text()
    for row in (
        "| stage | `2: instructions` |",
        f"| exported at iteration | `{ITERATIONS}` |",
        "| conversation template | `mistral` |",
        f"| records or rows per step | `{GLOBAL_BATCH_SIZE}` |",
        f"| loss of the last iteration | `{before[ITERATIONS]:.4f}` |",
        f"| records kept | `{ITERATIONS * GLOBAL_BATCH_SIZE}` |",
        f"| dataset | `{'/'.join(workspace.dataset.parts[-2:])}` |",
    ):
        assert row in card, card
    expected = next_loss_by_transformers(tmp_path / "exported", workspace)
    found = losses(run(workspace, tmp_path / "out", TRAIN_ITERS=ITERATIONS + 1, **words))[ITERATIONS + 1]
    assert expected < 0.9 * before[1], "a model that learnt nothing proves nothing"
    print(f"relative difference {abs(found / expected - 1):.1e}")
    assert found == pytest.approx(expected, rel=1e-5)

    events = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    wanted = {"lm loss", "learning-rate", "grad-norm", "throughput/samples per second"}
    assert wanted <= set(events.Tags()["scalars"])
    recorded = {event.step: event.value for event in events.Scalars("lm loss")}
    assert recorded[ITERATIONS + 1] == pytest.approx(found, rel=1e-6)
    assert all(event.value > 0 for event in events.Scalars("throughput/samples per second"))
