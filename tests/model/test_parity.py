"""Our model against transformers' LlavaForConditionalGeneration in fp32, on random tiny weights.

Tolerances.  Logits 1e-4 absolute: they are sums of some thousand products of numbers near 1, whose order differs
between kernels and tensor-parallel ranks.  Loss 1e-5 relative.  Projector gradient 1e-4 relative to its largest entry.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "one process": {"tensor": 1, "pipeline": 1, "context": 1, "sequence_parallel": False},
    "TP2": {"tensor": 2, "pipeline": 1, "context": 1, "sequence_parallel": False},
    "TP2+SP": {"tensor": 2, "pipeline": 1, "context": 1, "sequence_parallel": True},
    "PP2": {"tensor": 1, "pipeline": 2, "context": 1, "sequence_parallel": False},
    "CP2": {"tensor": 1, "pipeline": 1, "context": 2, "sequence_parallel": False},
}


def make_batch(image_token_id: int, seed: int) -> dict[str, torch.Tensor]:
    """Four records of different length: one picture, two pictures, text only, one picture; right-padded to 48."""
    generator = torch.Generator().manual_seed(seed)
    pictures_of, lengths = (1, 2, 0, 1), (30, 48, 21, 26)
    tokens = torch.zeros(4, 48, dtype=torch.int64)
    labels = torch.full((4, 48), -100)
    for row, (pictures, length) in enumerate(zip(pictures_of, lengths, strict=True)):
        tokens[row, :length] = torch.randint(3, 300, (length,), generator=generator)
        for picture in range(pictures):
            start = 2 + picture * (tiny_models.IMAGE_TOKENS + 3)
            tokens[row, start : start + tiny_models.IMAGE_TOKENS] = image_token_id
        trained = torch.rand(length, generator=generator) < 0.4
        trained[0] = False
        trained &= tokens[row, :length] != image_token_id
        assert trained.any()
        labels[row, : length - 1] = torch.where(trained[1:], tokens[row, 1:length], -100)
    side = tiny_models.IMAGE_SIDE_PX
    pixels = torch.randint(0, 256, (sum(pictures_of), 3, side, side), dtype=torch.uint8, generator=generator)
    return {"tokens": tokens, "labels": labels, "pixels": pixels}


def transformers_result(folder: Path, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, loss and projector gradient of the judge."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    statistics = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    # their labels stand at the token itself, ours one position before it
    unshifted = torch.full_like(batch["labels"], -100)
    unshifted[:, 1:] = batch["labels"][:, :-1]
    output = model(
        input_ids=batch["tokens"],
        pixel_values=(batch["pixels"].float() / 255 - mean) / std,
        labels=unshifted,
    )
    output.loss.backward()
    projector = [p for name, p in model.named_parameters() if name.endswith("multi_modal_projector.linear_2.bias")]
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), "gradient": projector[0].grad}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Per family: the judge's numbers, a checkpoint converted from the same folder, a batch."""
    found = []
    for number, family in enumerate(tiny_models.FAMILIES):
        folder = tmp_path_factory.mktemp(family)
        tiny_models.make_tiny_llava(folder / "hf", family)
        convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
        image_token_id = json.loads((folder / "checkpoint/llava/config.json").read_text())["image_token_index"]
        batch = make_batch(image_token_id, seed=number)
        torch.save(batch, folder / "batch.pt")
        expected = transformers_result(folder / "hf", batch)
        found.append({"family": family, "folder": folder, "batch": batch, "expected": expected})
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_gradient_equal_transformers(layout: str, cases: list[dict], tmp_path: Path) -> None:
    plan = LAYOUTS[layout] | {
        "cases": [
            {
                "checkpoint": str(case["folder"] / "checkpoint"),
                "batch": str(case["folder"] / "batch.pt"),
                "result": str(tmp_path / case["family"]),
            }
            for case in cases
        ]
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    processes = plan["tensor"] * plan["pipeline"] * plan["context"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
            *(str(ROOT / "tests/model/parity_worker.py"), str(tmp_path / "plan.json")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case in cases:
        result = {}
        for stage in range(plan["pipeline"]):
            result |= torch.load(f"{tmp_path / case['family']}.{stage}", weights_only=True)
        expected, real = case["expected"], case["batch"]["tokens"] != 0
        if plan["context"] == 1:
            difference = (result["logits"] - expected["logits"]).abs()[real].max().item()
            assert difference <= 1e-4, f"{case['family']} {layout}: logits differ by {difference:.2e}"
            assert expected["logits"][real].std() > 0.3, "flat logits prove nothing"
        loss = abs(result["loss"].item() / expected["loss"].item() - 1)
        assert loss <= 1e-5, f"{case['family']} {layout}: loss {result['loss']}, transformers {expected['loss']}"
        scale = expected["gradient"].abs().max()
        gradient = ((result["gradient"] - expected["gradient"]).abs().max() / scale).item()
        assert gradient <= 1e-4, f"{case['family']} {layout}: projector gradient differs by {gradient:.2e}"
