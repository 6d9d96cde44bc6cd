"""Our model against transformers' LlavaForConditionalGeneration in fp32, on random tiny weights.

Each batch goes through once in rows of its own and once packed into a single row; the judge sees rows.  Compared are
the logits of every token, the loss, and the gradients of WEIGHTS.

Tolerances.  Logits 1e-4 absolute: they are sums of some thousand products of numbers near 1, whose order differs
between kernels and tensor-parallel ranks.  Loss 1e-5 relative.  Gradients 1e-4 relative to their largest entry.
"""

import functools
import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.conversion.table import Row, table_of_weights
from megatron_patch.conversion.transforms import QueryKeyValue
from megatron_patch.geometry import VOCABULARY_STEP, read_geometry_of
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

EMBEDDING = "language_model.embedding.word_embeddings.weight"
# Weights whose gradients are compared, where a model has them: of every part, of cut and of whole ones.
WEIGHTS = (
    EMBEDDING,
    "language_model.decoder.layers.0.self_attention.linear_qkv.weight",
    "language_model.decoder.layers.0.self_attention.linear_qkv.bias",
    "language_model.decoder.layers.0.self_attention.q_layernorm.weight",
    "language_model.decoder.layers.0.mlp.linear_fc1.weight",
    "language_model.decoder.layers.0.mlp.linear_fc2.weight",
    "language_model.decoder.final_layernorm.weight",
    "language_model.output_layer.weight",
    "vision_model.conv1.weight",
    "vision_model.decoder.layers.0.self_attention.linear_qkv.weight",
    "vision_projection.encoder.linear_fc1.weight",
    "vision_projection.encoder.linear_fc2.bias",
    "image_newline.weight",
)


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
    """Logits, loss and all gradients (under their hub names) of the judge."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    statistics = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    return forward_and_backward(model, batch, pixel_values=(batch["pixels"].float() / 255 - mean) / std)


def forward_and_backward(model: torch.nn.Module, batch: dict, **images: object) -> dict[str, torch.Tensor]:
    """Logits, loss and all gradients of transformers' model; `images`: its arguments for them."""
    # their labels stand at the token itself, ours one position before it
    unshifted = torch.full_like(batch["labels"], -100)
    unshifted[:, 1:] = batch["labels"][:, :-1]
    output = model(input_ids=batch["tokens"], labels=unshifted, **images)
    output.loss.backward()
    result = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        result[hub_name(name)] = parameter.grad
    return result


def hub_name(name: str) -> str:
    """Of a parameter of transformers' model, as the table of weights has it."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name == "model.image_newline":
        return "image_newline"
    part, rest = name.removeprefix("model.").split(".", 1)
    inside = {"language_model": "model.", "vision_tower": "vision_model."}.get(part, "")
    return f"{part}.{inside}{rest.removeprefix('vision_model.')}"


def gradient_parts(row: Row, grads: list[torch.Tensor], degree: int) -> torch.Tensor:
    """Gradients of one layer's hub tensors -> [degree, ...], the part of each tensor-parallel rank."""
    transform, axis = row.transform, row.transform.tensor_parallel_axis
    if axis is None:
        return transform.join(grads).expand(degree, *row.joined_shape)
    if row.key.endswith(("word_embeddings.weight", "output_layer.weight")):
        (grad,) = grads
        step = VOCABULARY_STEP * degree
        grads = [F.pad(grad, (0, 0, 0, -len(grad) % step))]  # the padding learns nothing
    if isinstance(transform, QueryKeyValue):
        transform = QueryKeyValue(transform.heads // degree, transform.groups // degree)
    cut = [grad.chunk(degree, dim=axis) for grad in grads]
    return torch.stack([transform.join([pieces[rank] for pieces in cut]) for rank in range(degree)])


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """Of a family, once: the judge's numbers, a checkpoint converted from the same folder, a batch."""
    assert set(CASES) == {*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES}
    assert set(CASES.values()) == set(tiny_models.TOWERS)

    @functools.cache
    def make(family: str) -> dict:
        folder = tmp_path_factory.mktemp(family)
        tiny_models.make_tiny_llava(folder / "hf", family, tower=CASES[family])
        convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
        seed = list(CASES).index(family)
        batch = make_batch(json.loads((folder / "checkpoint/llava/config.json").read_text()), seed)
        packed = pack(batch)
        torch.save(batch | {"packed": packed}, folder / "batch.pt")
        expected = transformers_result(folder / "hf", batch)
        return {"family": family, "folder": folder, "batch": batch, "packed": packed, "expected": expected}

    return make


def fits(family: str, parallelism: dict) -> bool:
    """9 heads in 3 groups can be cut by 3 alone, the others by 2 alone.

    Cuts of the sequence are the same for all families, so those parallelisms take one of each kind.
    """
    if parallelism["context"] > 1 or parallelism["sequence_parallel"]:
        return family in (*tiny_models.FAMILIES, "qwen3")
    return parallelism["tensor"] == 1 or (parallelism["tensor"] == 3) == (family == "smollm2")


FIRST = "mistral"  # goes first, by itself: what is wrong with all of them shows in seconds
DEFAULT = ("one process", "TP2+SP")
RUNS = [("one process", (FIRST,)), ("one process", tuple(family for family in CASES if family != FIRST))]
RUNS += [(name, tuple(CASES)) for name in PARALLELISMS if name != "one process"]


@pytest.mark.parametrize(
    ("parallelism", "families"),
    [pytest.param(*run, marks=() if run[0] in DEFAULT else pytest.mark.slow) for run in RUNS],
    ids=[f"{name}, {families[0]}" for name, families in RUNS],
)
def test_logits_loss_and_gradients_equal_transformers(
    parallelism: str, families: tuple[str, ...], make_case: Callable[[str], dict], tmp_path: Path
) -> None:
    cases = [make_case(family) for family in families if fits(family, PARALLELISMS[parallelism])]
    plan = PARALLELISMS[parallelism] | {"weights": WEIGHTS}
    run_cases(plan, cases, tmp_path, parallelism)


def run_cases(plan: dict, cases: list[dict], tmp_path: Path, parallelism: str) -> None:
    """Start the worker's processes on a plan, and compare() what each case gave."""
    folders = {case["family"]: case["folder"] for case in cases}
    told = [
        {"checkpoint": f"{folder}/checkpoint", "batch": f"{folder}/batch.pt", "result": str(tmp_path / family)}
        for family, folder in folders.items()
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"cases": told}))
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
        compare(result, case, plan, f"{case['family']} {parallelism}")


def compare(result: dict[str, torch.Tensor], case: dict, plan: dict, whose: str) -> None:
    """One family's result with the judge's numbers."""
    expected, logits = case["expected"], case["expected"]["logits"][case["batch"]["tokens"] != 0]
    assert logits.std() > 0.3, "flat logits prove nothing"
    geometry = read_geometry_of(case["folder"] / "checkpoint/llava")
    rows = {row.key: row for row in table_of_weights(geometry)}
    if (
        geometry.language.tied_embeddings and plan["pipeline"] > 1
    ):  # first and last stage have their shares of one weight
        for kind in ("", "packed_"):
            result[f"{kind}{EMBEDDING}"] += result.pop(f"{kind}language_model.output_layer.weight")
    wanted = {"logits", "loss", "rows"} | {name for name in WEIGHTS if name.replace(".0.", ".") in rows}
    assert result.keys() == {f"{kind}{name}" for kind in ("", "packed_") for name in wanted}
    for kind, tokens in (("", case["batch"]["tokens"]), ("packed_", case["packed"]["tokens"])):
        difference = (result[f"{kind}logits"][tokens != 0] - logits).abs().max().item()
        assert difference <= 1e-4, f"{whose}: {kind}logits differ by {difference:.2e}"
        loss = result[f"{kind}loss"].item()
        assert abs(loss / expected["loss"].item() - 1) <= 1e-5, f"{whose}: {kind}loss {loss}, {expected['loss']}"
        # behind the last layer's attention labelled positions alone, but for ranks that hold a part of each record
        whole, labelled = tokens.numel() // plan["tensor"], int((case["batch"]["labels"] != -100).sum())
        assert result[f"{kind}rows"].item() == (whole if plan["sequence_parallel"] else labelled)
        for name in wanted - {"logits", "loss", "rows"}:
            row = rows[name.replace(".0.", ".")]
            hub = [expected[part.name.format(layer=0)] for part in row.parts]
            right = gradient_parts(row, hub, plan["tensor"])
            assert right.abs().max() > 0, f"{whose}: {name} has no gradient"
            difference = ((result[f"{kind}{name}"] - right).abs().max() / right.abs().max()).item()
            assert difference <= 1e-4, f"{whose}: gradient of {kind}{name} differs by {difference:.2e}"
