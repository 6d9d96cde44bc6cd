"""Megatron's rotary frequencies against transformers', at the sizes of published models."""

import json

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_patch.geometry import LLAMA3_ROPE
from tests.programs import in_warm_process

# width of a head, base, factor of the scaling "llama3"
MODELS = {
    "Llama-2-7B": (128, 1e4, None),
    "Llama-3-8B": (128, 5e5, None),
    "Llama-3.1-8B": (128, 5e5, 8.0),
    "Llama-3.2-1B": (64, 5e5, 32.0),
    "Qwen2.5-7B": (128, 1e6, None),
}
# In a process of its own, as always with Megatron: importing it changes what a process can do afterwards.
MEGATRON = """
import json, sys
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
print(json.dumps({
    name: RotaryEmbedding(
        kv_channels=head_dim, rotary_percent=1.0, rotary_base=base, rope_scaling=factor is not None,
        rope_scaling_factor=factor or 1.0, use_cpu_initialization=True,
    ).inv_freq.tolist()
    for name, (head_dim, base, factor) in json.loads(sys.argv[1]).items()
}))
"""


def test_frequencies_equal_transformers() -> None:
    ours = json.loads(in_warm_process(MEGATRON, json.dumps(MODELS)).splitlines()[-1])
    for name, (head_dim, base, factor) in MODELS.items():
        scaling = (
            {"rope_type": "default"} if factor is None else {"rope_type": "llama3", "factor": factor} | LLAMA3_ROPE
        )
        config = transformers.LlamaConfig(
            hidden_size=head_dim * 4,
            num_attention_heads=4,
            max_position_embeddings=131072,
            rope_parameters=scaling | {"rope_theta": base},
        )
        theirs = LlamaRotaryEmbedding(config).inv_freq
        torch.testing.assert_close(
            torch.tensor(ours[name]), theirs, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        if factor is not None:
            ratio = base ** -(torch.arange(0, head_dim, 2) / head_dim) / theirs
            assert ratio.min() == pytest.approx(1) and ratio.max() == pytest.approx(factor)
            assert ((ratio > 1.01) & (ratio < 0.99 * factor)).any(), "some frequencies lie between the two limits"
