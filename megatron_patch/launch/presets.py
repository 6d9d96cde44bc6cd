"""Published recipes: values of arguments given as `-` and defaults of options, which the environment overrides.

Adam's second beta of Hugging Face's trainer, which LLaVA used, is 0.999.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One stage of a recipe."""

    name: str
    stage: int
    source: str
    values: dict[str, str]


def _preset(name: str, stage: int, source: str, values: str) -> Preset:
    return Preset(name, stage, source, dict(pair.split("=") for pair in values.split()))


PRESETS = (
    _preset(
        "llava-1.5",
        1,
        "LLaVA-1.5, LLaVA-Pretrain 558k",
        "GLOBAL_BATCH_SIZE=256 LR=1e-3 MIN_LR=0 TRAIN_ITERS=2180 LR_WARMUP_ITERS=65 ADAM_BETA2=0.999",
    ),
    _preset(
        "llava-1.5",
        2,
        "LLaVA-1.5, mix665k",
        "GLOBAL_BATCH_SIZE=128 LR=2e-5 MIN_LR=0 TRAIN_ITERS=5200 LR_WARMUP_ITERS=156 ADAM_BETA2=0.999 "
        "IMAGE_ASPECT_RATIO=pad DATA_ORDER=modality",
    ),
    _preset(
        "llava-1.5-lora",
        2,
        "LLaVA-1.5's finetune_lora.sh, mix665k",
        "GLOBAL_BATCH_SIZE=128 LR=2e-4 MIN_LR=0 TRAIN_ITERS=5200 LR_WARMUP_ITERS=156 ADAM_BETA2=0.999 "
        "IMAGE_ASPECT_RATIO=pad DATA_ORDER=modality LORA_RANK=128 LORA_ALPHA=256 LORA_DROPOUT=0.05 PROJECTOR_LR=2e-5",
    ),
    _preset(
        "llava-next",
        1,
        "LLaVA-NeXT's pretrain_clip.sh, LLaVA-Pretrain 558k: one tile of each image, no newline",
        "GLOBAL_BATCH_SIZE=256 LR=1e-3 MIN_LR=0 TRAIN_ITERS=2180 LR_WARMUP_ITERS=65 ADAM_BETA2=0.999 "
        "IMAGE_ASPECT_RATIO=crop",
    ),
    _preset(
        "llava-next",
        2,
        "LLaVA-NeXT's finetune_clip.sh; iterations for 760k records",
        "GLOBAL_BATCH_SIZE=128 LR=1e-5 MIN_LR=0 TRAIN_ITERS=5940 LR_WARMUP_ITERS=178 ADAM_BETA2=0.999 "
        "IMAGE_ASPECT_RATIO=anyres DATA_ORDER=modality FREEZE_VISION_TOWER=false VISION_TOWER_LR=2e-6",
    ),
    _preset(
        "llava-onevision",
        1,
        "LLaVA-NeXT's pretrain_siglip.sh, LLaVA-Pretrain 558k: one tile of each image, no newline",
        "GLOBAL_BATCH_SIZE=256 LR=1e-3 MIN_LR=0 TRAIN_ITERS=2180 LR_WARMUP_ITERS=65 ADAM_BETA2=0.999 "
        "IMAGE_ASPECT_RATIO=crop",
    ),
    _preset(
        "llava-onevision",
        2,
        "LLaVA-NeXT's finetune_si.sh and finetune_ov.sh, for 7B",
        "GLOBAL_BATCH_SIZE=256 LR=1e-5 MIN_LR=0 ADAM_BETA2=0.999 "
        "IMAGE_ASPECT_RATIO=anyres DATA_ORDER=modality FREEZE_VISION_TOWER=false VISION_TOWER_LR=2e-6",
    ),
    _preset(
        "pai",
        1,
        "Pai-Megatron-Patch's guide",
        "GLOBAL_BATCH_SIZE=256 LR=0.00015 MIN_LR=1e-5 TRAIN_ITERS=20000 LR_WARMUP_ITERS=200",
    ),
    _preset(
        "neva",
        1,
        "NeMo's guide of NeVA",
        "BATCH_SIZE=32 GLOBAL_BATCH_SIZE=256 LR=2e-3 MIN_LR=2e-5 TRAIN_ITERS=2176 LR_WARMUP_ITERS=65 ADAM_BETA2=0.95",
    ),
    _preset(
        "neva",
        2,
        "NeMo's guide of NeVA",
        "BATCH_SIZE=8 GLOBAL_BATCH_SIZE=128 LR=2e-5 MIN_LR=2e-7 TRAIN_ITERS=5197 LR_WARMUP_ITERS=155 ADAM_BETA2=0.95 "
        "AC=full CONVERSATION_TEMPLATE=v1 DATA_ORDER=modality IMAGE_CONV_FRONT=true",
    ),
    _preset(
        "neva-notes",
        1,
        "NeVA's best-practice notes",
        "BATCH_SIZE=32 GLOBAL_BATCH_SIZE=128 LR=2e-3 MIN_LR=2e-5 TRAIN_ITERS=4650 LR_WARMUP_ITERS=140 ADAM_BETA2=0.95 "
        "WEIGHT_DECAY=0 CLIP_GRAD=1.0",
    ),
    _preset(
        "megatron-vlm",
        1,
        "Megatron-VLM's guide for Japanese LLaVA",
        "GLOBAL_BATCH_SIZE=256 LR=1e-3 MIN_LR=0 ADAM_BETA2=0.95",
    ),
    _preset(
        "megatron-vlm",
        2,
        "Megatron-VLM's guide for Japanese LLaVA",
        "GLOBAL_BATCH_SIZE=128 LR=2e-5 MIN_LR=0 ADAM_BETA2=0.95 CONVERSATION_TEMPLATE=japanese_v1",
    ),
)


def presets_of(stage: int) -> dict[str, dict[str, str]]:
    """Values by name of the recipe."""
    return {preset.name: preset.values for preset in PRESETS if preset.stage == stage}
