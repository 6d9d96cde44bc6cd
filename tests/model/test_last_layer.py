"""The last layer at labelled positions: the same states there, and the same gradients of everything."""

from tests.programs import ONLY_RANK, in_warm_process

LAYERS = (
    ONLY_RANK
    + """
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.model.last_layer import LastLayer, chosen
from megatron_patch.model.layer_specs import decoder_block

def layers(**changes):
    common = dict(num_layers=2, hidden_size=48, num_attention_heads=6, hidden_dropout=0.0, attention_dropout=0.0)
    config = TransformerConfig(**common | dict(transformer_impl="local", normalization="RMSNorm") | changes)
    torch.manual_seed(0)
    block = TransformerBlock(config, decoder_block(config))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block

def both(length, records, places, packed=None, **changes):
    \"\"\"States at the places, and gradients, of whole layers and of those whose last one is narrowed.\"\"\"
    block = layers(**changes)
    narrowing = LastLayer(block.layers[-1])
    rows = []
    block.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    states = torch.randn(length, records, 48, requires_grad=True)
    wanted = torch.randn(len(places), 1, 48)
    found = []
    for narrowed in (False, True, False):
        block.zero_grad()
        states.grad = None
        if narrowed:
            with narrowing.at(places):
                made = block(states, None, packed_seq_params=packed)
        else:
            made = chosen(block(states, None, packed_seq_params=packed), places)
        made.backward(wanted)
        found.append([made, states.grad, *(parameter.grad for parameter in block.parameters())])
    assert rows == [length, len(places), length], rows
    return found

def same(name, whole, narrowed, whole_again):
    assert all(torch.equal(one, other) for one, other in zip(whole, whole_again, strict=True))
    for one, other in zip(whole, narrowed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * one.abs().max().item())
    print(name)

places = torch.tensor([5, 6, 7, 25, 2])
same("records", *both(13, 2, places))
same("biases", *both(13, 2, places, add_bias_linear=True, gated_linear_unit=True))
same("one", *both(13, 2, places[:1]))
same("all", *both(13, 2, torch.arange(26)))
starts = torch.tensor([0, 9, 26], dtype=torch.int32)
packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
same("packed", *both(26, 1, places, packed))
"""
)

POSITIONS = """
from megatron_patch import device
device.install()
from types import SimpleNamespace
import torch
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.model.last_layer import can_narrow, chosen, labelled_positions
from megatron_patch.model.loss import sum_and_number

labels = torch.tensor([[IGNORE_LABEL, 7, IGNORE_LABEL, 9], [4, IGNORE_LABEL, IGNORE_LABEL, 0]])
places, targets, count = labelled_positions(labels)
print(targets.tolist(), count)
states = torch.arange(8).view(4, 2, 1)  # [S, B, H]: each its own place
print(chosen(states, places).flatten().tolist(), list(chosen(states, places).shape))

places, targets, count = labelled_positions(torch.full((2, 3), IGNORE_LABEL))
losses = torch.tensor([3.5], requires_grad=True)
total = sum_and_number(losses, count)
total[0].backward()
print(places.tolist(), targets.tolist(), count, total.tolist(), losses.grad.tolist())

settings = {"sequence_parallel": False, "recompute_granularity": None, "fp8": None, "cpu_offloading": False}
for changes in (
    {},
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "full"},
    {"sequence_parallel": True},
    {"fp8": "e4m3"},
    {"cpu_offloading": True},
):
    print(int(can_narrow(SimpleNamespace(**settings | changes))))
"""


def test_states_and_gradients_are_those_of_whole_layers() -> None:
    """Within 1e-5 of the largest entry: products of other sizes may add up in another order."""
    assert in_warm_process(LAYERS).split() == ["records", "biases", "one", "all", "packed"]


def test_positions_and_which_layers_are_narrowed() -> None:
    """Records one behind the other; without a label one position that weighs nothing; none where whole ones are due."""
    order, states, nothing, *narrowed = in_warm_process(POSITIONS).splitlines()
    assert order == "[7, 9, 4, 0] 4"
    assert states == "[2, 6, 1, 7] [4, 1, 1]"
    assert nothing == "[0] [0] 0 [0.0, 0.0] [0.0]"
    assert narrowed == ["1", "1", "0", "0", "0", "0"]
