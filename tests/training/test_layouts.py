"""The same run under every layout: same data, same initial weights, same losses.

Tolerance 1e-4 relative over 20 iterations of AdamW in fp32: layouts sum in different orders, and Adam's division by the
root of the second moment magnifies that for gradients near zero; up to 2e-5 is seen.
"""

from pathlib import Path

import pytest

from tests.training.launching import Workspace, losses, run

LAYOUTS = {
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
    "recompute selective": {"AC": "sel"},
    "recompute full": {"AC": "full", "RECOMPUTE_LAYERS": 2},
    "recompute full of the tower, selective of the LLM": {"AC": "sel", "TOWER_AC": "full"},
}
# The default tests take one of each kind; logits, loss and gradient of the rest are compared in tests/model.
DEFAULT = ("TP2 + SP", "PP2", "PP2, interleaved", "DP2 + distributed optimizer")
ITERATIONS = 20


@pytest.fixture(scope="module")
def single_process(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process."""
    found = losses(run(workspace, tmp_path_factory.mktemp("single") / "out", TRAIN_ITERS=ITERATIONS))
    assert sorted(found) == list(range(1, ITERATIONS + 1))
    assert found[ITERATIONS] < 0.7 * found[1], "a run that does not learn proves little"
    return found


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]
)
def test_losses_equal_a_single_process(
    layout: str, workspace: Workspace, single_process: dict[int, float], tmp_path: Path
) -> None:
    found = losses(run(workspace, tmp_path / "out", TRAIN_ITERS=ITERATIONS, **LAYOUTS[layout]))
    assert sorted(found) == sorted(single_process)
    differences = {i: abs(found[i] / single_process[i] - 1) for i in found}
    worst = max(differences, key=differences.get)
    print(f"{layout}: largest relative difference {differences[worst]:.1e} at iteration {worst}")
    assert differences[worst] <= 1e-4, f"{layout}: {differences[worst]:.2e} at iteration {worst}"
