"""The summary of a run that saved nothing; of those that did: test_callbacks.py."""

from pathlib import Path

import pytest

from tests.programs import in_warm_process

PROGRAM = """
import sys
from pathlib import Path
from megatron_patch import device
device.install()
from megatron_patch.step_flop import Work
from megatron_patch.training.record_counters import Totals
from megatron_patch.training.summary import Summary
from megatron_patch.training.timer import Timer
summary = Summary.of(
    ending="stopped before the end", iteration=3, train_iters=10, totals=Totals({}, Work(), 0), watch=Timer(),
    rates=None, loss=None, validation_loss=None, save=sys.argv[1] or None, stage_1=True, model_size="tiny",
    precision="fp32", output=Path("out"),
)
print(summary.checkpoint, *summary.next, sep=chr(10))
"""


@pytest.mark.parametrize("folder", ["", "empty", "missing"])
def test_where_nothing_was_saved_nothing_goes_on(tmp_path: Path, folder: str) -> None:
    """A run without --save, one that was stopped before it saved."""
    (tmp_path / "empty").mkdir()
    said = in_warm_process(PROGRAM, folder and tmp_path / folder).splitlines()
    assert said == ["None", "the same command again starts at iteration 1, for nothing was saved"]
