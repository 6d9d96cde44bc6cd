"""Imports point one way (DESIGN), and the house rules that a machine can check: ruff, shellcheck, no leftovers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"device", "patches", "model", "data", "training", "conversion"}
# Room -> other rooms it may import. Modules directly below megatron_patch: errors, geometry, model_sizes and
# tokenizer_files import nothing but the standard library when they are imported, and are free to all; `arguments` is
# an upper room like training.
FREE = {"errors", "geometry", "model_sizes", "tokenizer_files"}
MAY_IMPORT = {
    "training": {"model", "data", "device", "patches", "arguments"},
    "arguments": {"model", "data", "device", "patches", "training"},
    "model": {"device"},
    "data": {"device"},
    "device": {"patches"},
    "patches": set(),
    "conversion": set(),
    **{name: set() for name in FREE},
}
# Foreign packages that a room must do without. Conversion imports in a second, the data room's core needs no model.
MUST_NOT_IMPORT = {
    "conversion": {"megatron", "transformers"},
    "patches": {"transformers"},
    "data": {"megatron.training"},
    **{name: {"torch", "megatron", "transformers"} for name in FREE - {"checkpoint_files"}},
    "checkpoint_files": {"megatron", "transformers"},
}


def tracked(*patterns: str) -> list[Path]:
    """Files in version control, and new ones that will be, matching the patterns."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).is_file()]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute dotted names that a file imports, relative imports resolved, `from a import b` as a and a.b."""
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found |= {module} | {f"{module}.{name.name}" for name in node.names}
    return found


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(name: str) -> str | None:
    """`megatron_patch.data.image` -> `data`; None for other packages and for the bare package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "megatron_patch" and len(parts) > 1 else None


PRODUCT = tracked("megatron_patch/**.py")


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    names = imports(path)
    outer = {name for name in names if any(below(name, package) for package in ("examples", "toolkits", "tests"))}
    assert not outer, f"megatron_patch must not know {outer}"
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if room in MAY_IMPORT:
        rooms = {room_of(name) for name in names} & (ROOMS | set(MAY_IMPORT))
        assert rooms <= MAY_IMPORT[room] | FREE | {room}, f"{room} must not import {rooms - MAY_IMPORT[room]}"
    for package in MUST_NOT_IMPORT.get(room, ()):
        # Inside a function a lazy import costs nobody anything who does not call it.
        hits = {name for name in imports(path, top_level_only=True) if below(name, package)}
        assert not hits, f"{room} must import without {package}"


@pytest.mark.parametrize("folder", ["examples", "toolkits"])
def test_examples_and_toolkits_do_not_import_tests(folder):
    for path in tracked(f"{folder}/**.py"):
        assert not [name for name in imports(path) if below(name, "tests")], path


def test_the_import_reader_sees_wrong_arrows():
    """The check above must be able to fail: its reader resolves every form of import."""
    path = ROOT / "tests" / "test_architecture.py"
    assert {"ast", "pathlib", "pathlib.Path"} <= imports(path)
    assert room_of("megatron_patch.data.image") == "data" and room_of("torch.nn") is None


def test_ruff_finds_nothing():
    for words in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_shellcheck_finds_nothing():
    scripts = [*tracked("*.sh"), ROOT / ".ci/run"]
    command = [str(Path(sys.executable).parent / "shellcheck"), "-x", *map(str, scripts)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_machine_paths_and_no_leftover_marks():
    # Spelled in pieces so that this file does not find itself.
    marks = ["/" + "work/", "/" + "root/", "/" + "home/", "TO" + "DO", "FIX" + "ME", "XX" + "X"]
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{n}: {mark}" for n, line in lines for mark in marks if mark in line]
    assert not found, "\n".join(found)
