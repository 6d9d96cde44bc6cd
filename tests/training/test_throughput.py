"""FLOP of a step: the anchors for LLaVA-1.5-7B, an independent count by torch, and rules of frozen parts."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from megatron_patch.geometry import read_geometry_of
from megatron_patch.lora import LoraConfig
from megatron_patch.step_flop import Frozen, Work, step_flop
from tests import tiny_models
from toolkits.benchmark.known_models import llava

STAGE_1 = Frozen(language_model=True, vision_tower=True)
STAGE_2 = Frozen(vision_tower=True)


def one_record(tokens: int, labels: int, images: int = 1) -> Work:
    return Work(1, tokens, labels, images, tokens * (tokens + 1) // 2)


@pytest.mark.parametrize(
    ("side_px", "frozen", "text", "tera"),
    [(224, STAGE_1, 40, 8.05), (336, STAGE_1, 40, 17.01), (224, STAGE_2, 300, 22.4), (336, STAGE_2, 300, 35.8)],
)
def test_anchors_of_llava_7b(side_px: int, frozen: Frozen, text: int, tera: float) -> None:
    """Those count the head at every token; the tolerance is their last digit and the projector at 224 px."""
    geometry = llava(side_px=side_px)
    tokens = geometry.tower.image_tokens + text
    everywhere = step_flop(geometry, frozen, one_record(tokens, labels=tokens))
    assert everywhere / 1e12 == pytest.approx(tera, rel=5e-3)
    saved = (4 if frozen is STAGE_1 else 6) * 32000 * 4096 * (tokens - text)
    assert everywhere - step_flop(geometry, frozen, one_record(tokens, labels=text)) == saved


@pytest.mark.parametrize(
    "frozen",
    [
        STAGE_1,
        STAGE_2,
        Frozen(),
        Frozen(vision_tower=True, projector=True),
        Frozen(language_model=True, projector=True),
    ],
    ids=["stage 1", "stage 2", "all trained", "language alone", "tower alone"],
)
def test_count_agrees_with_torch_over_transformers(frozen: Frozen, tmp_path) -> None:
    """torch counts every matrix product of transformers' LLaVA: head at all tokens, all pairs.  (Of a tower whose last
    layer but one is taken it would also run the last.)"""
    tiny_models.make_tiny_llava(tmp_path, "mistral", tower="siglip_last")
    geometry = read_geometry_of(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    parts = {
        "vision_tower": frozen.vision_tower,
        "multi_modal_projector": frozen.projector,
        "language_model": frozen.language_model,
        "lm_head": frozen.language_model,
    }
    for name, parameter in model.named_parameters():
        part = next(part for part in parts if part in name)
        parameter.requires_grad_(not parts[part])
    text, records = 24, 2
    tokens = geometry.tower.image_tokens + text
    ids = torch.full((records, tokens), 5)
    ids[:, : geometry.tower.image_tokens] = geometry.image_token_id
    side = geometry.tower.side_px
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=torch.rand(records, 3, side, side), labels=ids).loss.backward()
    work = Work(records, records * tokens, records * tokens, records, records * tokens**2)
    assert step_flop(geometry, frozen, work) == counter.get_total_flops()


def test_adapters_cost_their_products_and_what_lies_above_them() -> None:
    """Of everything frozen nothing is backward; of adapters in the decoder its activations' gradients are."""
    geometry, work = llava(), one_record(616, 40)
    lora = LoraConfig(16, 32.0, targets=("q_proj", "down_proj"))
    nothing = Frozen(True, True, True)
    adapted = nothing.with_adapters(lora)
    products = 6 * 616 * 32 * 16 * (4096 + 4096 + 11008 + 4096)
    through = step_flop(geometry, Frozen(True, True), work) - step_flop(geometry, nothing, work)
    projector = 2 * 576 * (1024 * 4096 + 2 * 4096**2)  # of which nothing is backward here
    assert step_flop(geometry, adapted, work) - step_flop(geometry, nothing, work) == products + through - projector
    tower = Frozen(True, True, True).with_adapters(LoraConfig(16, 32.0, parts=("vision_tower",)))
    assert tower.learns("vision_tower") and not tower.learns("projector")
    less = step_flop(geometry, Frozen(True, False, True), work) - step_flop(geometry, tower, work)
    layers = 23 * 577 * 2 * 12 * 1024**2 + 2 * 3 * 14**2 * 1024 * 576  # gradients of the tower's own weights
    assert less == layers - 6 * 577 * 23 * 16 * (4 * 2048 + 2 * 5120)


def test_a_packed_row_costs_less_than_a_record_of_its_length() -> None:
    geometry = llava()
    alone = one_record(600, 20)
    pair = Work(*(2 * number for number in dataclasses.astuple(alone)))
    whole = one_record(1200, 40, images=2)
    saved = whole.pairs - pair.pairs
    assert saved == 600 * 600
    gap = step_flop(geometry, STAGE_2, whole) - step_flop(geometry, STAGE_2, pair)
    assert gap == 32 * 3 * 4 * 4096 * saved
    assert whole - pair == Work(-1, 0, 0, 0, saved)


def test_an_image_whose_features_are_cached_costs_no_tower() -> None:
    """CLIP-L/14 at 336 px: 23 layers over 577 positions, and the patches' convolution."""
    geometry, seen = llava(), one_record(616, 40)
    layers = 23 * (2 * 12 * 1024**2 * 577 + 4 * 1024 * 577**2)
    saved = layers + 2 * 3 * 14**2 * 1024 * 576
    cached = dataclasses.replace(seen, cached=1)
    assert step_flop(geometry, STAGE_1, seen) - step_flop(geometry, STAGE_1, cached) == saved
