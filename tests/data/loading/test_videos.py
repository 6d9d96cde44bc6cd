"""Records with videos: what the loader of a LLaVA-OneVision makes of them, and what other models say to them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_patch.data.image import image_to_grid, image_to_pixels, open_image
from megatron_patch.data.loading import DataConfig, inspection
from megatron_patch.data.loading.collator import collate
from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.label_check import check_labels
from megatron_patch.data.loading.lengths import record_lengths
from megatron_patch.data.loading.task_encoder import TaskEncoder
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError
from megatron_patch.tile_plan import AnyResolution, video_plan
from tests import tiny_models
from tests.data.factories import changed, image_bytes, write_shards
from tests.data.torture import turns

IMAGE, VIDEO, SIDE = tiny_models.TOKENIZER_SIZE, tiny_models.TOKENIZER_SIZE + 1, 28
GRIDS = tuple((SIDE * rows, SIDE * columns) for rows in range(1, 4) for columns in range(1, 4))


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """16 placeholders of a tile, 4 of a frame."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_models.make_tiny_tokenizer(folder, "qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.save_pretrained(folder)
    return DataConfig(
        tokenizer_path=str(folder),
        template="qwen",
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_tokens=16,
        side_px=SIDE,
        image_mean=(0.5, 0.5, 0.5),
        image_aspect_ratio="anyres",
        any_resolution=AnyResolution(GRIDS, SIDE, 4, most_tiles=2, several_plain=True),
        decoder_seq_len=512,
        micro_batch_size=1,
        length_multiple=1,
        seed=0,
        num_workers=0,
    )


def sample(text: str, images: int = 0, frames: Sequence[int] | None = None, **changes: object) -> dict[str, bytes]:
    """Parts of a sample: images of odd sizes, then frames; changes: of its JSON."""
    content = {"id": "r", "conversations": turns(text, "a red digit")}
    content |= {} if frames is None else {"video_frames": list(frames)}
    count = images + sum(frames or ())
    parts = {
        f"{number}.jpg" if number else "jpg": image_bytes(number, (30 + 7 * number, 25 + 3 * (number % 4)))
        for number in range(count)
    }
    return {**parts, "json": json.dumps(content | changes).encode()}


def read(parts: dict[str, bytes]) -> dict:
    return {**parts, "__key__": "0", "__shard__": "s"}


def squeezed(parts: dict[str, bytes], numbers: Sequence[int]) -> np.ndarray:
    images = [open_image(parts[f"{number}.jpg" if number else "jpg"]) for number in numbers]
    return np.stack([image_to_pixels(image, SIDE, "stretch", (0.5,) * 3) for image in images])


def test_placeholders_plans_and_pixels_are_in_the_order_of_the_marks(onevision: DataConfig) -> None:
    parts = sample("<video> then <image> or <video>?", 1, (3, 12))
    row = TaskEncoder(onevision, with_pixels=True).encode(read(parts))
    image = open_image(parts["jpg"])
    grid = image_to_grid(image, onevision.any_resolution)
    plans = (video_plan(3, 4), onevision.any_resolution.plan((image.height, image.width)), video_plan(12, 4))
    assert row.plans == plans and [plan.frames for plan in row.plans] == [3, 0, 12] and len(grid) > 2
    assert np.array_equal(row.pixels, np.concatenate([squeezed(parts, (1, 2, 3)), grid, squeezed(parts, range(4, 16))]))
    kinds = [VIDEO, IMAGE, VIDEO]
    for (start, end), plan, kind in zip(row.image_spans, plans, kinds, strict=True):
        assert end - start == plan.tokens and set(row.tokens[start:end].tolist()) == {kind}
    assert [(row.tokens == kind).sum() for kind in (IMAGE, VIDEO)] == [plans[1].tokens, 13 + 49]
    batch = collate([row], onevision, 0, with_pixels=True)
    assert batch["plans"].tolist() == [list(plan.numbers) for plan in plans]


def test_videos_do_not_count_among_several_images(onevision: DataConfig) -> None:
    """As in transformers, where an image beside a video is cut into tiles."""
    encoder = TaskEncoder(onevision, with_pixels=True)
    assert encoder.encode(read(sample("<image><video>", 1, (2,)))).plans[0].grid != (0, 0)
    assert encoder.encode(read(sample("<image><video><image>", 2, (2,)))).plans[0].grid == (0, 0)


def test_a_single_video_stands_in_front_and_stays_so_where_images_come_first(onevision: DataConfig) -> None:
    record = cook(read(sample("what is it? <video>", 0, (2,))))
    assert record.exchanges[0].question == "<video>\nwhat is it?" and len(record.videos[0]) == 2
    assert cook(read(sample("a <video> b <image>", 1, (2,)))).exchanges[0].question == "a <video> b <image>"
    front = TaskEncoder(changed(onevision, image_conv_front=True), with_pixels=False)
    text = front.conversation.prompt(cook(read(sample("a <video> b <image>", 1, (2,)))).exchanges)
    assert "<video><image><|im_end|>" in text and "user\na  b<|im_end|>" in text


def test_neither_lengths_nor_texts_decode_a_frame(onevision: DataConfig, tmp_path: Path, monkeypatch) -> None:
    samples = [sample("<video>", 0, (5,)), sample("<image><video>", 1, (2,)), sample("hello")]
    write_shards(tmp_path, samples, 2)
    dataset, encoder = Dataset(str(tmp_path), "train"), TaskEncoder(onevision, with_pixels=True)
    rows = [encoder.encode(dataset[number]) for number in range(3)]
    for module in ("image", "loading.task_encoder"):
        monkeypatch.setattr(f"megatron_patch.data.{module}.open_image", lambda *_: pytest.fail("decoded"))
    found = record_lengths(dataset, encoder, onevision)
    assert found.tokens.tolist() == [len(row.tokens) for row in rows]
    assert found.images.tolist() == [row.tiles for row in rows] and rows[0].tiles == 5


@pytest.mark.parametrize(
    ("parts", "reason", "said"),
    [
        (sample("what?", 0, (2,)), "video marks", "0 <video> marks, 1 videos"),
        (sample("<video>", 0, (2, 3)), "video marks", "1 <video> marks, 2 videos"),
        (sample("<video>", 2), "image marks", "0 <image> marks, 2 images"),
        (sample("<video>"), "video marks", "1 <video> marks, 0 videos"),
        (sample("<image>", 0, (2,)), "image marks", "1 <image> marks, 0 images"),
        (
            sample("<video>", 0, (2,), conversations=turns("<video>", "<video>")),
            "video marks",
            "answer 1 holds <video>",
        ),
        (
            sample("what?", conversations=turns("what?", "<video>")),
            "video marks",
            "text itself holds the token <video>",
        ),
        (sample("what?", system="see <video>"), "video marks", "system sentence holds <video>"),
        (sample("<video>", 1, video_frames=[2]), "malformed", "tells of 2 frames, the sample holds 1 images"),
        (sample("<video>", 1, video_frames=[0]), "malformed", "wanted a list of numbers of frames"),
        (sample("<video>", 1, video_frames=1), "malformed", "wanted a list of numbers of frames"),
        (sample("<video>", 1, video_frames=[True]), "malformed", "wanted a list of numbers of frames"),
    ],
)
def test_what_does_not_agree_is_left_out(onevision: DataConfig, parts: dict, reason: str, said: str) -> None:
    with pytest.raises(RecordError, match=said) as error:
        TaskEncoder(onevision, with_pixels=False).encode(read(parts))
    assert error.value.reason == reason


def test_a_broken_frame_is_found_with_and_without_pixels(onevision: DataConfig) -> None:
    parts = sample("<video>", 0, (3,)) | {"1.jpg": image_bytes(1)[:-60]}
    for with_pixels in (True, False):
        with pytest.raises(RecordError, match="image truncated"):
            TaskEncoder(onevision, with_pixels).encode(read(parts))


def test_a_video_beyond_the_longest_record_is_left_out(onevision: DataConfig) -> None:
    short = TaskEncoder(changed(onevision, decoder_seq_len=40), with_pixels=False)
    with pytest.raises(RecordError, match="a video ends beyond token 40"):
        short.encode(read(sample("<video>", 0, (12,))))


CANNOT = {
    "1.5": {"video_token_id": None, "any_resolution": None, "image_aspect_ratio": "pad"},
    "NeXT": {"video_token_id": None},
    "OneVision on one tile": {"image_aspect_ratio": "crop"},
}


@pytest.mark.parametrize("model", CANNOT)
def test_a_model_without_videos_refuses_them_and_says_which_takes_them(
    onevision: DataConfig, model: str, tmp_path: Path
) -> None:
    config = changed(onevision, **CANNOT[model])
    encoder = TaskEncoder(config, with_pixels=False)
    got = "IMAGE_ASPECT_RATIO=crop" if "tile" in model else "this model, which knows no <video>"
    with pytest.raises(RecordError, match=f"1 videos for .*{got}.*, wanted a LLaVA-OneVision .*; take one, or"):
        encoder.encode(read(sample("<video>", 0, (2,))))
    write_shards(tmp_path, [sample("<video>", 0, (2,))] * 3, 3)
    with pytest.raises(UserError, match=r"3 of 3 records .*cannot be used \(video 3; .*train a LLaVA-OneVision"):
        check_labels(Dataset(str(tmp_path), "train"), encoder, 0.01)


def test_video_is_a_word_like_any_other_to_models_that_know_none(onevision: DataConfig) -> None:
    """HTML speaks of <video>; such records train as they did."""
    encoder = TaskEncoder(changed(onevision, video_token_id=None), with_pixels=False)
    record = cook(read(sample("close <video> with what?", conversations=turns("close <video> with what?", "<video/>"))))
    assert record.exchanges[0].question == "close <video> with what?"
    text = encoder.encode_text(record)
    assert text.image_spans == [] and text.plans == () and (text.tokens == VIDEO).any()


def test_inspection_tells_of_frames(onevision: DataConfig, tmp_path: Path) -> None:
    write_shards(tmp_path, [sample("<video> and <image>", 1, (3,)), sample("<video>", 0, (3,))], 2)
    dataset, encoder = Dataset(str(tmp_path), "train"), TaskEncoder(onevision, with_pixels=True)
    tokenizer = encoder.conversation._tokenizer
    shown = [inspection.show(dataset, encoder, number, tokenizer) for number in range(2)]
    assert "(video of 3 frames, 2 x 2 features each)" in inspection.describe(shown[0].encoded)
    marks = [span.text.split()[0] for span in shown[0].spans if span.kind == "image"]
    assert marks == ["<video>", "<image>"]
    figures = inspection.collect_figures(dataset, encoder, range(2), with_images=True)
    assert figures.lines()[-1] == "videos by their frames: 2 of 3"
    with Image.open(io.BytesIO(inspection.as_png(inspection.to_sheet(shown)))) as sheet:
        side, top = inspection.FRAME_SIDE, sheet.height // 2 + inspection.MARGIN
        for number, frame in enumerate(shown[1].encoded.pixels):
            left = inspection.MARGIN + number * side
            expected = inspection.to_image(frame).resize((side, side))
            assert np.array_equal(np.asarray(sheet.crop((left, top, left + side, top + side))), np.asarray(expected))
