"""Gradients and weights of the distributed optimizer between two ranks of gloo."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.programs import in_warm_process

BUFFER = 1 << 26  # bytes

EXCHANGE = """
import re, sys
from pathlib import Path
from megatron_patch import device
device.install()
import torch
from megatron.core.distributed import param_and_grad_buffer as buffers
megatrons = buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func
from megatron_patch.patches import exchanged_in_place
exchanged_in_place.apply()
ours = buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func
store, size, rank = torch.distributed.FileStore(sys.argv[1], 2), int(sys.argv[2]) // 4, int(sys.argv[3])
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
group = torch.distributed.group.WORLD

def held(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

found = []
for reduce_scatter, all_gather in (ours, megatrons):
    torch.manual_seed(rank)
    gradients, weights = torch.randn(size), torch.randn(size)
    for exchange in (
        lambda: reduce_scatter(gradients.chunk(2)[rank], gradients, op=torch.distributed.ReduceOp.SUM, group=group),
        lambda: all_gather(weights, weights.chunk(2)[rank], group=group),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # the most that was held counts from here
        before = held("VmRSS")
        with torch.distributed._coalescing_manager(group):  # as Megatron does
            exchange()
        print(held("VmHWM") - before)
    found.append((gradients.chunk(2)[rank], weights))
for one, other in zip(*found):
    assert torch.equal(one, other)
torch.distributed.destroy_process_group()
"""


def test_gradients_and_weights_are_exchanged_without_copies(tmp_path: Path) -> None:
    exchange = functools.partial(in_warm_process, EXCHANGE, tmp_path / "store", BUFFER)
    with ThreadPoolExecutor(2) as ranks:
        for printed in ranks.map(exchange, range(2)):
            *ours, reduced, gathered = map(int, printed.split())
            assert max(ours) < BUFFER / 4, ours
            assert min(reduced, gathered) > BUFFER * 0.9  # torch's own: the check sees a copy
