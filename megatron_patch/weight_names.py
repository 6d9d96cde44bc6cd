"""What model, trainer and converter say alike about the names of weights, and the report of those that do not fit."""

from collections.abc import Iterable, Mapping, Sequence

from megatron_patch.errors import UserError

# Names of the layers' norms without Transformer Engine -> with it, where they belong to the linear layer behind them.
# Checkpoints hold the latter.
NORM_KEYS_AS_TRANSFORMER_ENGINE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

EMBEDDING = "language_model.embedding.word_embeddings.weight"
HEAD = "language_model.output_layer.weight"  # absent where it is tied to the embedding

# Titles of the lists.
MISSING, UNKNOWN, LEFT_OVER, WRONG = "missing", "unknown", "left over", "of another shape or dtype"
SHOWN = 8  # names of a list that a message tells

Shapes = Mapping[str, Sequence[int]]


def with_transformer_engine_norms(name: str) -> str:
    """The name as checkpoints have it."""
    for local, engine in NORM_KEYS_AS_TRANSFORMER_ENGINE.items():
        name = name.replace(f".{local}", f".{engine}")
    return name


def differences(found: Shapes, wanted: Shapes, authority: str) -> dict[str, list[str]]:
    """{title: names}: what is wanted and not there, there and not wanted, there in another shape.

    Args:
        authority: who says how it should be, as `the model has`.
    """
    return {
        MISSING: [name for name in wanted if name not in found],
        UNKNOWN: [name for name in found if name not in wanted],
        WRONG: [
            another_shape(name, found[name], shape, authority)
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }


def without_padding(found: Shapes, wanted: Shapes, vocabulary: int) -> dict[str, Sequence[int]]:
    """The shapes found, those of embedding and head as wanted where they hold all rows of the vocabulary.

    Megatron pads both to a multiple that depends on the tensor-parallel size, and reads either padding.
    """
    shapes = dict(found)
    for key in found.keys() & wanted.keys() & {EMBEDDING, HEAD}:
        if tuple(found[key][1:]) == tuple(wanted[key][1:]) and found[key][0] >= vocabulary:
            shapes[key] = wanted[key]
    return shapes


def another_shape(name: str, found: Sequence[int], wanted: Sequence[int], authority: str) -> str:
    """Entry of the list WRONG."""
    return f"{name} is {list(found)}, {authority} {list(wanted)}"


def check_nothing_differs(problem: str, lists: Mapping[str, Iterable[str]]) -> None:
    """Stop when a list is not empty.

    Args:
        problem: what is wrong then, and what to do.
        lists: {title: names}.
    Raises:
        UserError: the problem, then every list with its number of names and the first of them.
    """
    lists = {title: list(names) for title, names in lists.items()}
    if not any(lists.values()):
        return
    lines = [f"{problem}:"]
    for title, names in lists.items():
        more = f", ... ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
        lines.append(f"  {title} ({len(names)}): {', '.join(names[:SHOWN]) or 'none'}{more}")
    raise UserError("\n".join(lines))
