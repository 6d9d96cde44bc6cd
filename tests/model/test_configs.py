"""What tower and projector take over from the decoder's config, and what they do not."""

from tests.programs import in_warm_process


def test_tower_and_projector_stay_out_of_fp8() -> None:
    """Transformer Engine refuses fp8 products whose rows 16 does not divide; CLIP has 577 for each image."""
    program = """
from megatron_patch import device
device.install()
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_patch.geometry import TowerGeometry
from megatron_patch.model.llava import projector_config, tower_config
decoder = TransformerConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, bf16=True, params_dtype=torch.bfloat16, fp8="hybrid"
)
tower = TowerGeometry("clip_vision_model", 2, 1, 32, 64, 2, 28, 7, 1e-5, "quick_gelu", False, True)
for config in (tower_config(decoder, tower), projector_config(decoder)):
    print(config.fp8, config.bf16, config.params_dtype)
"""
    assert in_warm_process(program).splitlines()[-2:] == ["None True torch.bfloat16"] * 2
