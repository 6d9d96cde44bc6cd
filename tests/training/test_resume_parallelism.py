"""A run that goes on under another parallelism: weights, optimizer, schedule, data and record counters of the run that
was never stopped; random state only with the same TP x PP, as the log then says.

Tolerance 6.7e-6 relative, ten times what is seen.
"""

import re
from pathlib import Path

import pytest

from tests.training.launching import Workspace, losses, run

ITERATIONS = 16
SETTINGS = {"TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": 8, "DO": "true"}
FSDP = {"FSDP": "full", "DO": "false"}
CHANGES = {
    "TP2 to one process": ({"TP": 2}, {}),
    "one process to PP2": ({}, {"PP": 2}),
    "DP2 to TP2": ({"NPROC_PER_NODE": 2}, {"TP": 2}),
    "PP2 to DP2": ({"PP": 2}, {"NPROC_PER_NODE": 2}),
    "TP2 x PP2 to CP2 x DP2": ({"TP": 2, "PP": 2}, {"CP": 2, "NPROC_PER_NODE": 4}),
    # the distributed optimizer's state is stored in another way than that of all others
    "FSDP to TP2": ({**FSDP, "NPROC_PER_NODE": 2}, {"TP": 2, "DO": "false"}),
    "TP2 to FSDP": ({"TP": 2, "DO": "false"}, {**FSDP, "NPROC_PER_NODE": 2}),
    "TP2 x FSDP to one process": ({**FSDP, "TP": 2, "NPROC_PER_NODE": 4}, {"DO": "false"}),
}
RECORDS = re.compile(r"records: kept .*")


@pytest.fixture(scope="module")
def whole(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process that is never stopped prints."""
    return run(workspace, tmp_path_factory.mktemp("whole") / "out", **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_under_another_layout(change: str, whole: str, workspace: Workspace, tmp_path: Path) -> None:
    before, after = CHANGES[change]
    # The first half ends by the iteration limit of Megatron's own, so that the schedule is that of the whole run.
    first = {**SETTINGS, **before}
    assert len(losses(run(workspace, tmp_path / "out", words=["--exit-interval", "8"], **first))) == 8
    printed = run(workspace, tmp_path / "out", **{**SETTINGS, **after})
    rest, expected = losses(printed), losses(whole)
    assert sorted(rest) == list(range(9, ITERATIONS + 1))
    assert RECORDS.findall(printed) == RECORDS.findall(whole)[8:], "the record counters do not go on"
    other_random_state = any(before.get(name, 1) != after.get(name, 1) for name in ("TP", "PP"))
    assert ("RNG state will be ignored" in printed) == other_random_state
    worst = max(abs(rest[step] / expected[step] - 1) for step in rest)
    print(f"{change}: largest relative difference {worst:.1e}")
    assert worst <= 6.7e-6
