"""Tiny tokenizers, a small energon folder, and settings that fit them."""

from collections.abc import Iterator

import pytest

from megatron_patch.data.loading import DataConfig
from tests.data.factories import SPECIAL_TOKENS, convert_records, make_records, save_tokenizer
from tests.object_store import Store


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{kind: folder} of the tiny tokenizers; `nobos` is byte-level without a BOS, as Qwen's."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "metaspace": save_tokenizer(root / "metaspace", "metaspace"),
        "bytelevel": save_tokenizer(root / "bytelevel", "bytelevel"),
        "trimmed": save_tokenizer(root / "trimmed", "trimmed"),
        "nobos": save_tokenizer(root / "nobos", "bytelevel", bos=False),
    }


@pytest.fixture(scope="session")
def settings(tokenizer_folders: dict[str, str]) -> DataConfig:
    """Four placeholders per image of 14 x 14 pixels, two records per batch, no workers."""
    return DataConfig(
        tokenizer_path=tokenizer_folders["bytelevel"],
        template="v1",
        image_token_id=SPECIAL_TOKENS.index("<image>"),
        image_tokens=4,
        side_px=14,
        image_mean=(0.48, 0.46, 0.41),
        image_aspect_ratio="crop",
        decoder_seq_len=512,
        micro_batch_size=2,
        length_multiple=4,
        seed=7,
        num_workers=0,
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Energon folder of 103 records, 93 of them in train and 10 in val, in shards of ten."""
    root = make_records(tmp_path_factory.mktemp("records"), 103)
    convert_records(root)
    return str(root / "wds")


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An S3 server, at first empty."""
    store = Store(tmp_path_factory.mktemp("store"))
    yield store
    store.close()
