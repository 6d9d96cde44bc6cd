"""The list of mutants fits the code, and the program that runs them tells the killed from the surviving."""

import re
import subprocess
import sys

import pytest

from tests.conftest import COLLECTED
from tests.mutants import MUTANTS, Mutant
from tests.run_mutants import ROOT, MutantError, main, mutated, run

RUNNING_LAYERS = "tests/conversion/test_room.py::test_running_layers"
GEOMETRY = "megatron_patch/geometry.py"
FOUND = Mutant(
    "one layer too few", GEOMETRY, "else layers + 1 + feature_layer", "else layers + feature_layer", (RUNNING_LAYERS,)
)
EQUIVALENT = Mutant(
    "the same layers", GEOMETRY, "layers + 1 + feature_layer", "feature_layer + 1 + layers", (RUNNING_LAYERS,)
)
BROKEN = Mutant("no Python", GEOMETRY, "else layers + 1 + feature_layer", "else else", (RUNNING_LAYERS,))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_line_that_is_there_once(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    changed = mutated(mutant, text)
    lines = list(zip(text.splitlines(), changed.splitlines(), strict=True))
    assert sum(one != other for one, other in lines) == 1
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")


def test_mutants_are_many_and_their_tests_exist(request: pytest.FixtureRequest) -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    tests = sorted({test for mutant in MUTANTS for test in mutant.tests})
    collected = request.config.stash[COLLECTED]
    if not {test.partition("::")[0] for test in tests} <= {name.partition("::")[0] for name in collected}:
        words = [sys.executable, "-m", "pytest", "--collect-only", *tests]  # not the whole suite is being run
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        collected = done.stdout.splitlines()
    missing = [
        test
        for test in tests
        if not any(name == test or name.startswith((f"{test}[", f"{test}::")) for name in collected)
    ]
    assert not missing


@pytest.mark.slow
def test_what_survives_is_told(capsys: pytest.CaptureFixture) -> None:
    assert main(["--workers", "2"], [FOUND, EQUIVALENT, BROKEN]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^killed +\d+ s \| one layer too few \| {GEOMETRY} \| {RUNNING_LAYERS}$", printed, re.MULTILINE)
    assert re.search(r"^SURVIVED +\d+ s \| the same layers .*its tests passed$", printed, re.MULTILINE)
    assert re.search(r"^SURVIVED +\d+ s \| no Python .*pytest ended with \d", printed, re.MULTILINE)
    assert "3 mutants, 1 killed, 2 alive" in printed


def test_a_mutant_that_fits_no_more_is_refused(capsys: pytest.CaptureFixture) -> None:
    for old, times in (("no such line", 0), ("layers", r"\d+")):
        mutant = Mutant("gone", GEOMETRY, old, "pass", (RUNNING_LAYERS,))
        with pytest.raises(MutantError, match=rf"{old}' stands there {times} times, wanted once"):
            run([mutant])
        assert main([], [mutant]) == 1 and "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_tests_that_fail_without_a_fault_prove_nothing() -> None:
    absent = Mutant("unseen", FOUND.file, FOUND.old, FOUND.new, ("tests/conversion/test_room.py::test_absent",))
    with pytest.raises(MutantError, match="do not pass without a fault"):
        run([absent], workers=1)
