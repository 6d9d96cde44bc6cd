"""The benchmark of start-up: what it finds in a launcher's output, and the figures that it prints."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "toolkits/benchmark/benchmark_startup.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_startup", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_medians_and_ranges(tool: ModuleType) -> None:
    rows = tool.table({"one": [3.0, 1.0, 2.5], "another": [0.1]}, {"one": [4.0, 2.0, 3.5]}).splitlines()[2:]
    assert rows == ["| one | 2.50 | 1.00-3.00 | 3.50 |", "| another | 0.10 | 0.10-0.10 |  |"]


def test_cpu_seconds_are_those_of_all_processes_and_not_of_waiting(tool: ModuleType, tmp_path: Path) -> None:
    """A shell, whose first child has ended and whose second one is told off by the line of the first iteration."""
    work = "import time\nwhile time.process_time() < 0.4: pass\n"
    (tmp_path / "first.py").write_text(work)
    (tmp_path / "second.py").write_text(f"{work}time.sleep(0.5)\nprint(' iteration        1/', flush=True)\n")
    shell = f"{sys.executable} -S {tmp_path}/first.py; {sys.executable} -S {tmp_path}/second.py; true"
    commands = tool.Commands()
    commands.time_training("run", ["bash", "-c", shell], {})
    (name, (seconds,)) = commands.cpu.popitem()
    assert name == "run: to the first iteration" and seconds == pytest.approx(0.8, abs=0.15)
    commands.time("alone", ["bash", "-c", shell])
    assert commands.cpu["alone"] == [pytest.approx(0.8, abs=0.15)]


def test_the_parts_of_a_run_add_up(tool: ModuleType, tmp_path: Path) -> None:
    """A program that prints what Megatron prints, half a second between."""
    program = tmp_path / "program.py"
    lines = [
        " [2026-01-01 00:00:00] iteration        1/       1 | lm loss: 1",
        "  successfully saved checkpoint from 1",
    ]
    program.write_text(f"import time\nfor line in {lines!r}:\n    time.sleep(0.5)\n    print(line, flush=True)\n")
    commands = tool.Commands()
    commands.time_training("run", [sys.executable, program], {})
    parts = {name.removeprefix("run: "): seconds for name, (seconds,) in commands.seconds.items()}
    whole = parts.pop("all")
    assert list(parts) == ["to the first iteration", "from there to the saved checkpoint", "from there to the end"]
    assert sum(parts.values()) == pytest.approx(whole, abs=0.05) and whole > 1
    with pytest.raises(SystemExit, match="broken ended with exit code 3"):
        commands.time("broken", [sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.slow
def test_all_commands_are_measured(tool: ModuleType, tmp_path: Path) -> None:
    commands = tool.Commands()
    tool.measure(tmp_path, [1], commands)
    for name in ("1 process, fresh: to the first iteration", "1 process, resumed: from there to the saved checkpoint"):
        assert len(commands.seconds[name]) == 1
    assert (tmp_path / "answers/answers.jsonl").is_file() and (tmp_path / "loss.png").is_file()
