"""Dividing, clipping, AdamW's step and rounding on a CPU beside Megatron's own ways, with torch's AdamW."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.programs import WITHOUT_COMPILER, in_warm_process

PROGRAM = """
import sys
from megatron_patch import device
device.install()
if sys.argv[1] == "ours":
    from megatron_patch import patches
    patches.apply_all("cpu")
precision, shared, kind, clipped, rank, *store = sys.argv[2:]
import torch
from megatron.core import mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer import optimizer as optimizers
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import training
store = torch.distributed.FileStore(store[0], 2) if store else torch.distributed.HashStore()
ranks = 2 if isinstance(store, torch.distributed.FileStore) else 1
torch.distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=ranks)
mpu.initialize_model_parallel(tensor_model_parallel_size=ranks)  # both hold all weights, and the norm is the first's
torch.manual_seed(1)
in_16_bits, shares = precision == "bf16", shared == "shared"
module = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 7)).to(
    torch.bfloat16 if in_16_bits else torch.float32
)
model = DistributedDataParallel(
    TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, bf16=in_16_bits),
    DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=shares),
    module,
)
config = OptimizerConfig(
    optimizer=kind, lr=0.05, weight_decay=0.1, clip_grad=float(clipped), bf16=in_16_bits,
    use_distributed_optimizer=shares, params_dtype=torch.bfloat16 if in_16_bits else torch.float32,
)
optimizer = training.get_megatron_optimizer(config, [model])
(part,) = optimizer.chained_optimizers
copied, scaled, norms = [], [], []
if type(part) is optimizers.Float16OptimizerWithFloat16Params:
    copy = optimizers._multi_tensor_copy_this_to_that
    optimizers._multi_tensor_copy_this_to_that = lambda **asked: (copied.append(1), copy(**asked))
for size, tokens in ((30.0, 2), (1e-3, 4), (30.0, 1)):  # the second is not clipped
    for parameter in module.parameters():
        parameter.main_grad.copy_(size * torch.randn(parameter.shape))
    before = [parameter.main_grad.clone() for parameter in module.parameters()]
    model.scale_gradients(1.0 / torch.tensor([tokens]))
    done, norm, _ = optimizer.step()
    assert done
    norms.append(float(norm))
    scaled.append(any(not torch.equal(one, other.main_grad) for one, other in zip(before, module.parameters())))
masters = [weight.double().flatten() for group in part.optimizer.param_groups for weight in group["params"]]
weights = [weight.double().flatten() for weight in module.parameters()]
print(len(copied), sum(scaled))
print(*norms)
print(*torch.cat(masters).tolist())
print(*torch.cat(weights).tolist())
"""


def trained(
    by: str,
    precision: str,
    shared: str,
    kind: str = "adam",
    clipped: float = 1,
    ranks: tuple[object, ...] = (0,),
    **environment: str,
) -> tuple[list[float], ...]:
    """How often weights were copied and gradients scaled; the norms of three steps; masters and weights after them.

    ranks: this one's number and, where there are two, the file in which they meet.
    """
    printed = in_warm_process(PROGRAM, by, precision, shared, kind, clipped, *ranks, **environment).splitlines()[-4:]
    return tuple([float(word) for word in line.split()] for line in printed)


@pytest.mark.parametrize("shared", ["alone", "shared"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_steps_are_megatrons(precision: str, shared: str) -> None:
    """In 32 bits to 1e-5: the step is 0.05, and divides by moments that were rounded elsewhere."""
    passes, norms, masters, weights = trained("ours", precision, shared)
    of_megatron, their_norms, their_masters, their_weights = trained("Megatron's", precision, shared)
    copies = 3 if precision == "bf16" and shared == "alone" else 0
    assert of_megatron == [copies, 3] and passes == [0, 0]
    assert norms == pytest.approx(their_norms, rel=1e-5)
    assert masters == pytest.approx(their_masters, rel=1e-5, abs=1e-6)
    # a step of bf16 apart where rounding decides
    assert weights == pytest.approx(their_weights, rel=2**-7 if precision == "bf16" else 1e-5, abs=1e-6)
    if precision == "bf16" and shared == "alone":
        import torch

        assert torch.tensor(masters).bfloat16().double().sort().values.tolist() == sorted(weights)


def test_without_a_compiler_they_are_torchs() -> None:
    passes, _, masters, _ = trained("ours", "bf16", "alone", **WITHOUT_COMPILER)
    assert passes == [3, 3]
    assert masters == pytest.approx(trained("ours", "bf16", "alone")[2], rel=1e-5, abs=1e-6)


def test_without_clipping_each_step_is_of_its_own_tokens() -> None:
    passes, _, masters, _ = trained("ours", "fp32", "alone", clipped=0)
    of_megatron, _, their_masters, _ = trained("Megatron's", "fp32", "alone", clipped=0)
    assert passes == [0, 0] and of_megatron == [0, 2]  # the third step has one token
    assert masters == pytest.approx(their_masters, rel=1e-5, abs=1e-6)


def test_an_optimizer_without_the_kernel_gets_divided_gradients() -> None:
    """The norms were summed in other orders, and clip."""
    ours, theirs = (trained(by, "fp32", "alone", kind="sgd") for by in ("ours", "Megatron's"))
    assert ours[0] == theirs[0] == [0, 3]
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5, abs=1e-7)


def test_beside_a_rank_without_a_compiler_gradients_are_divided(tmp_path: Path) -> None:
    _, norms, masters, _ = trained("Megatron's", "fp32", "alone")
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(trained, "ours", "fp32", "alone", ranks=(rank, tmp_path / "store"), **environment)
            for rank, environment in enumerate(({}, WITHOUT_COMPILER))
        ]
    # the first notes what it clips, and the third step has one token
    for run, scaled in zip(runs, (2, 3), strict=True):
        found = run.result()
        assert found[0] == [0, scaled]
        assert found[1] == pytest.approx(norms, rel=1e-5)
        assert found[2] == pytest.approx(masters, rel=1e-5, abs=1e-6)
