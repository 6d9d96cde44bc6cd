"""The kinds of vision towers, one row each.  A new kind that the fields can describe is one row here.

Every other file asks the row.  A kind that computes something that no field below can say needs, beside its row, the
field, and the code that computes it: model/llava.py, and its weights in conversion/table.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VisionTower:
    """What a tower of pre-norm layers has around them, and the numbers that its files may leave out."""

    whole_model: str | None  # model_type of image and text tower in one; only the former is used
    class_token: bool  # LLaVA drops its feature (vision_feature_select_strategy: default)
    pre_norm: bool  # between embedding and layers
    patch_bias: bool
    megatron_subtype: str  # CLIPViTModel's name of it: with class token and pre_norm, or with patch_bias
    activation: str  # a name of model.llava.TOWER_ACTIVATIONS, where the config names none
    norm_epsilon: float
    image_processor: str  # class of transformers
    center_crop: bool  # True: the shorter side to the tower's size, then the centre; False: squeezed to a square
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    feature_layer: int = -2  # hidden layer that a new projector sees; LLaVA's is the last but one
    pooling_head_flag: str | None = None  # flag of the config: a pooling head behind the last layer; None: none ever
    # Last layers that the original code takes off a tower of this kind before it looks at its last hidden layer: its
    # folders do not hold them, nor the pooling head.
    original_layers_dropped: int = 0
    # CLIP's name of a tensor below `vision_model.` (a layer's: below `encoder.layers.N.`), without .weight or .bias ->
    # this kind's, where it differs.
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    # Names by which folders of the original LLaVA code point to a tower -> its config, which they do not hold.
    published: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def select_strategy(self) -> str:
        """LLaVA's vision_feature_select_strategy for a new model with this tower."""
        return "default" if self.class_token else "full"

    def tensor_name(self, name: str) -> str:
        """This kind's name of a tensor that CLIP calls `name`, as `self_attn.q_proj.weight`."""
        module, _, kind = name.rpartition(".")
        return f"{self.tensor_names.get(module, module)}.{kind}" if module else name

    def has_pooling_head(self, config: Mapping[str, Any]) -> bool:
        """Does the tower with this config have a pooling head?  It never runs, and is carried along."""
        return self.pooling_head_flag is not None and config.get(self.pooling_head_flag, True)


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_LARGE |= {"projection_dim": 768, "patch_size": 14}
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BASE |= {"projection_dim": 512, "image_size": 224}

# By HF model_type.
VISION_TOWERS = {
    "clip_vision_model": VisionTower(
        whole_model="clip",
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        megatron_subtype="clip",
        activation="quick_gelu",
        norm_epsilon=1e-5,
        image_processor="CLIPImageProcessor",
        center_crop=True,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        published={
            "openai/clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
            "openai/clip-vit-large-patch14": _LARGE | {"image_size": 224},
            "openai/clip-vit-base-patch16": _BASE | {"patch_size": 16},
            "openai/clip-vit-base-patch32": _BASE | {"patch_size": 32},
        },
    ),
    "siglip_vision_model": VisionTower(
        whole_model="siglip",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        megatron_subtype="siglip",
        activation="gelu_pytorch_tanh",
        norm_epsilon=1e-6,
        image_processor="SiglipImageProcessor",
        center_crop=False,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        pooling_head_flag="vision_use_head",
        original_layers_dropped=1,
        published={
            "google/siglip-so400m-patch14-384": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 384,
            },
        },
    ),
}
OF_OPENAI_FILES = "clip_vision_model"  # the kind in OpenAI's own ViT-*.pt, which conversion/openai_clip.py reads


def whole_models() -> tuple[str, ...]:
    """model_types of models that hold a tower beside a text tower."""
    return tuple(row.whole_model for row in VISION_TOWERS.values() if row.whole_model)


def published_towers() -> dict[str, tuple[str, Mapping[str, int]]]:
    """Published name -> (model_type, config) of the towers that original LLaVA folders point to."""
    return {
        name: (model_type, config)
        for model_type, row in VISION_TOWERS.items()
        for name, config in row.published.items()
    }
