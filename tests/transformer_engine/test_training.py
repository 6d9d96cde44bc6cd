"""Runs with Transformer Engine's layers, its own Python over a stand-in of its compiled module, on a CPU.

Launcher, arguments, data and optimizer are those of a run; the arguments of the device are a GPU's (fused rotary
embedding, gradient accumulation in the weight's product).  The attention is Transformer Engine's unfused one, also for
packed rows (thd, padding_causal): cuDNN's, flash-attn's and with them context parallelism are out of a CPU's reach,
and so is fp8.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.checkpoint_files import read_metadata
from megatron_patch.conversion import convert_to_megatron
from megatron_patch.conversion.torch_dist import CheckpointReader
from tests import tiny_models
from tests.training.launching import Workspace, losses
from tests.training.launching import run as run_local
from tests.training.test_freezing import PARTS, same_bytes, weights
from tests.transformer_engine.launching import run

ITERATIONS = 20
MICRO_BATCHES = 4  # GLOBAL_BATCH_SIZE 8 in BATCH_SIZE 2
CASES = {
    "all trained": {},
    "stage 1": {"FREEZE_LANGUAGE_MODEL": "true", "FREEZE_VISION_TOWER": "true", "CONVERSATION_TEMPLATE": "plain"},
    "packed": {"PACKING": "true", "BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 4},
    # on what the norm that is fused into the linear layer returns
    "adapters": {"LORA_RANK": 4, "LORA_ALPHA": 32, "LORA_PARTS": "language_model,vision_tower"},
}
LAYOUTS = {
    "TP1": {},
    "TP2 + SP": {"TP": 2},
    "PP2": {"PP": 2},
    "DP2 + distributed optimizer": {"NPROC_PER_NODE": 2, "DO": "true"},
    "FSDP": {"NPROC_PER_NODE": 2, "FSDP": "full"},
    "recompute selective": {"AC": "sel"},
    "recompute full": {"AC": "full", "RECOMPUTE_LAYERS": 2},
}
ROWS = [("all trained", layout) for layout in LAYOUTS if layout != "FSDP"] + [
    *(("stage 1", "TP1"), ("stage 1", "TP2 + SP"), ("packed", "TP1"), ("packed", "TP2 + SP")),
    *(("adapters", "TP1"), ("adapters", "TP2 + SP")),
    *(("all trained", "FSDP"), ("adapters", "FSDP")),
]
DEFAULT = [("packed", "TP1")]
# Relative, of fp32: ten times what is seen; sums are taken in other orders, and Adam's division magnifies that.
SAME = 1e-5
# O x I of the projector's and of the decoder's weights; its output layer is Megatron's own (unfused_weight_gradients).
PROJECTOR = ("64 x 48", "64 x 64")
DECODER = ("128 x 64", "64 x 64", "352 x 64", "64 x 176")
TOWER = ("144 x 48", "48 x 48", "96 x 48", "48 x 96")
DECODER_LAYERS = 4
FEW = {"TRAIN_ITERS": 2, "LR_WARMUP_ITERS": 0, "EVAL_ITERS": 0}
STILL = FEW | {"TRAIN_ITERS": 1, "SAVE_INTERVAL": 1, "LR": "1e-30", "MIN_LR": 0, "WEIGHT_DECAY": 0}


@pytest.fixture(scope="module")
def of_local_layers(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[int, float]]:
    """Losses of one process with the local layers by case, each run once."""
    known: dict[str, dict[int, float]] = {}

    def find(case: str, **changes: object) -> dict[int, float]:
        name = f"{case} {changes}"
        if name not in known:
            output = tmp_path_factory.mktemp("local") / "out"
            known[name] = losses(run_local(workspace, output, TRAIN_ITERS=ITERATIONS, **CASES[case], **changes))
        return known[name]

    return find


def worst(found: dict[int, float], expected: dict[int, float]) -> float:
    """Largest relative difference."""
    assert sorted(found) == sorted(expected) == list(range(1, ITERATIONS + 1))
    return max(abs(found[iteration] / expected[iteration] - 1) for iteration in found)


def products(output: Path, rank: int = 0) -> Counter[str]:
    """How often a rank computed which product of matrices in its layers of Transformer Engine."""
    return Counter(json.loads((output.parent / f"{output.name}.products" / f"{rank}.json").read_text()))


def of_kind(kind: str, computed: Counter[str]) -> dict[str, int]:
    """O x I -> calls, of one kind of product."""
    return {name.removeprefix(f"{kind} "): calls for name, calls in computed.items() if name.startswith(f"{kind} ")}


@pytest.mark.parametrize(
    ("case", "layout"), [pytest.param(*row, marks=() if row in DEFAULT else pytest.mark.slow) for row in ROWS]
)
def test_losses_equal_those_of_the_local_layers(
    case: str, layout: str, workspace: Workspace, files: Path, of_local_layers: Callable, tmp_path: Path
) -> None:
    """And gradient_accumulation_fusion stays on for these layers, though the output layer, Megatron's, does without."""
    expected = of_local_layers(case)
    assert min(expected.values()) < 0.95 * expected[1], "a run that does not learn proves little"
    settings = {**CASES[case], **LAYOUTS[layout]}
    found = losses(run(workspace, tmp_path / "out", files, TRAIN_ITERS=ITERATIONS, **settings))
    difference = worst(found, expected)
    print(f"{case}, {layout}: largest relative difference {difference:.1e}")
    assert difference <= SAME
    computed = products(tmp_path / "out")
    # FSDP keeps no buffer into which gradients could be summed
    way, other = "fused weight gradient", "weight gradient"
    if layout == "FSDP":
        way, other = other, way
    assert of_kind(way, computed) and not of_kind(other, computed)
    assert computed["layernorm_fwd"] and computed["rmsnorm_fwd"] and computed["fused_rope_forward"]
    assert bool(computed["convert_thd_to_bshd"]) == (case == "packed")  # by the unfused attention, for packed rows


def test_a_frozen_weight_has_no_gradient_computed(workspace: Workspace, files: Path, tmp_path: Path) -> None:
    """Stage 1: weight gradients of the projector alone, input gradients through the decoder, none of the tower."""
    run(workspace, tmp_path / "out", files, **CASES["stage 1"], **FEW)
    computed, passes = products(tmp_path / "out"), FEW["TRAIN_ITERS"] * MICRO_BATCHES
    assert of_kind("fused weight gradient", computed) == dict.fromkeys(PROJECTOR, passes)
    assert of_kind("weight gradient", computed) == {}
    # the decoder's linear_proj and the projector's second layer are both 64 x 64; before the projector nothing trains
    back = dict.fromkeys(DECODER, DECODER_LAYERS * passes) | {"64 x 64": (DECODER_LAYERS + 1) * passes}
    assert of_kind("input gradient", computed) == back
    assert of_kind("forward", computed).keys() == {*DECODER, *TOWER, *PROJECTOR}


@pytest.mark.slow
def test_bf16(workspace: Workspace, files: Path, of_local_layers: Callable, tmp_path: Path) -> None:
    """Weights in bf16 take both kinds of layers equally far from fp32; between them lies rounding alone.

    A number rounded to bf16 is wrong by at most 2^-9 of it, so a loss of the one kind differs from the other's by 2^-8.
    """
    exact, local = of_local_layers("all trained"), of_local_layers("all trained", PR="bf16")
    found = losses(run(workspace, tmp_path / "out", files, TRAIN_ITERS=ITERATIONS, PR="bf16"))
    print(
        f"bf16, relative: local layers from fp32 {worst(local, exact):.1e}, these {worst(found, exact):.1e}, "
        f"these from the local ones {worst(found, local):.1e}"
    )
    assert worst(local, exact) > 2**-8, "as in fp32, so not bf16"
    assert worst(found, local) <= 2**-8


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tower"), [("qwen2", "clip"), ("qwen3", "siglip"), ("llama3", "siglip_last")])
def test_other_families(family: str, tower: str, files: Path, workspace: Workspace, tmp_path: Path) -> None:
    """Biases of queries, keys and values; norms of heads; scaled rotary embedding; a tower without class token."""
    tiny_models.make_tiny_llava(tmp_path / "hf", family, tower=tower)
    convert_to_megatron(tmp_path / "hf", None, tmp_path / "checkpoint", precision="fp32", model_size="tiny")
    own = Workspace(tmp_path / "checkpoint", workspace.dataset)
    settings = {"TRAIN_ITERS": ITERATIONS, "CONVERSATION_TEMPLATE": "plain"}
    expected = losses(run_local(own, tmp_path / "local", **settings))
    found = losses(run(own, tmp_path / "out", files, **settings))
    difference = worst(found, expected)
    print(f"{family}, {tower}: largest relative difference {difference:.1e}")
    assert difference <= SAME


# ---------------------------------------------------------------- checkpoints


def stored(iteration: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The model's tensors, name -> size, and the names of its extra states."""
    with CheckpointReader(iteration) as reader:
        sizes = {name: tuple(entry.size) for name, entry in reader.tensors.items() if name.startswith(PARTS)}
    names = read_metadata(iteration).state_dict_metadata
    return sizes, {name.partition("/")[0] for name in names if "_extra_state" in name}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP1", "TP2 + SP"])
def test_a_checkpoint_goes_to_these_layers_and_back(
    layout: str, workspace: Workspace, files: Path, tmp_path: Path
) -> None:
    """Same names, sizes and bytes: written by local layers, by these, and by local ones again.

    A learning rate of 1e-30 leaves every fp32 weight as it is, and has all of them saved.
    """
    kept = STILL | LAYOUTS[layout]
    run_local(workspace, tmp_path / "local", **FEW | {"SAVE_INTERVAL": 2} | LAYOUTS[layout])
    first = Workspace(tmp_path / "local/checkpoint", workspace.dataset)
    run(first, tmp_path / "engine", files, **kept)
    second = Workspace(tmp_path / "engine/checkpoint", workspace.dataset)
    run_local(second, tmp_path / "again", **kept)
    iterations = [
        tmp_path / name
        for name in ("local/checkpoint/iter_0000002", "engine/checkpoint/iter_0000001", "again/checkpoint/iter_0000001")
    ]
    before, *others = map(weights, iterations)
    for after in others:
        assert before.keys() == after.keys()
        assert [name for name in before if not same_bytes(before[name], after[name])] == []
    (of_local, extra_of_local), (of_engine, extra_of_engine), _ = map(stored, iterations)
    assert of_local == of_engine
    assert extra_of_engine - extra_of_local == {
        f"{norm}._extra_state" for norm in ("language_model.decoder.final_layernorm", "vision_model.ln_pre")
    }
    assert extra_of_local <= extra_of_engine


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["false", "true"], ids=["whole", "distributed"])
@pytest.mark.parametrize("adam", ["torch's Adam", "FusedAdam"])
def test_a_run_of_local_layers_goes_on_with_these_and_back(
    adam: str, optimizer: str, workspace: Workspace, files: Path, of_local_layers: Callable, tmp_path: Path
) -> None:
    """Weights, Adam's state and data position: the losses are those of a run that was never stopped.

    In quarters: local layers, these, these with what they have saved, local layers again.  The step counts in every
    one of them, and FusedAdam's is kept elsewhere than torch's.
    """
    settings = {"TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": 5, "DO": optimizer}
    fused, output = adam == "FusedAdam", tmp_path / "out"
    printed = run_local(workspace, output, words=["--exit-interval", "5"], **settings)
    for stop in ("10", "15"):
        printed += run(workspace, output, files, ("--exit-interval", stop), fused, **settings)
    printed += run_local(workspace, output, **settings)
    difference = worst(losses(printed), of_local_layers("all trained"))
    print(f"{adam}, {optimizer=}: largest relative difference {difference:.1e}")
    assert difference <= SAME
