"""Loads on a CPU: every tensor is read to where it belongs, by Megatron's own load from what Megatron saved."""

import itertools
from pathlib import Path

import pytest
import torch

from megatron_patch.patches.loaded_in_place import beside_each_other, first_of_run
from tests.programs import ONLY_RANK, in_warm_process


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (1, 4), (2, 3, 4), (3, 1, 2)], ids=str)
def test_a_box_of_elements_that_follow_each_other(shape: tuple[int, ...]) -> None:
    """torch says which boxes of a tensor are one run of memory, and where they begin."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    axes = [[(low, high - low) for low in range(size) for high in range(low + 1, size + 1)] for size in shape]
    for box in itertools.product(*axes):
        part = whole[tuple(slice(low, low + length) for low, length in box)]
        expected = part.storage_offset() if part.is_contiguous() else None
        assert first_of_run(shape, [low for low, _ in box], [length for _, length in box]) == expected, box


def test_tensors_beside_each_other_are_joined_without_a_copy() -> None:
    whole = torch.arange(60).view(10, 6)
    first, second, third = whole[1:3], whole[3:4], whole[4:9]
    joined = beside_each_other([first, second, third])
    assert joined.data_ptr() == first.data_ptr() and torch.equal(joined, whole[1:9])
    assert beside_each_other([first, third]) is None  # not beside each other
    assert beside_each_other([second, first]) is None
    assert beside_each_other([first, whole.clone()[3:4]]) is None
    assert beside_each_other([first, whole.view(-1)[18:24].view(2, 3)]) is None  # of another width
    assert beside_each_other([whole[:2].view(torch.float64), whole[2:3]]) is None
    assert beside_each_other([whole[:2, :3], whole[1:3, :3]]) is None


def test_tensors_are_loaded_without_copies(tmp_path: Path) -> None:
    """torch's reader, which reads to memory of its own first, is left with columns, other dtypes and what is no run."""
    program = """
import sys
from dataclasses import replace
from pathlib import Path
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch.distributed.checkpoint import filesystem
torch.set_num_threads(2)
folder = Path(sys.argv[1])

def entry(name, tensor, *cut, prepend=0):
    return ShardedTensor.from_rank_offsets(name, tensor, *cut, prepend_axis_num=prepend)

def gated(name, tensor):
    return apply_swiglu_sharded_factory(entry(name, tensor), ())

saved = {name: torch.randn(12, 6) for name in ("whole", "rows", "columns", "other dtype", "gated", "strided")}
saved |= {"bf16": torch.randn(7, 5).bfloat16(), "scalar": torch.tensor(3.0), "numbers": torch.arange(9)}
saved["layer"] = torch.randn(3, 4)
state = {name: entry(name, tensor) for name, tensor in saved.items() if name != "layer"}
state["gated"] = gated("gated", saved["gated"])
state["layer"] = entry("layer", saved["layer"], (0, 0, 1), prepend=1)
dist_checkpointing.save(state, folder)

copied, load = [], torch.load

def watched(file, **words):
    copied.append(load(file, **words))
    return copied[-1]

filesystem.torch.load = watched
targets = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
targets |= {"rows": torch.zeros(4, 6), "columns": torch.zeros(12, 3), "other dtype": torch.zeros(12, 6).double()}
targets["strided"] = torch.zeros(12, 12)[:, ::2]
targets["layer"] = torch.nn.Parameter(targets["layer"])
wanted = {name: entry(name, tensor) for name, tensor in targets.items() if name != "layer"}
wanted["rows"] = entry("rows", targets["rows"], (0, 1, 3))
wanted["columns"] = entry("columns", targets["columns"], (1, 1, 2))
wanted["gated"] = gated("gated", targets["gated"])
wanted["layer"] = entry("layer", targets["layer"], (0, 0, 1), prepend=1)
loaded = dist_checkpointing.load(wanted, folder, validate_access_integrity=False)
expected = saved | {"rows": saved["rows"][4:8], "columns": saved["columns"][:, 3:]}
expected["other dtype"] = saved["other dtype"].double()
print([name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)])
print([name for name, tensor in targets.items() if loaded[name].data_ptr() != tensor.data_ptr()])
by_reader = [found for found in copied if isinstance(found, torch.Tensor)]
print([name for name, tensor in saved.items() if any(torch.equal(tensor, found) for found in by_reader)])

of_two = gated("gated", torch.zeros(12, 6))
halves = of_two.build()
joined = of_two.merge_fn([halves[0].data.clone(), halves[1].data.clone() + 1])  # not in one place
print(joined.sum().item(), tuple(joined.shape))
(file,) = folder.glob("*.distcp")
file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
try:
    dist_checkpointing.load({name: entry(name, targets[name]) for name in ("whole", "numbers", "bf16")}, folder)
except BaseException as error:
    print("refused")
"""
    wrong, elsewhere, by_reader, joined, damaged = in_warm_process(ONLY_RANK + program, tmp_path).splitlines()[-5:]
    assert (wrong, elsewhere) == ("[]", "[]")
    assert by_reader == "['columns', 'other dtype', 'strided']"
    assert joined == "36.0 (12, 6)" and damaged == "refused"
