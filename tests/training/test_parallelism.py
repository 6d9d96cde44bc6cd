"""The same run under every parallelism: same data, same initial weights, same losses.

Tolerance 7e-6 relative over 20 iterations of AdamW in fp32, ten times what is seen: sums are taken in other orders, and
Adam's division by the root of the second moment magnifies that for gradients near zero.

`bash tests/run_tests.sh --all tests/training/test_parallelism.py -s` prints the whole table.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.launching import Workspace, losses, run

ITERATIONS = 20
ONE_PROCESS = {
    "all trained": {},
    "stage 1": {"FREEZE_LANGUAGE_MODEL": "true", "FREEZE_VISION_TOWER": "true", "CONVERSATION_TEMPLATE": "plain"},
    "stage 2": {"FREEZE_VISION_TOWER": "true", "PADDING_FREE": "false"},  # the others hold records in one row
    "packed": {"PACKING": "true", "BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 4},
    # Adam divides a gradient by its own size, and clipping by its norm: of a wrong factor neither would show anything
    "SGD without clipping": {"CLIP_GRAD": 0, "LR": "1e-2", "words": ["--optimizer", "sgd"]},
}
PARALLELISMS = {
    "TP2 + SP": {"TP": 2},
    "PP2": {"PP": 2},
    "PP2, uneven": {"PP": 2, "FIRST_STAGE_LAYERS": 1},
    "PP2, interleaved": {"PP": 2, "VIRTUAL_STAGES": 2},
    "CP2": {"CP": 2},
    "DP2": {"NPROC_PER_NODE": 2},
    "DP2 + distributed optimizer": {"NPROC_PER_NODE": 2, "DO": "true"},
    "TP2 x PP2": {"TP": 2, "PP": 2},
    "TP2 x DP2 + distributed optimizer": {"TP": 2, "NPROC_PER_NODE": 4, "DO": "true"},
    "CP2 x TP2": {"CP": 2, "TP": 2},
    "FSDP": {"NPROC_PER_NODE": 2, "FSDP": "full"},
    "FSDP grad": {"NPROC_PER_NODE": 2, "FSDP": "grad"},
    "FSDP, recompute full": {"NPROC_PER_NODE": 2, "FSDP": "full", "AC": "full"},
    "FSDP over 4": {"NPROC_PER_NODE": 4, "FSDP": "full"},
    "TP2 x FSDP": {"TP": 2, "NPROC_PER_NODE": 4, "FSDP": "full"},
    "CP2 x FSDP": {"CP": 2, "NPROC_PER_NODE": 4, "FSDP": "full"},
    "recompute selective": {"AC": "sel"},
    "recompute full": {"AC": "full", "RECOMPUTE_LAYERS": 2},
    "recompute full of the tower, selective of the LLM": {"AC": "sel", "TOWER_AC": "full"},
}
OF_OTHERS = ("TP2 + SP", "PP2", "CP2", "DP2 + distributed optimizer", "TP2 x PP2", "FSDP")
ROWS = [("all trained", parallelism) for parallelism in PARALLELISMS] + [
    (case, parallelism) for case in ("stage 1", "stage 2", "packed") for parallelism in OF_OTHERS
]
ROWS += [("SGD without clipping", "DP2"), ("SGD without clipping", "FSDP"), ("SGD without clipping", "TP2 x FSDP")]
# The default tests take one of each kind; logits, loss and gradient of the rest are compared in tests/model.
DEFAULT = [
    ("all trained", "DP2 + distributed optimizer"),
    *(("stage 2", "PP2"), ("packed", "CP2")),
]


@pytest.fixture(scope="module")
def of_one_process(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, float]]:
    """Losses of one process by case, each run once."""
    known: dict[str, dict[int, float]] = {}

    def find(case: str) -> dict[int, float]:
        if case not in known:
            output = tmp_path_factory.mktemp("single") / "out"
            known[case] = losses(run(workspace, output, TRAIN_ITERS=ITERATIONS, **ONE_PROCESS[case]))
        return known[case]

    return find


@pytest.mark.parametrize(
    ("case", "parallelism"), [pytest.param(*row, marks=() if row in DEFAULT else pytest.mark.slow) for row in ROWS]
)
def test_losses_equal_a_single_process(
    case: str, parallelism: str, workspace: Workspace, of_one_process: Callable[[str], dict[int, float]], tmp_path: Path
) -> None:
    alone = of_one_process(case)
    assert sorted(alone) == list(range(1, ITERATIONS + 1))
    assert min(alone.values()) < 0.95 * alone[1], "a run that does not learn proves little"
    settings = {**ONE_PROCESS[case], **PARALLELISMS[parallelism]}
    found = losses(run(workspace, tmp_path / "out", TRAIN_ITERS=ITERATIONS, **settings))
    assert sorted(found) == sorted(alone)
    differences = {i: abs(found[i] / alone[i] - 1) for i in found}
    worst = max(differences, key=differences.get)
    print(f"{case}, {parallelism}: largest relative difference {differences[worst]:.1e} at iteration {worst}")
    assert differences[worst] <= 7e-6, f"{case}, {parallelism}: {differences[worst]:.2e} at iteration {worst}"


def test_padding_is_left_out_without_a_trace(workspace: Workspace, tmp_path: Path) -> None:
    """The default against rows that are padded to the longest record; the losses may be equal to the last digit."""
    by_default = run(workspace, tmp_path / "default", TRAIN_ITERS=ITERATIONS)
    printed = run(workspace, tmp_path / "padded", TRAIN_ITERS=ITERATIONS, PADDING_FREE="false")
    assert re.search(r"padding_free \.+ True", by_default) and re.search(r"padding_free \.+ False", printed)
    found, padded = losses(by_default), losses(printed)
    assert found.keys() == padded.keys()
    assert max(abs(found[i] / padded[i] - 1) for i in padded) <= 7e-6
