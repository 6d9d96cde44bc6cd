"""Our model against transformers' LlavaForConditionalGeneration in fp32, on random tiny weights.

Each batch goes through once in rows of its own and once packed into a single row; the judge sees rows.

Tolerances.  Logits 1e-4 absolute: they are sums of some thousand products of numbers near 1, whose order differs
between kernels and tensor-parallel ranks.  Loss 1e-5 relative.  Gradients 1e-4 relative to their largest entry.
"""

import itertools
import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models
from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[2]
# Every family of LLM and every kind of tower at least once; the first three also with the plain CLIP tower.
CASES = {
    "llama": "clip",
    "mistral": "clip",
    "qwen2": "clip",
    "llama3": "clip",
    "tinyllama": "siglip",
    "smollm2": "clip_b32",
    "mistral_window": "siglip_last",
    "qwen2_untied": "clip_b32",
    "qwen3": "siglip",
}
PARALLELISMS = {
    "one process": {"tensor": 1, "pipeline": 1, "context": 1, "sequence_parallel": False},
    "TP2": {"tensor": 2, "pipeline": 1, "context": 1, "sequence_parallel": False},
    "TP2+SP": {"tensor": 2, "pipeline": 1, "context": 1, "sequence_parallel": True},
    "PP2": {"tensor": 1, "pipeline": 2, "context": 1, "sequence_parallel": False},
    "CP2": {"tensor": 1, "pipeline": 1, "context": 2, "sequence_parallel": False},
    "TP3": {"tensor": 3, "pipeline": 1, "context": 1, "sequence_parallel": False},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2, "context": 1, "sequence_parallel": False},
}


def make_batch(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Four records of different length: one image, two images, text only, one image; right-padded to 48."""
    generator = torch.Generator().manual_seed(seed)
    images_of, lengths = (1, 2, 0, 1), (30, 48, 21, 26)
    image_token_id, image_tokens = config["image_token_index"], config["image_seq_length"]
    tokens = torch.zeros(4, 48, dtype=torch.int64)
    labels = torch.full((4, 48), -100)
    for row, (images, length) in enumerate(zip(images_of, lengths, strict=True)):
        tokens[row, :length] = torch.randint(3, 300, (length,), generator=generator)
        for image in range(images):
            start = 2 + image * (image_tokens + 3)
            tokens[row, start : start + image_tokens] = image_token_id
        trained = torch.rand(length, generator=generator) < 0.4
        trained[0] = False
        trained &= tokens[row, :length] != image_token_id
        assert trained.any()
        labels[row, : length - 1] = torch.where(trained[1:], tokens[row, 1:length], -100)
    side = config["vision_config"]["image_size"]
    pixels = torch.randint(0, 256, (sum(images_of), 3, side, side), dtype=torch.uint8, generator=generator)
    return {"tokens": tokens, "labels": labels, "pixels": pixels}


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The records of a batch behind each other in one row, each padded to a multiple of 4 (2 * CP)."""
    lengths = [-(-int((row != 0).sum()) // 4) * 4 for row in batch["tokens"]]
    row = {
        name: torch.cat([record[:length] for record, length in zip(batch[name], lengths, strict=True)])[None]
        for name in ("tokens", "labels")
    }
    return row | {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)}


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
    result = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        if name.endswith("multi_modal_projector.linear_2.bias"):
            result["gradient"] = parameter.grad
        if name.endswith("layers.0.self_attn.q_norm.weight"):
            result["query_norm"] = parameter.grad
    return result


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Per family: the judge's numbers, a checkpoint converted from the same folder, a batch."""
    assert set(CASES) == {*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES}
    assert set(CASES.values()) == set(tiny_models.TOWERS)
    found = []
    for number, (family, tower) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp(family)
        tiny_models.make_tiny_llava(folder / "hf", family, tower=tower)
        convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
        batch = make_batch(json.loads((folder / "checkpoint/llava/config.json").read_text()), seed=number)
        torch.save(batch | {"packed": pack(batch)}, folder / "batch.pt")
        expected = transformers_result(folder / "hf", batch)
        found.append({"family": family, "folder": folder, "batch": batch, "expected": expected})
    return found


def fits(family: str, parallelism: dict) -> bool:
    """9 heads in 3 groups can be cut by 3 alone, the others by 2 alone.

    Cuts of the sequence are the same for all families, so those parallelisms take one of each kind.
    """
    if parallelism["context"] > 1 or parallelism["sequence_parallel"]:
        return family in (*tiny_models.FAMILIES, "qwen3")
    return parallelism["tensor"] == 1 or (parallelism["tensor"] == 3) == (family == "smollm2")


@pytest.mark.parametrize(
    "parallelism",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("TP3", "TP2 x PP2") else []) for name in PARALLELISMS],
)
def test_logits_loss_and_gradient_equal_transformers(parallelism: str, cases: list[dict], tmp_path: Path) -> None:
    cases = [case for case in cases if fits(case["family"], PARALLELISMS[parallelism])]
    plan = PARALLELISMS[parallelism] | {
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
            *(interpreter.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
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
            assert difference <= 1e-4, f"{case['family']} {parallelism}: logits differ by {difference:.2e}"
            assert expected["logits"][real].std() > 0.3, "flat logits prove nothing"
        numbers = expected.keys() - {"logits"}
        wanted = {f"{kind}{name}" for kind in ("", "packed_") for name in numbers}
        assert result.keys() - {"logits"} == wanted
        for name in sorted(wanted):
            whose = f"{case['family']} {parallelism}: {name}"
            right, found = expected[name.removeprefix("packed_")], result[name]
            if name.endswith("loss"):
                assert abs(found.item() / right.item() - 1) <= 1e-5, f"{whose} {found}, transformers {right}"
            else:
                difference = ((found - right).abs().max() / right.abs().max()).item()
                assert difference <= 1e-4, f"{whose} differs by {difference:.2e}"
