"""The data position as a dict of plain numbers and strings, which torch.load(weights_only=True) reads back."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_patch.data.rejection import current_reason
from megatron_patch.errors import UserError

FORMAT = 1  # raise it whenever a position would come to mean another record


def describe(fingerprint: str, records: int, seed: int, order: str) -> dict[str, Any]:
    """What the meaning of a position depends on."""
    return {"format": FORMAT, "fingerprint": fingerprint, "records": records, "seed": seed, "order": order}


def check(state: Any, expected: dict[str, Any], path: str) -> int:
    """The position in `state`; UserError when it was saved for other data, another seed or by another version."""
    if not isinstance(state, dict) or not isinstance(state.get("data"), dict) or "position" not in state:
        raise UserError(f"{path}: the saved data position has an unknown form; start with a new OUTPUT_BASEPATH")
    saved = {"order": "cyclic", **state["data"]}  # states of the first version know no other order
    meanings = {
        "format": "version of the order of records",
        "fingerprint": "data (shard names, counts and sizes)",
        "records": "number of records",
        "seed": "seed",
        "order": "order of the records",
    }
    differences = [
        f"{meaning}: saved {saved.get(name)}, now {expected[name]}"
        for name, meaning in meanings.items()
        if saved.get(name) != expected[name]
    ]
    if differences:
        raise UserError(
            f"{path}: the run cannot be resumed on it, its data position was saved for something else "
            f"({'; '.join(differences)}); resume with the same data and seed, or start with a new OUTPUT_BASEPATH"
        )
    return int(state["position"])


def redistribute(states: Sequence[dict[str, Any]], rank: int, size: int) -> dict[str, Any]:
    """What data-parallel rank `rank` of `size` goes on with after another number of ranks, from the states of these.

    Rank 0 inherits the counts of all, the others none, so that the sum over the ranks goes on.  `inherited` keeps them
    out of the limit of skipped records, which is a rank's own.

    Args:
        states: of all ranks that saved, rank 0's first; any rank but 0 may leave out the others.
    """
    total: Counter[str] = Counter()
    for state in states if rank == 0 else ():
        total.update({current_reason(name): count for name, count in state["counts"].items()})
    topology = {"data_parallel_rank": rank, "data_parallel_size": size}
    return {**states[0], "topology": topology, "counts": dict(total), "inherited": dict(total)}
