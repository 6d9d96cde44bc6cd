"""Tokens and pixels of images of any size against transformers' own processors, the PIL ones."""

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from megatron_patch.data.image import image_size, image_to_grid, image_to_pixels, open_image
from megatron_patch.tile_plan import AnyResolution, read_candidates, video_plan, whole_image

NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
RULES = {
    "NeXT": AnyResolution(read_candidates(NEXT, 336), 336, 24),
    "OneVision": AnyResolution(read_candidates(ONEVISION, 384), 384, 27, most_tiles=9, several_plain=True),
}
NO_STATISTICS = {"image_mean": [0.5] * 3, "do_rescale": False, "do_normalize": False}


def processor(name: str):
    """transformers' image processor, uint8 out."""
    if name == "NeXT":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        square = {"height": 336, "width": 336}
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": 336}, crop_size=square, image_grid_pinpoints=NEXT, **NO_STATISTICS
        )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(
        size={"height": 384, "width": 384}, image_grid_pinpoints=ONEVISION, **NO_STATISTICS
    )


def sizes(count: int, seed: int) -> Iterator[tuple[int, int]]:
    """(height, width): photographs, thin ones, and those that fill a grid exactly."""
    draw = random.Random(seed)
    for number in range(count):
        kind = number % 4
        if kind == 0:
            yield draw.randint(100, 2000), draw.randint(100, 2000)
        elif kind == 1:
            thin = draw.randint(1, 40), draw.randint(300, 4000)
            yield thin if draw.random() < 0.5 else thin[::-1]
        elif kind == 2:
            rows, columns, scale = draw.randint(1, 24), draw.randint(1, 24), draw.randint(1, 200)
            yield rows * scale, columns * scale
        else:
            height = draw.randint(50, 1200)
            yield height, max(1, round(height * draw.choice((1.0, 4 / 3, 3 / 4, 3 / 2, 16 / 9, 9 / 16, 2.0, 0.5))))


class Tokens:
    """transformers' count of the tokens of an image, without an image: its processors need one only for its size."""

    def __init__(self, name: str) -> None:
        from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

        kind, self.side = {"NeXT": (LlavaNextProcessor, 336), "OneVision": (LlavaOnevisionProcessor, 384)}[name]
        self.made = kind.__new__(kind)
        self.made.patch_size, self.made.num_additional_image_tokens, self.made.num_image_tokens = 14, 0, 27 * 27
        self.made.vision_aspect_ratio = "anyres_max_9"

        class Pinpoints:
            image_grid_pinpoints = {"NeXT": NEXT, "OneVision": ONEVISION}[name]

        self.made.image_processor = Pinpoints

    def count(self, size: tuple[int, int]) -> int:
        return self.made._get_number_of_features(*size, self.side, self.side)


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RULES)
def test_as_many_tokens_as_in_transformers(name: str, count: int) -> None:
    judge, rule = Tokens(name), RULES[name]
    for size in [(820, 369), (369, 820), *sizes(count, seed=1)]:  # the first only come out so when rounded to 7 places
        plan = rule.plan(size)
        assert plan.tokens == judge.count(size), (size, plan)


@pytest.mark.parametrize("name", RULES)
def test_pixels_equal_those_of_transformers(name: str) -> None:
    judge, rule = processor(name), RULES[name]
    random_pixels = np.random.default_rng(2)
    for size in [(90, 90), *sizes(24, seed=3)]:  # the first fills two grids equally well
        image = Image.fromarray(random_pixels.integers(0, 256, (*size, 3), dtype=np.uint8))
        expected = np.asarray(judge(image, return_tensors="np")["pixel_values"][0])
        ours, plan = image_to_grid(image, rule), rule.plan(size)
        assert ours.shape == expected.shape and plan.tiles == len(ours), size
        assert ours.dtype == np.uint8 and np.array_equal(ours, expected), size


def test_of_grids_that_show_as_much_the_smaller_is_taken() -> None:
    """Whatever their order; in those of the published models the smaller one comes first."""
    from transformers.image_processing_utils import select_best_resolution

    candidates = ((672, 672), (336, 672), (672, 336))
    rule = AnyResolution(candidates, 336, 24)
    for size in ((300, 600), (600, 300), (300, 300), (672, 672), (900, 900)):
        assert rule.grid_size(size) == select_best_resolution(size, list(candidates))
    assert rule.grid_size((300, 600)) == (336, 672)


def test_several_images_of_one_record_are_padded_squares_in_onevision_only() -> None:
    judge, rule = processor("OneVision"), RULES["OneVision"]
    images = [
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8))
        for number, size in enumerate([(100, 300), (400, 90), (50, 50)])
    ]
    expected = judge([images], return_tensors="np")["pixel_values"]
    for image, pixels in zip(images, expected, strict=True):
        plan = rule.plan((image.height, image.width), images=3)
        assert (plan.tiles, plan.tokens, plan.newlines, plan.grid) == (1, 27 * 27 + 1, 1, (0, 0))
        assert np.array_equal(image_to_pixels(image, 384, "pad", (0.5, 0.5, 0.5), False), pixels[0])
    assert RULES["NeXT"].plan((100, 300), images=3) == RULES["NeXT"].plan((100, 300))


@pytest.mark.parametrize("frames", [1, 7, 32])
@pytest.mark.parametrize("patches", [4, 5, 24, 27])
def test_as_many_tokens_for_a_video_as_in_transformers(patches: int, frames: int) -> None:
    from transformers import LlavaOnevisionProcessor

    judge = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    judge.num_image_tokens, judge.video_token = patches**2, "v"
    seen = {"pixel_values_videos": np.empty((1, frames, 0))}
    plan = video_plan(frames, patches)
    assert plan.tokens == len(judge.replace_video_token(seen, 0))
    assert (plan.tiles, plan.frames, plan.newlines, plan.grid) == (frames, frames, 1, (0, 0))


def test_images_have_no_frames() -> None:
    rule = RULES["OneVision"]
    plans = [rule.plan((480, 640)), rule.plan((480, 640), images=2), whole_image(576), whole_image(576, tiles=5)]
    assert [plan.frames for plan in plans] == [0, 0, 0, 0]
    assert video_plan(32, 27).tokens == 32 * 196 + 1
    assert video_plan(32, 27).numbers == (32, 1, 0, 0, 0, 0, 14, 14)


@pytest.mark.parametrize("patches", [4, 5, 27])
def test_features_of_frames_are_shrunk_as_in_transformers(patches: int) -> None:
    from types import SimpleNamespace

    import torch
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    from megatron_patch.model.llava import arrange

    sizes = SimpleNamespace(vision_config=SimpleNamespace(image_size=patches, patch_size=1))
    generator = torch.Generator().manual_seed(0)
    features, newline = torch.randn(7, patches**2, 6, generator=generator), torch.ones(6)
    expected = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=sizes), features)
    found = arrange(features, [video_plan(3, patches).numbers, video_plan(4, patches).numbers], newline, patches)
    videos = [torch.cat([part.flatten(0, 1), newline[None]]) for part in (expected[:3], expected[3:])]
    assert torch.equal(found, torch.cat(videos))


def test_frames_are_squeezed_as_base_tiles_are() -> None:
    """transformers' processor of videos resizes with torchvision, which hands uint8 on to torch's interpolate.

    That differs from Pillow by two grey levels at most in frames as cameras take them.
    """
    import torch
    from torch.nn.functional import interpolate

    judge, random_pixels, worst = processor("OneVision"), np.random.default_rng(4), 0
    for size in [(384, 384), (9, 300), *sizes(8, seed=5)]:
        image = Image.fromarray(random_pixels.integers(0, 256, (*size, 3), dtype=np.uint8))
        ours = image_to_pixels(image, 384, "stretch", (0.5, 0.5, 0.5))
        assert np.array_equal(ours, judge(image, return_tensors="np")["pixel_values"][0][0])
        few = Image.fromarray(random_pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image = few.resize(size[::-1], Image.Resampling.BICUBIC)
        ours = image_to_pixels(image, 384, "stretch", (0.5, 0.5, 0.5))
        frames = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        torchs = interpolate(frames, (384, 384), mode="bicubic", antialias=True)[0].numpy()
        worst = max(worst, np.abs(ours.astype(int) - torchs).max())
    print(f"largest difference: {worst} of 255")
    assert worst <= 2


def test_known_sizes() -> None:
    assert RULES["NeXT"].plan((480, 640)).tokens == 2340
    assert RULES["OneVision"].plan((480, 640)).tokens == 2929
    plan = RULES["NeXT"].plan((480, 640))
    assert (plan.tiles, plan.grid, plan.top, plan.left, plan.shown) == (5, (2, 2), 6, 0, (36, 48))
    assert plan.numbers == (5, 36, 2, 2, 6, 0, 36, 48)
    assert whole_image(576, tiles=5).tokens == 2880 and whole_image(576).numbers == (1, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_the_size_by_the_header_is_that_of_the_image(kind: str, orientation: int) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved = {} if kind in ("GIF", "BMP") else {"exif": exif}
    if kind == "MPO":  # as telephones write them
        saved |= {"save_all": True, "append_images": [Image.new("RGB", (20, 10))]}
    Image.new("RGB", (40, 30), (200, 10, 10)).save(file, kind, **saved)
    for turned in (True, False):
        opened = open_image(file.getvalue(), turned)
        assert image_size(file.getvalue(), turned) == (opened.height, opened.width)


@pytest.mark.parametrize(
    ("pinpoints", "said"),
    [
        (None, "is None; wanted a list"),
        ([], "wanted a list"),
        ([[336, 672], [336, 700]], r"holds \[336, 700\]; .* multiples of the tower's 336"),
        ([[336]], "holds"),
        ([[0, 336]], "holds"),
        ("(1x1),...,(6x6)", "wanted a list"),
    ],
)
def test_candidates_that_no_tile_fills_are_named(pinpoints: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_candidates(pinpoints, 336)
