"""The loaders: exactly once per epoch, the same records for every layout, exact resume, refusals."""

import io
from pathlib import Path

import pytest
import torch

from megatron_patch.data import DataSettings, build_train_loader, build_valid_loader
from megatron_patch.data.encoder import IGNORED
from megatron_patch.data.loaders import TrainLoader
from megatron_patch.data.records import convert
from megatron_patch.errors import UserError
from tests.data.making import changed, make_records

TRAIN, VALID = 93, 10


def take(loader: TrainLoader, count: int) -> list[dict]:
    return [next(loader) for _ in range(count)]


def flat(batches: list[dict]) -> list[str]:
    return [name for batch in batches for name in batch["record_ids"]]


def ids(batches: list[dict]) -> list[list[str]]:
    return [batch["record_ids"] for batch in batches]


def assert_equal_batches(left: list[dict], right: list[dict]) -> None:
    assert ids(left) == ids(right)
    for one, other in zip(left, right, strict=True):
        for name in ("tokens", "labels", "pixels", "image_spans"):
            assert torch.equal(one[name], other[name]), name


def test_shapes_and_types_of_a_batch(folder: str, settings: DataSettings) -> None:
    loader = build_train_loader(folder, settings, 0, 1)
    for batch in take(loader, 30):
        rows, length = batch["tokens"].shape
        assert (rows, length % settings.length_multiple) == (settings.micro_batch_size, 0)
        assert length <= settings.decoder_seq_len
        assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
        placeholders = batch["tokens"] == settings.image_token_id
        pictures = len(batch["image_spans"])
        assert int(placeholders.sum()) == pictures * settings.image_tokens
        assert batch["pixels"].dtype == torch.uint8
        assert tuple(batch["pixels"].shape) == (pictures, 3, settings.side_px, settings.side_px)
        for row, start in batch["image_spans"].tolist():
            assert placeholders[row, start : start + settings.image_tokens].all()
        # No position predicts a placeholder or padding, and the loss never sits on them.
        labels = batch["labels"]
        assert not (labels == settings.image_token_id).any()
        assert (labels[placeholders][:: settings.image_tokens] == IGNORED).all()
        assert not (labels == 0).any()
        # Labels are the tokens shifted by one.
        trained = labels[:, :-1] != IGNORED
        assert torch.equal(labels[:, :-1][trained], batch["tokens"][:, 1:][trained])
        assert trained.any(dim=1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_gives_every_record_once_and_the_next_in_another_order(
    folder: str, settings: DataSettings, workers: int
) -> None:
    one = changed(settings, micro_batch_size=1, num_workers=workers)
    seen = [batch["record_ids"][0] for batch in take(build_train_loader(folder, one, 0, 1), 2 * TRAIN)]
    first, second = seen[:TRAIN], seen[TRAIN:]
    assert len(set(first)) == len(set(second)) == TRAIN
    assert first != sorted(first) and first != second


@pytest.mark.parametrize(("size", "workers"), [(2, 0), (2, 1), (4, 2)])
def test_ranks_see_in_a_step_what_one_rank_sees_in_as_many_micro_batches(
    folder: str, settings: DataSettings, size: int, workers: int
) -> None:
    steps = 12
    alone = take(build_train_loader(folder, changed(settings, num_workers=2), 0, 1), steps * size)
    layout = changed(settings, num_workers=workers)
    ranks = [take(build_train_loader(folder, layout, rank, size), steps) for rank in range(size)]
    assert_equal_batches(alone, [ranks[rank][step] for step in range(steps) for rank in range(size)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 13, 60])
def test_resume_is_exact(folder: str, settings: DataSettings, workers: int, taken: int, tmp_path: Path) -> None:
    layout = changed(settings, num_workers=workers)
    loader = build_train_loader(folder, layout, 1, 2)
    take(loader, taken)
    torch.save(loader.save_state(), tmp_path / "state.pt")
    expected = take(loader, 40)
    resumed = build_train_loader(folder, layout, 1, 2, state_file=str(tmp_path / "state.pt"))
    assert_equal_batches(expected, take(resumed, 40))
    assert resumed.counts == loader.counts


@pytest.mark.parametrize(("before", "after"), [((1, 0), (2, 2)), ((2, 2), (1, 0)), ((2, 1), (3, 0))])
def test_resume_with_other_ranks_workers_and_batch_size_loses_and_repeats_nothing(
    folder: str, settings: DataSettings, before: tuple[int, int], after: tuple[int, int]
) -> None:
    def run(layout: tuple[int, int], batch_size: int, state: dict | None, records: int) -> tuple[list[str], dict]:
        size, workers = layout
        chosen = changed(settings, num_workers=workers, micro_batch_size=batch_size)
        loaders = [build_train_loader(folder, chosen, rank, size, state=state) for rank in range(size)]
        seen = [
            name for _ in range(records // (size * batch_size)) for one in loaders for name in next(one)["record_ids"]
        ]
        states = [one.save_state() for one in loaders]
        assert len({one["position"] for one in states}) == 1
        return seen, states[-1]

    first, state = run(before, 2, None, 36)
    rest, _ = run(after, 3, state, TRAIN - 36 + 9)
    assert len(set(first + rest[: TRAIN - 36])) == TRAIN


def test_state_holds_plain_types_only(folder: str, settings: DataSettings) -> None:
    loader = build_train_loader(folder, settings, 0, 1)
    take(loader, 3)
    buffer = io.BytesIO()
    torch.save(loader.save_state(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == loader.save_state()
    assert loader.save_state()["position"] == 6


def test_other_data_or_seed_is_refused_by_name(folder: str, settings: DataSettings, tmp_path: Path) -> None:
    loader = build_train_loader(folder, settings, 0, 1)
    state = loader.save_state()
    with pytest.raises(UserError, match="seed: saved 7, now 8"):
        build_train_loader(folder, changed(settings, seed=8), 0, 1, state=state)
    root = make_records(tmp_path / "other", 40)
    convert(root / "data.json", [root / "images"], root / "wds")
    with pytest.raises(UserError, match="number of records: saved 93, now 36"):
        build_train_loader(str(root / "wds"), settings, 0, 1, state=state)
    with pytest.raises(UserError, match="unknown form"):
        build_train_loader(folder, settings, 0, 1, state={"something": 1})
    (tmp_path / "broken.pt").write_bytes(b"no state")
    with pytest.raises(UserError, match="cannot be read"):
        build_train_loader(folder, settings, 0, 1, state_file=str(tmp_path / "broken.pt"))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_evaluation_sees_the_same_records(folder: str, settings: DataSettings, workers: int) -> None:
    loader = build_valid_loader(folder, changed(settings, num_workers=workers), 0, 1)
    runs = []
    for _ in range(2):
        batches = iter(loader)
        runs.append([next(batches) for _ in range(8)])
    assert_equal_batches(*runs)
    seen = flat(runs[0])
    assert len(set(seen[:VALID])) == VALID and seen[VALID:] == seen[: 16 - VALID]
    two = [iter(build_valid_loader(folder, settings, rank, 2)) for rank in range(2)]
    assert flat([next(one) for _ in range(4) for one in two]) == seen


def test_without_pixels_everything_else_is_the_same(folder: str, settings: DataSettings) -> None:
    full = take(build_train_loader(folder, settings, 0, 1), 10)
    texts = take(build_train_loader(folder, settings, 0, 1, with_pixels=False), 10)
    assert all(batch["pixels"] is None for batch in texts)
    for one, other in zip(full, texts, strict=True):
        assert torch.equal(one["tokens"], other["tokens"]) and torch.equal(one["labels"], other["labels"])


def test_the_global_random_state_is_left_alone(folder: str, settings: DataSettings) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(build_train_loader(folder, changed(settings, num_workers=1), 0, 1), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_long_records_are_cut_counted_and_left_out_when_nothing_is_left(folder: str, settings: DataSettings) -> None:
    lengths = [
        int((batch["tokens"] != 0).sum())
        for batch in take(build_train_loader(folder, changed(settings, micro_batch_size=1), 0, 1), TRAIN)
    ]
    limit = sorted(lengths)[TRAIN // 2] // 4 * 4
    cut = build_train_loader(
        folder, changed(settings, micro_batch_size=1, decoder_seq_len=limit, max_skipped_share=1.0), 0, 1
    )
    batches = take(cut, TRAIN)
    assert max(batch["tokens"].shape[1] for batch in batches) == limit
    assert cut.counts["truncated"] + cut.counts["skipped"] == sum(length > limit for length in lengths) > 0
    assert cut.counts["kept"] + cut.counts["skipped"] == TRAIN
    hopeless = build_train_loader(folder, changed(settings, decoder_seq_len=40), 0, 1)
    with pytest.raises(UserError, match=r"of \d+ records had to be skipped \((no trained token|too long) \d+"):
        take(hopeless, 40)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "chatty"}, "wanted one of plain, v1, mistral, qwen"),
        ({"image_token_id": 1}, "has id 3, the model wants 1"),
        ({"decoder_seq_len": 4}, "leaves no room for text"),
        ({"image_aspect_ratio": "square"}, "wanted crop or pad or stretch"),
        ({"tokenizer_path": "absent/llava"}, "absent/llava: no such folder"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0, wanted at least 1"),
    ],
)
def test_wrong_settings_are_refused(folder: str, settings: DataSettings, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_train_loader(folder, changed(settings, **changes), 0, 1)


def test_wrong_folders_are_refused(folder: str, settings: DataSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: absent; wanted an energon folder"):
        build_train_loader(str(tmp_path / "absent"), settings, 0, 1)
    with pytest.raises(UserError, match=r"no \.nv-meta folder"):
        build_train_loader(str(tmp_path), settings, 0, 1)
    root = make_records(tmp_path / "trainonly", 20)
    convert(root / "data.json", [root / "images"], root / "wds", ratio=(1,))
    with pytest.raises(UserError, match="has no split 'val'"):
        build_valid_loader(str(root / "wds"), settings, 0, 1)
    next((root / "wds").glob("*.tar")).unlink()
    with pytest.raises(UserError, match="is missing"):
        build_train_loader(str(root / "wds"), settings, 0, 1)
