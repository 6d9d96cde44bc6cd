"""A step's first gradients are written over the last step's, on a CPU, beside Megatron's sums from zeros."""

import math

import pytest

from tests.programs import in_warm_process

PROGRAM = """
import math, sys
from megatron_patch import device
device.install()
if sys.argv[1] == "ours":
    from megatron_patch import patches
    patches.apply_all("cpu")
precision, shared, overlap = sys.argv[2:]
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.linear import Column
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
dtype = torch.bfloat16 if precision == "bf16" else torch.float32
config = TransformerConfig(
    num_layers=1, hidden_size=6, num_attention_heads=2, params_dtype=dtype, bf16=dtype is torch.bfloat16,
    gradient_accumulation_fusion=True,
)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        by = {"config": config, "init_method": torch.nn.init.normal_}
        self.rows, self.column = VocabParallelEmbedding(9, 6, **by), Column(6, 4, bias=False, **by)
        self.plain, self.unused = torch.nn.Linear(4, 3).to(dtype), torch.nn.Linear(2, 2).to(dtype)

    def forward(self, tokens):
        return self.plain(self.column(self.rows(tokens))[0])


model = DistributedDataParallel(
    config,
    DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=shared == "shared", overlap_grad_reduce=overlap == "overlap"
    ),
    Model(),
)
torch.manual_seed(1)
for parameter in model.parameters():  # Megatron alone cannot seed weights without CUDA
    parameter.data.normal_()
found = []
for step in range(2):
    for parameter in model.parameters():
        parameter.main_grad.fill_(math.nan)  # what no step must see
    model.zero_grad_buffer()
    left = sum(bool(parameter.main_grad.isnan().all()) for parameter in model.parameters())
    if overlap != "overlap":
        for micro_batch in range(2):
            model(torch.tensor([[1, 4, 4], [0, 1, step + 5]])).float().square().sum().backward()
        model.finish_grad_sync()
    found.append(torch.cat([parameter.main_grad.flatten() for parameter in model.parameters()]))
print(left, *torch.stack(found).flatten().tolist())
"""


def gradients(by: str, precision: str = "fp32", shared: str = "alone", overlap: str = "no") -> tuple[int, list[float]]:
    """How many of six parameters kept what they held, and all gradients of two steps."""
    left, *found = in_warm_process(PROGRAM, by, precision, shared, overlap).splitlines()[-1].split()
    return int(left), list(map(float, found))


@pytest.mark.parametrize("shared", ["alone", "shared"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_those_added_to_zeros(precision: str, shared: str) -> None:
    """By a product into the buffer, an embedding's rows, Megatron's hook; of a layer that is not used they are zero."""
    left, ours = gradients("ours", precision, shared)
    none_left, theirs = gradients("Megatron's", precision, shared)
    assert (left, none_left) == (6, 0)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert ours[len(ours) // 2 - 6 : len(ours) // 2] == [0] * 6 and sum(map(abs, ours)) > 1


def test_where_reductions_overlap_there_are_zeros() -> None:
    left, ours = gradients("ours", overlap="overlap")
    assert left == 0 and not any(map(math.isnan, ours)) and not any(ours)
