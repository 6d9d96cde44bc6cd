"""One record -> tokens, labels and pixels, where the batch does not show it."""

from megatron_patch.data.loading import DataConfig
from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.task_encoder import TaskEncoder
from tests.data.factories import changed


def test_every_tile_begins_where_its_placeholders_do(folder: str, settings: DataConfig) -> None:
    dataset = Dataset(folder, "train")
    encoder = TaskEncoder(changed(settings, tile_columns=2, tile_rows=1), with_pixels=True)
    records = [encoder.encode(dataset[index]) for index in range(len(dataset))]
    assert any(len(record.image_spans) == 3 for record in records), "no record has an image"
    for record in records:
        held = [place for span in record.image_spans for place in range(*span)]
        assert held == [place for place, token in enumerate(record.tokens) if token == settings.image_token_id]
        assert all(end - start == settings.image_tokens for start, end in record.image_spans)
        assert len(record.image_spans) == len(record.pixels) == record.tiles
