"""The data position as a dict of plain numbers and strings, which torch.load(weights_only=True) reads back."""

from typing import Any

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
