"""Which ranks share a weight out between them."""

from tests.programs import in_warm_process

# (FSDP, ranks of a node) -> the mesh of four ranks: all of them, or (nodes, ranks of a node)
MESHES = {
    ("full", 2): (4,),
    ("grad", 2): (4,),
    ("hybrid", 4): (4,),
    ("hybrid", 2): (2, 2),
    ("hybrid", 1): (4, 1),
}
CODE = f"""
import os
from types import SimpleNamespace
import torch
from megatron.training.global_vars import set_args
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_patch.patches.torch_fsdp2 import _mesh
torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
args = SimpleNamespace(tensor_model_parallel_size=1)
set_args(args)
for args.fsdp, of_node in {list(MESHES)}:
    os.environ["LOCAL_WORLD_SIZE"] = str(of_node)
    print(tuple(_mesh(torch.distributed.group.WORLD, "cpu").shape))
"""


def test_hybrid_shares_weights_out_within_a_node() -> None:
    """torch's fake processes know each other's places and send nothing."""
    printed = in_warm_process(CODE)
    assert printed.splitlines()[-len(MESHES) :] == [str(shape) for shape in MESHES.values()]
