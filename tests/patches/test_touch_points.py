"""Megatron is assigned to in one place, as listed there; a symbol that is gone is one sentence."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_patch import patches
from megatron_patch.errors import UserError
from megatron_patch.patches import touch_points
from megatron_patch.patches.touch_points import TOUCH_POINTS, Layer, TouchPoint
from tests.programs import in_new_process, in_warm_process
from tests.test_architecture import ROOT, tracked

THE_PLACE = ROOT / "megatron_patch/patches/touch_points.py"
STAND_INS = ROOT / "megatron_patch/device/cpu.py"  # of torch, put there by name; it knows nothing of Megatron
PRODUCT = tracked("megatron_patch/**.py", "examples/**.py", "toolkits/**.py")
# every module of torch's has a `forward`, which one of our own may be given
LISTED_NAMES = {point.symbol.rsplit(".", 1)[-1] for point in TOUCH_POINTS} - {"forward"}
LOOKUPS = {"getattr", "import_module", "reduce", "vars"}
ASSIGNING_CALLS = {"setattr", "delattr", "__setattr__", "__delattr__"}


def is_megatron(node: ast.expr, known: set[str]) -> bool:
    """Is this expression a module of Megatron, or something looked up in one?  `known`: names that are."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("sys.modules"):
            return True  # whichever module it is
        node = node.value
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).split(".")[-1] in LOOKUPS and any(is_megatron(arg, known) for arg in node.args)
    if isinstance(node, ast.Tuple | ast.List):
        return any(is_megatron(element, known) for element in node.elts)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.startswith("megatron.")
    return isinstance(node, ast.Name) and node.id in known


def megatron_names(tree: ast.Module) -> set[str]:
    """Names of a file that stand for modules of Megatron, or for something of theirs that can be assigned to."""
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in node.names:
                if f"{module or name.name}.".startswith("megatron."):
                    known.add(name.asname or name.name.split(".")[0])
        elif isinstance(node, ast.arg) and node.annotation is not None and "ModuleType" in ast.unparse(node.annotation):
            known.add(node.arg)
    bindings = []  # (target, what it is bound to)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            bindings += [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            bindings.append((node.target, node.value))
        elif isinstance(node, ast.For | ast.comprehension):
            bindings.append((node.target, node.iter))
    while True:  # aliases of aliases
        found = {
            name.id
            for target, value in bindings
            if is_megatron(value, known)
            for name in ast.walk(target)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        if found <= known:
            return known
        known |= found


def assignments(text: str, stand_ins: bool = False) -> list[str]:
    """What a file assigns to Megatron, or may: `line: code`.  stand_ins: it may call setattr."""
    tree = ast.parse(text)
    known = megatron_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            by_name = (
                isinstance(node, ast.Attribute) and node.attr in LISTED_NAMES and ast.unparse(node.value) != "self"
            )
            if by_name or is_megatron(node.value, known):
                found.append(node)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")
            patching = {"mock", "monkeypatch"} & set(called)
            updating = called[-1] in ("update", "setdefault", "__setitem__") and "__dict__" in called
            if patching or updating or (called[-1] in ASSIGNING_CALLS and not stand_ins):
                found.append(node)
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


def test_nothing_else_assigns_to_megatron() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in PRODUCT
        if path != THE_PLACE
        for line in assignments(path.read_text(), stand_ins=path == STAND_INS)
    ]
    assert not found, "hand it to touch_points.wrap() and list it:\n" + "\n".join(found)
    assert not megatron_names(ast.parse(STAND_INS.read_text()))
    assert assignments(THE_PLACE.read_text()), "the one assignment was not found"


@pytest.mark.parametrize(
    "wrong",
    [
        "from megatron.training import training\ntraining.anything = 1",
        "import megatron.core.utils as utils\nutils.anything: int = 1",
        "import megatron.core.utils\nmegatron.core.utils.anything = 1",
        "def f():\n    from megatron.core.x import Class\n    Class.method = lambda self: 0",
        "from megatron.core import x\nshort = x.Class\ny = short\ny.method, other = 1, 2",
        "from megatron.core import x, y\nfor z in (x, y):\n    z.name = 1",
        "from megatron.core import x\na, b = x, 1\na.name = 1",
        "def f(module: ModuleType):\n    module.anything = 1",
        "def f(anybody):\n    anybody.train_step = 1",
        "from megatron.core import x\nsetattr(x, 'name', 1)",
        "def f(owner):\n    setattr(owner, 'name', 1)",
        "from megatron.core import x\nx.__dict__['name'] = 1",
        "from megatron.core import x\nvars(x)['name'] = 1",
        "from megatron.core import x\nx.__dict__.update(name=1)",
        "import sys\nsys.modules['megatron.core.x'].name = 1",
        "import importlib\nx = importlib.import_module('megatron.core.x')\nx.name = 1",
        "from megatron.core import x\ngetattr(x, 'Class').method = 1",
        "from megatron.core import x\ndel x.name",
        "from megatron.core import x\nx.count += 1",
        "from unittest import mock\nmock.patch.object(x, 'name').start()",
    ],
)
def test_a_wrong_assignment_is_seen(wrong: str) -> None:
    assert assignments(wrong)


def test_own_attributes_are_no_assignment_to_megatron() -> None:
    assert not assignments(
        "from megatron.training import get_args\n"
        "def f(self, config):\n    args = get_args()\n    args.anything = config.anything = self.train_step = 1"
    )


def test_every_layer_is_a_file_and_every_patch_is_listed() -> None:
    places = {layer.place for point in TOUCH_POINTS for layer in point.layers}
    for place in places:
        assert (ROOT / "megatron_patch" / f"{place.replace('.', '/')}.py").is_file(), place
    files = {f"patches.{path.stem}" for path in THE_PLACE.parent.glob("*.py")} - {"patches.__init__"}
    assert files - {"patches.touch_points"} == {place for place in places if place.startswith("patches.")}
    symbols = [str(point) for point in TOUCH_POINTS]
    assert len(symbols) == len(set(symbols))


def test_every_listed_patch_is_there_once_applied() -> None:
    program = """
from megatron_patch import device
device.install()
from megatron_patch import patches
from megatron_patch.patches import touch_points
patches.apply_all("cpu")
for point, places in touch_points._wrapped.items():
    for place in places:
        print(point, place)
"""
    wanted = {
        f"{point} {layer.place}"
        for point in TOUCH_POINTS
        for layer in point.layers
        if layer.place.startswith("patches.") and layer.backend in (None, "cpu") and not point.read_only
    }
    assert set(in_warm_process(program).splitlines()) == wanted


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable `upstream.room` of our own, listed with two layers around one function."""
    (tmp_path / "upstream").mkdir()
    (tmp_path / "upstream" / "room.py").write_text("def step():\n    'Upstream.'\n    return ['upstream']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = TouchPoint("upstream.room", "step", (Layer("inner", "r", "n"), Layer("outer", "r", "n")))
    monkeypatch.setitem(touch_points._BY_SYMBOL, ("upstream.room", "step"), point)
    monkeypatch.setattr(touch_points, "_wrapped", {})
    touch_points._file.cache_clear()
    import upstream.room  # written above

    yield upstream.room
    for name in ("upstream.room", "upstream"):
        sys.modules.pop(name)
    touch_points._file.cache_clear()


def layer(name: str):
    return lambda original: lambda: [name, *original()]


def test_layers_lie_as_listed(upstream: ModuleType) -> None:
    original = upstream.step
    touch_points.wrap("upstream.room", "step", "inner", layer("inner"))
    touch_points.wrap("upstream.room", "step", "outer", layer("outer"))
    assert upstream.step() == ["outer", "inner", "upstream"]
    assert upstream.step.__wrapped__.__wrapped__ is original and upstream.step.__doc__ == "Upstream."


@pytest.mark.parametrize("second", ["inner", "outer"])
def test_a_layer_that_comes_too_late_is_refused(second: str, upstream: ModuleType) -> None:
    touch_points.wrap("upstream.room", "step", "outer", layer("outer"))
    with pytest.raises(
        RuntimeError, match=rf"upstream\.room\.step: {second} comes too late, outer is there; listed: in"
    ):
        touch_points.wrap("upstream.room", "step", second, layer(second))
    assert upstream.step() == ["outer", "upstream"]


@pytest.mark.parametrize(
    ("symbol", "place"), [("step", "somebody.else"), ("other", "inner"), ("HAVE_APEX_OR_TE", "patches.whole_tracker")]
)
def test_what_is_not_listed_is_refused(symbol: str, place: str, upstream: ModuleType) -> None:
    with pytest.raises(LookupError, match=rf"{place} must not wrap .*{symbol}: TOUCH_POINTS in .* does not list it"):
        touch_points.wrap("upstream.room", symbol, place, layer("never"))
    assert upstream.step() == ["upstream"]


def test_what_is_only_read_is_not_assigned() -> None:
    with pytest.raises(LookupError):
        touch_points.replace(
            touch_points.DISTRIBUTED_OPTIMIZER, "HAVE_APEX_OR_TE", "patches.distributed_optimizer_state", True
        )


@pytest.mark.parametrize(
    ("module", "symbol"),
    [
        ("megatron.training.training", "no_such_function"),
        ("megatron.training.no_such_file", "train"),
        ("megatron.no_such_folder.file", "train"),
        ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.no_such_method"),
        ("megatron.core.optimizer.distrib_optimizer", "NoSuchClass.state_dict"),
        ("no_such_package.module", "train"),
    ],
)
def test_a_missing_symbol_is_one_sentence(module: str, symbol: str) -> None:
    point = TouchPoint(module, symbol, (Layer("training.ema", "the reason", "never", backend="cpu"),))
    with pytest.raises(UserError) as refusal:
        touch_points.check("cpu", [point])
    for part in (
        f"{module}.{symbol} does not exist",
        "megatron_patch.training.ema needs it: the reason",
        "pip install",
    ):
        assert part in str(refusal.value)
    touch_points.check("cuda", [point])  # not needed there


def test_every_symbol_exists() -> None:
    for backend in ("cpu", "cuda"):
        patches.check(backend)


def test_the_check_imports_nothing_of_megatron() -> None:
    program = """
import sys
from megatron_patch import patches
patches.check("cpu")
print([name for name in sys.modules if name.split(".")[0] in ("megatron", "torch")])
"""
    assert in_new_process(program).strip() == "[]"
