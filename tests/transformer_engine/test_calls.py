"""What Megatron gives to the classes of Transformer Engine that our layers are made of, they take by these names.

Read from the sources of both; the branches for versions before 1.5 are left out.  Runs go through the same calls
(test_training.py), but not through those of communication overlap and offsets of a softmax.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

PYTORCH = Path("transformer_engine/pytorch")
# Megatron's class -> file and class of Transformer Engine
BASES = {
    "TELinear": (PYTORCH / "module/linear.py", "Linear"),
    "TELayerNormColumnParallelLinear": (PYTORCH / "module/layernorm_linear.py", "LayerNormLinear"),
    "TEDotProductAttention": (
        PYTORCH / "attention/dot_product_attention/dot_product_attention.py",
        "DotProductAttention",
    ),
}
NORMS = ("layernorm", "LayerNorm"), ("rmsnorm", "RMSNorm")
BEFORE_1_5 = {"ub_split_ag", "ub_atomic_gemm_ag", "ub_split_rs", "ub_atomic_gemm_rs"}


MEGATRON = Path(importlib.util.find_spec("megatron").submodule_search_locations[0]) / "core"


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.fixture(scope="module")
def megatron() -> ast.Module:
    """Its file with the classes over Transformer Engine's."""
    return parsed(MEGATRON / "extensions/transformer_engine.py")


def found(tree: ast.AST, kind: type, name: str) -> ast.AST:
    return next(node for node in ast.walk(tree) if isinstance(node, kind) and node.name == name)


def parameters(tree: ast.AST, owner: str, function: str = "__init__") -> set[str]:
    """Names that a method takes, without self."""
    arguments = found(found(tree, ast.ClassDef, owner), ast.FunctionDef, function).args
    return {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)} - {"self"}


def set_items(tree: ast.AST, dictionary: str) -> set[str]:
    """Keys that are assigned to or listed in a dictionary of this name."""
    keys = set()
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Subscript) and getattr(target.value, "id", None) == dictionary:
                keys.add(ast.literal_eval(target.slice))
            if getattr(target, "id", None) == dictionary and isinstance(node.value, ast.Dict):
                keys |= {ast.literal_eval(key) for key in node.value.keys}
    return keys


def given(tree: ast.AST, call: str) -> set[str]:
    """Keywords of the calls that are written like this."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == call]
    assert calls, f"nobody calls {call}"
    return {keyword.arg for node in calls for keyword in node.keywords if keyword.arg}


@pytest.fixture(scope="module")
def for_all(megatron: ast.Module) -> set[str]:
    """Keywords for every class: type and device of the parameters."""
    keys = set_items(found(megatron, ast.FunctionDef, "_get_extra_te_kwargs"), "extra_transformer_engine_kwargs")
    assert keys == {"params_dtype", "device"}
    return keys


@pytest.mark.parametrize("name", BASES)
def test_constructors_take_what_megatron_gives(name: str, megatron: ast.Module, for_all: set[str], files: Path) -> None:
    path, base = BASES[name]
    build = found(found(megatron, ast.ClassDef, name), ast.FunctionDef, "__init__")
    keywords = given(build, "super().__init__") | set_items(build, "extra_kwargs") - BEFORE_1_5
    if name != "TEDotProductAttention":
        keywords |= for_all
    assert len(keywords) > 12
    assert not keywords - parameters(parsed(files / path), base)


@pytest.mark.parametrize(("module", "norm"), NORMS)
def test_norms_take_what_megatron_gives(module: str, norm: str, megatron: ast.Module, for_all: set[str], files: Path):
    keywords = given(found(megatron, ast.ClassDef, "TENorm"), "norm_module") | for_all
    own = parsed(files / PYTORCH / f"module/{module}.py")
    below = parsed(files / PYTORCH / f"ops/basic/{'layer_norm' if norm == 'LayerNorm' else 'rmsnorm'}.py")
    # **kwargs of the module go to the operation below it
    takes = parameters(own, norm) | parameters(below, norm)
    assert keywords >= {"eps", "sequence_parallel"} and not keywords - takes


def test_attention_takes_packed_records_as_megatron_gives_them(megatron: ast.Module, files: Path) -> None:
    """Every field of PackedSeqParams that Megatron does not discard is an argument of the attention's forward."""
    own = found(megatron, ast.ClassDef, "TEDotProductAttention")
    discarded = {
        ast.literal_eval(node.args[0])
        for node in ast.walk(own)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.kept_packed_seq_params.discard"
    }
    old = {"max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "pad_between_seqs"}
    records = found(parsed(MEGATRON / "packed_seq_params.py"), ast.ClassDef, "PackedSeqParams")
    fields = {node.target.id for node in records.body if isinstance(node, ast.AnnAssign)}
    kept = fields - (discarded - old)
    path, base = BASES["TEDotProductAttention"]
    assert "cu_seqlens_q" in kept and not kept - parameters(parsed(files / path), base, "forward")


# Where Megatron calls a builder of our specs, as it is written there -> the classes that stand in layer_specs.py
CALLS = [
    ("attention.py", "submodules.linear_qkv", "TELayerNormColumnParallelLinear"),
    ("attention.py", "submodules.linear_proj", "TERowParallelLinear"),
    ("attention.py", "submodules.core_attention", "TEDotProductAttention"),
    ("attention.py", "q_norm_cls", "TENorm"),
    ("attention.py", "k_norm_cls", "TENorm"),
    ("mlp.py", "submodules.linear_fc1", "TELayerNormColumnParallelLinear"),
    ("mlp.py", "submodules.linear_fc1", "TEColumnParallelLinear"),
    ("mlp.py", "submodules.linear_fc2", "TERowParallelLinear"),
    ("transformer_block.py", "not_none(self.submodules.layer_norm)", "TENorm"),
]


@pytest.mark.parametrize(("file", "call", "name"), CALLS)
def test_classes_take_what_builders_are_called_with(file: str, call: str, name: str, megatron: ast.Module) -> None:
    keywords = given(parsed(MEGATRON / "transformer" / file), call)
    build = "__new__" if name == "TENorm" else "__init__"
    assert "config" in keywords and not keywords - parameters(megatron, name, build)
