"""The room itself: light imports, model sizes, geometry."""

import itertools
import re
from pathlib import Path

import pytest

from megatron_patch.errors import UserError
from megatron_patch.geometry import LanguageGeometry, running_layers
from megatron_patch.model_sizes import MODEL_SIZES, check_model_size, size_name
from tests.programs import in_new_process
from tests.tiny_models import FAMILIES, text_config

ROOT = Path(__file__).parents[2]


def test_importing_the_room_loads_neither_megatron_nor_transformers():
    names = in_new_process("import sys, megatron_patch.conversion; print(*sys.modules)").split()
    assert not {name for name in names if re.match(r"(megatron|transformers|tokenizers)(\.|$)", name)}


# layers, hidden, ffn, heads, groups, head width, vocabulary, tied, QKV bias -> parameters as published
PUBLISHED = {
    "SmolLM2-135M": ((30, 576, 1536, 9, 3, 64, 49152, True), False, 134_515_008, "0.1B"),
    "Qwen2-0.5B": ((24, 896, 4864, 14, 2, 64, 151936, True), True, 494_032_768, "0.5B"),
    "TinyLlama-1.1B": ((22, 2048, 5632, 32, 4, 64, 32000, False), False, 1_100_048_384, "1B"),
    "Qwen2-1.5B": ((28, 1536, 8960, 12, 2, 128, 151936, True), True, 1_543_714_304, "1.5B"),
    "Llama-2-7B": ((32, 4096, 11008, 32, 32, 128, 32000, False), False, 6_738_415_616, "7B"),
    "Mistral-7B-v0.3": ((32, 4096, 14336, 32, 8, 128, 32768, False), False, 7_248_023_552, "7B"),
    "Qwen2.5-7B": ((28, 3584, 18944, 28, 4, 128, 152064, False), True, 7_615_616_512, "7B"),
    "Llama-3-8B": ((32, 4096, 14336, 32, 8, 128, 128256, False), False, 8_030_261_248, "8B"),
    "Llama-2-13B": ((40, 5120, 13824, 40, 40, 128, 32000, False), False, 13_015_864_320, "13B"),
    "Qwen2.5-14B": ((48, 5120, 13824, 40, 8, 128, 152064, False), True, 14_770_033_664, "14B"),
    "Qwen2.5-32B": ((64, 5120, 27648, 40, 8, 128, 152064, False), True, 32_763_876_352, "32B"),
    "Qwen2.5-72B": ((80, 8192, 29568, 64, 8, 128, 152064, False), True, 72_706_203_648, "72B"),
}


def language(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, head_dim: int, rows: int, tied: bool, qkv_bias: bool
) -> LanguageGeometry:
    sizes = {"layers": layers, "hidden": hidden, "ffn_hidden": ffn, "heads": heads, "groups": groups}
    rest = {"max_positions": 1, "norm_epsilon": 1e-5, "rope_base": 1e4, "sliding_window": None, "model_type": "any"}
    return LanguageGeometry(
        **sizes, **rest, head_dim=head_dim, vocabulary=rows, qkv_bias=qkv_bias, tied_embeddings=tied
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    sizes, bias, parameters, expected = PUBLISHED[name]
    assert language(*sizes, qkv_bias=bias).parameters == parameters
    assert size_name(parameters) == expected
    check_model_size(expected, parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_equals_transformers(family):
    from transformers import AutoModelForCausalLM

    config = text_config(family)
    model = AutoModelForCausalLM.from_config(config)
    geometry = language(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
        config.vocab_size,
        config.tie_word_embeddings,
        qkv_bias=family == "qwen2",
    )
    assert geometry.parameters == sum(tensor.numel() for tensor in model.parameters())


def test_model_sizes_touch():
    ranges = list(MODEL_SIZES.values())
    assert ranges[0][0] == 0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    assert {"0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B", "tiny", "0.1B", "1B", "8B", "13B"} == set(MODEL_SIZES)
    with pytest.raises(UserError, match="larger than every known size"):
        check_model_size("72B", 200_000_000_000)


def test_a_model_may_have_the_size_of_its_name():
    """rubraAI's Mistral-7B-Instruct-v0.3, of 8.1 billion; Llama-3-8B, of 8.03, is no 7B."""
    check_model_size("7B", 8_110_000_000)
    check_model_size("8B", 8_110_000_000)
    with pytest.raises(UserError, match="pass 8B"):
        check_model_size("7B", 8_030_261_248)


def test_running_layers():
    assert [running_layers(24, layer) for layer in (-2, -1, 23, 0, -25)] == [23, 24, 23, 0, 0]
    for wrong in ([-2], -26, 25, "x", None):
        with pytest.raises(UserError, match="vision_feature_layer"):
            running_layers(24, wrong)


def test_help_names_every_size(command):
    code, out, _ = command("--help")
    assert code == 0 and all(size in out for size in MODEL_SIZES)
