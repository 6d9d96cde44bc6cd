"""What a torch_dist checkpoint of a run holds, bit by bit."""

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def tensors_of_run(output: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of `iteration` below OUTPUT/checkpoint, as bytes: uint8, so that NaN equals NaN."""
    state: dict = {}
    reader = FileSystemReader(output / "checkpoint" / f"iter_{iteration:07d}")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value.detach().contiguous().reshape(-1).view(torch.uint8)
        elif isinstance(value, dict):
            for key, child in value.items():
                visit(f"{name}.{key}", child)
        elif isinstance(value, list | tuple):
            for number, child in enumerate(value):
                visit(f"{name}.{number}", child)

    visit("", {name: value for name, value in state.items() if not name.startswith(("rng_state", "common_state"))})
    return found


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Same names, same bytes, and neither empty."""
    assert one.keys() == two.keys() and len(one) > 60, sorted(one.keys() ^ two.keys())[:4]
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different[:4]
