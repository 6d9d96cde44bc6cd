"""Head and cross-entropy in one against torch's, in one part and in several, with a padded vocabulary."""

from tests.programs import WITH_AND_WITHOUT_COMPILER, in_warm_process

PROGRAM = """
from megatron_patch import device
device.install()
import itertools
import torch
from megatron.core import mpu
from megatron_patch.kernels import gradient_buffer
from megatron_patch.model import loss
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()
def compare(precision: str, tied: bool | str) -> None:
    # in bf16 a logit is rounded to 8 bits, so they stay small there
    dtype, tolerance, size = {"fp32": (torch.float32, 1e-5, 20), "bf16": (torch.bfloat16, 3e-2, 1)}[precision]
    torch.manual_seed(0)
    hidden = torch.randn(29, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 37, (29,))
    scales = torch.rand(29) * 2
    logits = (hidden.double() * size) @ weight.double().t()  # in fp32 of a hundred and more: nothing may overflow
    expected = torch.nn.functional.cross_entropy(logits[:, :37], targets, reduction="none")
    found = loss.head_losses(hidden * size, weight, targets, 37, mpu.get_tensor_model_parallel_group())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    theirs = torch.autograd.grad(expected, (hidden, weight), scales.double())
    if tied:  # as Megatron marks the weight of a head that is the embedding too
        weight.main_grad, weight.zero_out_wgrad = torch.ones_like(weight, dtype=torch.float32), True
    if tied == "empty":
        gradient_buffer.empty(weight.main_grad)
    ours = torch.autograd.grad(found, (hidden, weight), scales, allow_unused=True)
    if tied:
        assert ours[1] is None
        ours = (ours[0], weight.main_grad - (0 if tied == "empty" else 1))
    for one, other in zip(ours, theirs, strict=True):
        largest = other.abs().max()
        torch.testing.assert_close(one.double() / largest, other.double() / largest, rtol=0, atol=tolerance)


loss.PRODUCT_ROWS = 16
for loss.MOST_BYTES in (1 << 28, 4 * 40 * 8):  # one part, parts of eight rows
    for case in itertools.product(("fp32", "bf16"), (False, True, "empty")):
        compare(*case)
        print("equal")
"""


@WITH_AND_WITHOUT_COMPILER
def test_losses_and_gradients_are_torchs(environment: dict[str, str]) -> None:
    assert in_warm_process(PROGRAM, **environment).split() == ["equal"] * 12
