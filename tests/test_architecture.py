"""Imports point one way (DESIGN), and the house rules that a machine can check: ruff, shellcheck, no leftovers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Package or module below megatron_patch -> what it may import of the others.  A package's own modules are free to it;
# the longest name that fits a module is its room.  Modules directly below megatron_patch in FREE import nothing but
# the standard library (checkpoint_files: torch) when they are imported, and may be imported by all.
FREE = {
    *("errors", "geometry", "language_models", "vision_towers", "model_sizes", "tokenizer_files", "checkpoint_files"),
    "object_storage",
    *("sight", "ray_cluster", "cpp_compiler"),
    *(
        "atomic_files",
        "file_window",
        "weight_names",
        "llava_folder",
        "lora",
        "step_flop",
        "step_balance",
        "step_time",
        "length_mix",
        "llava_kinds",
        "tile_plan",
        "device_cards",
        "memory",
        "parent_process",
    ),
}
LOADING = {"data.loading", "data"}
# What asks and judges, without the engines: training does so too.
ASKING = {f"evaluation.{name}" for name in ("benchmarks", "metrics", "question", "source", "report")}
PROMPTS = {"inference.interface", "inference.prompt"}
ROOMS = {
    "arguments": {"launch"},
    "launch": {"device"},
    "kernels": set(),
    "patches": {"kernels"},
    "device": {"patches", "kernels"},
    "model": {"device", "kernels"},
    "conversion": {"data"},  # the words of a conversation, for the chat template
    "data": set(),  # what preparation and loading share imports neither
    "data.preparation": {"data"},
    "data.loading": {"data"},
    "training": {"launch", "model", *LOADING, "device", "patches", "arguments", *ASKING, *PROMPTS},
    "training.load_model": {"training", "model", "device"},  # a room to inference, which needs no more of training
    "inference": {
        *("arguments", "launch", "model", *LOADING, "data.preparation", "device", "patches", "training.load_model"),
        *PROMPTS,
    },
    **{name: {"arguments", "launch", *LOADING, *PROMPTS} for name in PROMPTS},
    "evaluation": {"inference", "launch", "data", *PROMPTS, *ASKING},
    **{name: {"inference.interface", "data", *ASKING} for name in ASKING},
    **{name: set() for name in FREE},
}
# Foreign packages that a room must do without. Conversion imports in a second, the data room's core needs no model.
MUST_NOT_IMPORT = {
    "conversion": {"megatron", "transformers"},
    "kernels": {"megatron", "transformers"},
    "patches": {"transformers"},
    "data": {"megatron", "torch", "transformers"},
    "data.preparation": {"megatron.training", "megatron.core", "torch", "transformers"},
    "data.loading": {"megatron.training", "megatron.core", "transformers"},
    "launch": {"torch", "megatron", "transformers"},
    "arguments": {"torch", "megatron", "transformers"},
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
    """`megatron_patch.data.loading.blend` -> `data.loading`; None for other packages and for the bare package."""
    parts = name.split(".")
    if parts[0] != "megatron_patch":
        return None
    inner = ".".join(parts[1:])
    return max((room for room in ROOMS if below(inner, room)), key=len, default=None)


def wrong_arrows(room: str | None, names: set[str]) -> set[str]:
    """Rooms that `room` must not import although `names` are of them."""
    if room is None:
        return set()
    return {found for name in names if (found := room_of(name))} - ROOMS[room] - FREE - {room}


PRODUCT = tracked("megatron_patch/**.py")


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    names = imports(path)
    outer = {name for name in names if any(below(name, package) for package in ("examples", "toolkits", "tests"))}
    assert not outer, f"megatron_patch must not know {outer}"
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    assert room or module == "megatron_patch", f"{path} belongs to no room; give it its arrows in ROOMS"
    at_start = imports(path, top_level_only=True)
    wrong = wrong_arrows(room, names)
    assert not wrong, f"{room} must not import {wrong}"
    for package in MUST_NOT_IMPORT.get(room, ()):
        # Inside a function a lazy import costs nobody anything who does not call it.
        hits = {name for name in at_start if below(name, package)}
        assert not hits, f"{room} must import without {package}"


@pytest.mark.parametrize(
    ("room", "name"),
    [
        ("data.preparation", "megatron_patch.data.loading.dataset"),
        ("data.loading", "megatron_patch.data.preparation.pipeline"),
        ("data", "megatron_patch.data.loading.config.DataConfig"),
        ("data", "megatron_patch.data.preparation"),
        ("training", "megatron_patch.data.preparation.shard_writer"),
        ("training", "megatron_patch.conversion"),
        ("model", "megatron_patch.data.image"),
        ("data.loading", "megatron_patch.model.llava"),
        ("inference", "megatron_patch.training.pretrain"),
        ("training", "megatron_patch.inference.engine"),
        ("launch", "megatron_patch.training.config"),
        ("checkpoint_files", "megatron_patch.conversion.table"),
        ("evaluation", "megatron_patch.training.config"),
        ("inference", "megatron_patch.evaluation.run"),
        ("training", "megatron_patch.evaluation.run"),
        ("evaluation.question", "megatron_patch.inference.engine"),
    ],
)
def test_a_wrong_arrow_is_seen(room, name):
    assert wrong_arrows(room, {name})


@pytest.mark.parametrize("folder", ["examples", "toolkits"])
def test_examples_and_toolkits_do_not_import_tests(folder):
    for path in tracked(f"{folder}/**.py"):
        assert not [name for name in imports(path) if below(name, "tests")], path


def test_the_import_reader_sees_wrong_arrows():
    """The check above must be able to fail: its reader resolves every form of import."""
    path = ROOT / "tests" / "test_architecture.py"
    assert {"ast", "pathlib", "pathlib.Path"} <= imports(path)
    assert room_of("megatron_patch.data.image") == "data" and room_of("torch.nn") is None
    assert room_of("megatron_patch.data.loading.blend.Part") == "data.loading"


def test_ruff_finds_nothing():
    for words in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_shellcheck_finds_nothing():
    scripts = [*tracked("*.sh", "*.bash"), ROOT / ".ci/run"]
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
