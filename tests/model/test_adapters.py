"""Low-rank adapters against transformers' LLaVA, whose weights are W + s B A, in fp32.

Logits, loss and the gradient of every A and B, in rows and packed, of each part of the model and family.  Tolerances
as in test_parity.py; the gradients of adapters are products of two of the judge's matrices, and as exact.
"""

import functools
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.geometry import read_geometry_of
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.lora import LoraConfig, LoraRecord, hub_path, weight_name
from tests import tiny_models
from tests.model.test_parity import PARALLELISMS, ROOT, make_batch, pack
from tests.warm import interpreter

EVERYWHERE = ("language_model", "vision_tower", "projector")
# family, tower -> its adapters
CASES = {
    ("mistral", "clip"): LoraConfig(3, 6.0),
    ("qwen2", "clip"): LoraConfig(4, 5.0, parts=EVERYWHERE, rslora=True),
    ("qwen3", "siglip"): LoraConfig(2, 4.0, parts=EVERYWHERE),
    ("llama", "clip"): LoraConfig(4, 8.0, targets=("q_proj", "v_proj", "up_proj", "down_proj")),
}
DEFAULT = ("one process",)
LAYOUTS = ("one process", "TP2", "TP2+SP", "PP2", "CP2", "TP2 x PP2")


class Added(torch.nn.Module):
    """W -> W + scaling * B A."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())
        self.scaling = scaling

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scaling * self.b @ self.a


def judge(folder: Path, lora: LoraConfig, matrices: dict[str, torch.Tensor], batch: dict) -> dict[str, torch.Tensor]:
    """Logits, loss, and gradients by the names of our matrices."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    geometry = read_geometry_of(folder)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    places = {}
    for part, layer, one in lora.places(geometry):
        inside = {"language_model": "language_model.", "vision_tower": "vision_tower.", "projector": ""}[part]
        tail = hub_path(geometry, part, layer, one)
        (name,) = [name for name in linear if name.endswith(tail) and name.startswith(f"model.{inside}")]
        a, b = (matrices[weight_name(part, layer, one, which)] for which in "AB")
        scaling = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
        places[part, layer, one] = Added(a, b, scaling)
        torch.nn.utils.parametrize.register_parametrization(linear[name], "weight", places[part, layer, one])
    statistics = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    unshifted = torch.full_like(batch["labels"], -100)
    unshifted[:, 1:] = batch["labels"][:, :-1]
    output = model(
        input_ids=batch["tokens"], pixel_values=(batch["pixels"].float() / 255 - mean) / std, labels=unshifted
    )
    output.loss.backward()
    found = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for (part, layer, one), added in places.items():
        found[weight_name(part, layer, one, "A")] = added.a.grad
        found[weight_name(part, layer, one, "B")] = added.b.grad
    return found


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, str]], dict]:
    @functools.cache
    def make(case: tuple[str, str]) -> dict:
        (family, tower), lora = case, CASES[case]
        folder = tmp_path_factory.mktemp(family)
        tiny_models.make_tiny_llava(folder / "hf", family, tower=tower)
        convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
        LlavaFolder.of(folder / "checkpoint").write_lora(LoraRecord(lora, (), "nowhere", "release", ""))
        batch = make_batch(json.loads((folder / "checkpoint/llava/config.json").read_text()), seed=4)
        torch.save(batch | {"packed": pack(batch)}, folder / "batch.pt")
        generator = torch.Generator().manual_seed(9)
        shapes = lora.shapes(read_geometry_of(folder / "hf"))
        matrices = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        torch.save(matrices, folder / "adapters.pt")
        expected = judge(folder / "hf", lora, matrices, batch)
        return {"name": family, "folder": folder, "batch": batch, "packed": pack(batch), "expected": expected}

    return make


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]
)
def test_logits_loss_and_gradients_equal_transformers(
    layout: str, make_case: Callable[[tuple[str, str]], dict], tmp_path: Path
) -> None:
    cases = [make_case(case) for case in CASES]
    files = [
        {
            "checkpoint": str(case["folder"] / "checkpoint"),
            "batch": str(case["folder"] / "batch.pt"),
            "adapters": str(case["folder"] / "adapters.pt"),
            "result": str(tmp_path / case["name"]),
        }
        for case in cases
    ]
    plan = PARALLELISMS[layout] | {"weights": [], "cases": files}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    processes = plan["tensor"] * plan["pipeline"] * plan["context"]
    line = [interpreter.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    worker = [str(ROOT / "tests/model/parity_worker.py"), str(tmp_path / "plan.json")]
    done = subprocess.run([*line, *worker], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in cases:
        result = {}
        for stage in range(plan["pipeline"]):
            result |= torch.load(f"{tmp_path / case['name']}.{stage}", weights_only=True)
        compare(result, case, f"{case['name']} {layout}")


def whole(parts: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[TP, ...] of the ranks -> the matrix: put together where it was cut, else the same on all of them."""
    for axis in (0, 1):
        if parts.shape[axis + 1] != right.shape[axis]:
            return torch.cat(list(parts), dim=axis)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def compare(result: dict[str, torch.Tensor], case: dict, whose: str) -> None:
    expected = case["expected"]
    logits = expected["logits"][case["batch"]["tokens"] != 0]
    assert result.keys() == {f"{kind}{name}" for kind in ("", "packed_") for name in (*expected, "rows")}
    for kind, tokens in (("", case["batch"]["tokens"]), ("packed_", case["packed"]["tokens"])):
        difference = (result[f"{kind}logits"][tokens != 0] - logits).abs().max().item()
        assert difference <= 1e-4, f"{whose}: {kind}logits differ by {difference:.2e}"
        loss = result[f"{kind}loss"].item()
        assert abs(loss / expected["loss"].item() - 1) <= 1e-5, f"{whose}: {kind}loss {loss}, {expected['loss']}"
        for name in expected.keys() - {"logits", "loss"}:
            right = expected[name]
            assert right.abs().max() > 0, f"{whose}: {name} has no gradient"
            difference = (whole(result[f"{kind}{name}"], right) - right).abs().max() / right.abs().max()
            assert difference <= 1e-4, f"{whose}: gradient of {kind}{name} differs by {difference:.2e}"
