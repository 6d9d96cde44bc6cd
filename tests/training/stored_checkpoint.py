"""What a torch_dist checkpoint of a run holds, bit by bit."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

STATES = ("rng_state", "common_state")  # random generators; arguments, schedule, the optimizer's groups, counters
# Arguments that differ between a run that went on and one that was never stopped, with another OUTPUT_BASEPATH each.
MAY_DIFFER = {
    **dict.fromkeys(
        ("save", "load", "tensorboard_dir", "dataloader_save", "output_path", "bad_batches_file"), "OUTPUT_BASEPATH"
    ),
    "iteration": "where the process that saved had begun",
    "num_floating_point_operations_so_far": "the same; how many there are now stands beside the arguments and is equal",
    "finetune": "Megatron sets it for a start from PRETRAIN_CHECKPOINT_PATH, which a process that resumes is not",
}


def _read(output: Path, iteration: int) -> dict[str, object]:
    """Leaves of `iteration` below OUTPUT/checkpoint by their dotted names; arguments are leaves of `args`."""
    state: dict = {}
    reader = FileSystemReader(output / "checkpoint" / f"iter_{iteration:07d}")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    found: dict[str, object] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            for key, child in value.items():
                visit(f"{name}.{key}", child)
        elif isinstance(value, list | tuple):
            for number, child in enumerate(value):
                visit(f"{name}.{number}", child)
        else:
            found[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    visit("", state)
    return {name.removeprefix("."): value for name, value in found.items()}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """uint8, so that NaN equals NaN."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensors_of_run(output: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of `iteration` below OUTPUT/checkpoint, as bytes."""
    leaves = _read(output, iteration).items()
    return {
        name: _bits(leaf) for name, leaf in leaves if isinstance(leaf, torch.Tensor) and not name.startswith(STATES)
    }


def states_of_run(output: Path, iteration: int) -> dict[str, object]:
    """Everything else: random generators, schedule, arguments, counters; tensors as bytes, other values as text."""
    leaves = _read(output, iteration).items()
    return {
        name: _bits(leaf).tolist() if isinstance(leaf, torch.Tensor) else repr(leaf)
        for name, leaf in leaves
        if name.startswith(STATES)
    }


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Same names, same bytes, and neither empty."""
    assert one.keys() == two.keys() and len(one) > 60, sorted(one.keys() ^ two.keys())[:4]
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different[:4]


def assert_same_run(one: Path, two: Path, iteration: int) -> None:
    """Two outputs hold the same at `iteration`: weights, optimizer, other states, data position and record counters."""
    assert_same_bits(tensors_of_run(one, iteration), tensors_of_run(two, iteration))
    left, right = states_of_run(one, iteration), states_of_run(two, iteration)
    for part in ("rng_state", "random_rng_state", "np_rng_state", "torch_rng_state", "rng_tracker_states"):
        assert any(part in name for name in left), f"no {part} to compare"
    for part in ("args.seed", "opt_param_scheduler.num_steps", "param_groups.0.lr", "common_state"):
        assert any(part in name for name in left), f"no {part} to compare"
    assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())[:8]
    different = {name: (left[name], right[name]) for name in left if left[name] != right[name]}
    ranks = list((one / "checkpoint/data" / f"iter_{iteration:07d}").rglob("train_dataloader_*.pt"))
    assert ranks, "no data position to compare"
    for rank in ranks:
        same = two / rank.relative_to(one)
        assert torch.load(rank, weights_only=True) == torch.load(same, weights_only=True), f"{rank.name} differs"
    unknown = {name: str(pair)[:200] for name, pair in different.items() if argument(name) not in MAY_DIFFER}
    assert not unknown, unknown


def argument(name: str) -> str | None:
    """The argument that a leaf belongs to."""
    return name.partition(".args.")[2].partition(".")[0] if ".args." in name else None
