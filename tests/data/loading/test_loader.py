"""The loaders: exactly once per epoch, the same records for every parallelism, exact resume, refusals."""

import io
import itertools
import multiprocessing
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.energon import traverse_metadataset

from megatron_patch.data.loading import DataConfig, build_train_loader, build_valid_loader
from megatron_patch.data.loading import state as data_state
from megatron_patch.data.loading.blend import read_parts
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.loading.label_check import too_many
from megatron_patch.data.loading.loader import TrainLoader
from megatron_patch.errors import UserError
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.training.loader_state import read_saved_state
from tests.data.factories import changed, convert_records, make_records

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
        for name in ("tokens", "labels", "pixels"):
            assert torch.equal(one[name], other[name]), name


def image_starts(batch: dict, settings: DataConfig) -> list[list[int]]:
    """[row, first placeholder] of each image."""
    return (batch["tokens"] == settings.image_token_id).nonzero().tolist()[:: settings.image_tokens]


def test_shapes_and_types_of_a_batch(folder: str, settings: DataConfig) -> None:
    loader = build_train_loader(folder, settings, 0, 1)
    for batch in take(loader, 30):
        rows, length = batch["tokens"].shape
        assert (rows, length % settings.length_multiple) == (settings.micro_batch_size, 0)
        assert length <= settings.decoder_seq_len
        assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
        placeholders = batch["tokens"] == settings.image_token_id
        images = len(batch["pixels"])
        assert int(placeholders.sum()) == images * settings.image_tokens
        assert batch["pixels"].dtype == torch.uint8
        assert tuple(batch["pixels"].shape) == (images, 3, settings.side_px, settings.side_px)
        for row, start in image_starts(batch, settings):
            assert placeholders[row, start : start + settings.image_tokens].all()
        # No position predicts a placeholder or padding, and the loss never sits on them.
        labels = batch["labels"]
        assert not (labels == settings.image_token_id).any()
        assert (labels[placeholders][:: settings.image_tokens] == IGNORE_LABEL).all()
        assert not (labels == 0).any()
        # Labels are the tokens shifted by one.
        trained = labels[:, :-1] != IGNORE_LABEL
        assert torch.equal(labels[:, :-1][trained], batch["tokens"][:, 1:][trained])
        assert trained.any(dim=1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_gives_every_record_once_and_the_next_in_another_order(
    folder: str, settings: DataConfig, workers: int
) -> None:
    one = changed(settings, micro_batch_size=1, num_workers=workers)
    seen = [batch["record_ids"][0] for batch in take(build_train_loader(folder, one, 0, 1), 2 * TRAIN)]
    first, second = seen[:TRAIN], seen[TRAIN:]
    assert len(set(first)) == len(set(second)) == TRAIN
    assert first != sorted(first) and first != second


@pytest.mark.parametrize(("size", "workers"), [(2, 0), (2, 1), (4, 2)])
def test_ranks_see_in_a_step_what_one_rank_sees_in_as_many_micro_batches(
    folder: str, settings: DataConfig, size: int, workers: int
) -> None:
    steps = 12
    alone = take(build_train_loader(folder, changed(settings, num_workers=2), 0, 1), steps * size)
    parallelism = changed(settings, num_workers=workers)
    ranks = [take(build_train_loader(folder, parallelism, rank, size), steps) for rank in range(size)]
    assert_equal_batches(alone, [ranks[rank][step] for step in range(steps) for rank in range(size)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 13, 60])
def test_resume_is_exact(folder: str, settings: DataConfig, workers: int, taken: int, tmp_path: Path) -> None:
    parallelism = changed(settings, num_workers=workers)
    loader = build_train_loader(folder, parallelism, 1, 2)
    take(loader, taken)
    torch.save(loader.save_state(), tmp_path / "state.pt")
    expected = take(loader, 40)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = build_train_loader(folder, parallelism, 1, 2, state=state)
    assert_equal_batches(expected, take(resumed, 40))
    assert resumed.counts == loader.counts


@pytest.mark.parametrize(("before", "after"), [((1, 0), (2, 2)), ((2, 2), (1, 0)), ((2, 1), (3, 0))])
def test_resume_with_other_ranks_workers_and_batch_size_loses_and_repeats_nothing(
    folder: str, settings: DataConfig, before: tuple[int, int], after: tuple[int, int]
) -> None:
    def run(parallelism: tuple[int, int], batch_size: int, state: dict | None, records: int) -> tuple[list[str], dict]:
        size, workers = parallelism
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


def test_counts_go_on_under_another_number_of_ranks(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    """2 ranks, then 1, then 2, over an epoch and a half of data with bad records: sums as of one rank never stopped."""
    chosen = changed(settings, micro_batch_size=1, max_skipped_share=0.5)
    damaged = spoilt(folder, tmp_path / "wds", every=7)
    alone = build_train_loader(damaged, chosen, 0, 1)
    states: list[dict] = []
    for size, steps in ((2, 20), (1, 30), (2, 35)):
        if states:
            laid_down(states, tmp_path / "data/iter_0000005")
        loaders = []
        for rank in range(size):
            state = read_saved_state(tmp_path, 5, rank, size) if states else None
            loaders.append(build_train_loader(damaged, chosen, rank, size, state=state))
        for _ in range(steps):
            for one in loaders:
                next(one)
                next(alone)
        states = [one.save_state() for one in loaders]
        total = sum((Counter(one.counts) for one in loaders), Counter())
        assert total == Counter(alone.counts)
    assert total["skipped"] == total["skipped: not an image"] >= 10 and total["kept"] + total["skipped"] == 140
    inherited = states[0]["inherited"]
    assert inherited["kept"] + inherited["skipped"] == 70 and states[1]["inherited"] == {}
    laid_down(states, tmp_path / "data/iter_0000005")
    again = [
        build_train_loader(damaged, chosen, rank, 2, state=read_saved_state(tmp_path, 5, rank, 2)) for rank in (0, 1)
    ]
    assert [one.save_state() for one in again] == states, "as many ranks: each goes on with its own"
    (tmp_path / "data/iter_0000005/mp_rank_00/train_dataloader_dprank001.pt").unlink()
    with pytest.raises(UserError, match="no data position of rank 1 in the checkpoint"):
        read_saved_state(tmp_path, 5, 0, 1)


def test_inherited_counts_stop_no_rank(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    """Each of four ranks may skip ten records; the one rank that goes on has forty behind it and may skip ten more."""
    chosen = changed(settings, micro_batch_size=1)
    state = build_train_loader(folder, chosen, 0, 1).save_state()
    told = {"kept": 10, "truncated": 0, "skipped": 10, "skipped: turns": 10}
    state = data_state.redistribute([{**state, "counts": told}] * 4, 0, 1)
    loader = build_train_loader(folder, chosen, 0, 1, state=state)
    assert loader.counts == {"kept": 40, "truncated": 0, "skipped": 40, "skipped: turns": 40}
    take(loader, 5)
    loader._count({}, [("r", "turns", "many")] * 10)
    assert loader.counts["skipped"] == 50
    with pytest.raises(UserError, match=r"11 of 16 records had to be skipped \(turns 11\)"):
        loader._count({}, [("r", "turns", "many")])


def laid_down(states: list[dict], folder: Path) -> None:
    """Save states of all ranks as Megatron does."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "mp_rank_00").mkdir(parents=True)
    for rank, state in enumerate(states):
        torch.save({"dataloader_state_dict": state}, folder / f"mp_rank_00/train_dataloader_dprank{rank:03d}.pt")


def spoilt(folder: str, copy: Path, every: int) -> str:
    """A copy of a folder in which one record in `every` has lost its image, where it had one."""
    shutil.copytree(folder, copy)
    whole = EnergonFolder(folder, "train")
    for index in range(0, len(whole), every):
        image = whole[index].get("jpg")
        if image is not None:
            tar = copy / whole[index]["__shard__"]
            tar.write_bytes(tar.read_bytes().replace(image, b"\0" * len(image)))
    return str(copy)


def test_state_holds_plain_types_only(folder: str, settings: DataConfig) -> None:
    loader = build_train_loader(folder, settings, 0, 1)
    take(loader, 3)
    buffer = io.BytesIO()
    torch.save(loader.save_state(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == loader.save_state()
    assert loader.save_state()["position"] == 6


def test_other_data_or_seed_is_refused_by_name(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    loader = build_train_loader(folder, settings, 0, 1)
    state = loader.save_state()
    with pytest.raises(UserError, match="seed: saved 7, now 8"):
        build_train_loader(folder, changed(settings, seed=8), 0, 1, state=state)
    root = make_records(tmp_path / "other", 40)
    convert_records(root)
    with pytest.raises(UserError, match="number of records: saved 93, now 36"):
        build_train_loader(str(root / "wds"), settings, 0, 1, state=state)
    with pytest.raises(UserError, match="unknown form"):
        build_train_loader(folder, settings, 0, 1, state={"something": 1})


@pytest.mark.parametrize("workers", [0, 1])
def test_every_evaluation_sees_the_same_records(folder: str, settings: DataConfig, workers: int) -> None:
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


def test_without_pixels_everything_else_is_the_same(folder: str, settings: DataConfig) -> None:
    full = take(build_train_loader(folder, settings, 0, 1), 10)
    texts = take(build_train_loader(folder, settings, 0, 1, with_pixels=False), 10)
    assert all(batch["pixels"] is None for batch in texts)
    for one, other in zip(full, texts, strict=True):
        assert torch.equal(one["tokens"], other["tokens"]) and torch.equal(one["labels"], other["labels"])


def test_the_global_random_state_is_left_alone(folder: str, settings: DataConfig) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(build_train_loader(folder, changed(settings, num_workers=1), 0, 1), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_long_records_are_cut_counted_and_left_out_when_nothing_is_left(folder: str, settings: DataConfig) -> None:
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
    with pytest.raises(UserError, match=r"93 of 93 records looked at carry no label .*raise DECODER_SEQ_LEN"):
        build_train_loader(folder, changed(settings, decoder_seq_len=40), 0, 1)


def test_data_that_cannot_be_used_is_refused_at_the_start(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    """Every third record has two turns, which `plain` does not hold; a run would end after some batches."""
    words = (
        r"33 of 93 records looked at cannot be used \(turns 33; the last one: turns: .*tolerated are 1%; choose a CONV"
    )
    with pytest.raises(UserError, match=words):
        build_train_loader(folder, changed(settings, template="plain"), 0, 1)
    assert build_train_loader(folder, changed(settings, template="plain", max_skipped_share=0.36), 0, 1)
    damaged = spoilt(folder, tmp_path / "damaged", every=1)  # texts alone would not show it
    with pytest.raises(UserError, match=r"of 93 records looked at cannot be used \(not an image \d\d; .*leave such"):
        build_train_loader(damaged, settings, 0, 1)


def test_nothing_usable_is_refused_whatever_is_tolerated(settings: DataConfig, tmp_path: Path) -> None:
    root = make_records(tmp_path, 3)
    convert_records(root, ratio=(1,))
    damaged = spoilt(str(root / "wds"), tmp_path / "damaged", every=1)
    few = build_train_loader(damaged, changed(settings, max_skipped_share=1.0), 0, 1)
    assert few.records == 3, "one of the three has no image"
    with pytest.raises(UserError, match="2 of 3 records looked at cannot be used"):
        build_train_loader(damaged, settings, 0, 1)
    for tar in Path(damaged).glob("*.tar"):
        tar.write_bytes(b"\0" * tar.stat().st_size)
    with pytest.raises(UserError, match=r"3 of 3 records looked at cannot be used \(malformed 3"):
        build_train_loader(damaged, changed(settings, max_skipped_share=1.0), 0, 1)


@pytest.mark.parametrize(
    ("count", "of", "share", "many"),
    [
        *((10, 500, 0.01, False), (11, 500, 0.01, True), (30, 500, 0.06, False), (31, 500, 0.06, True)),
        *((10, 20, 0.01, False), (11, 20, 0.01, True), (2, 3, 0.01, True), (3, 3, 1.0, False), (0, 0, 0.01, False)),
    ],
)
def test_a_few_bad_records_are_tolerated(count: int, of: int, share: float, many: bool) -> None:
    assert too_many(count, of, share) == many


def test_a_run_that_could_never_learn_to_stop_is_refused(folder: str, settings: DataConfig) -> None:
    lengths = [
        int((batch["tokens"] != 0).sum())
        for batch in take(build_train_loader(folder, changed(settings, micro_batch_size=1), 0, 1), TRAIN)
    ]
    shortest = (min(lengths) - 1) // 4 * 4  # every answer loses at least its ending
    with pytest.raises(UserError, match=r"ends an answer \(id 2\) is a label in none of"):
        build_train_loader(folder, changed(settings, decoder_seq_len=shortest, max_skipped_share=1.0), 0, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "chatty"}, "wanted one of chatml, chatml_direct"),
        ({"image_token_id": 1}, "has id 3, the model wants 1"),
        ({"decoder_seq_len": 4}, "leaves no room for text"),
        ({"image_aspect_ratio": "square"}, "wanted crop or pad or stretch"),
        ({"tokenizer_path": "absent/llava"}, "absent/llava: no such folder"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0, wanted at least 1"),
        ({"order": "modality", "step_records": 4}, "mega_batch_mult is 0, wanted at least 1 with order modality"),
    ],
)
def test_wrong_settings_are_refused(folder: str, settings: DataConfig, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_train_loader(folder, changed(settings, **changes), 0, 1)


def test_wrong_folders_are_refused(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: absent; wanted an energon folder"):
        build_train_loader(str(tmp_path / "absent"), settings, 0, 1)
    with pytest.raises(UserError, match=r"no \.nv-meta folder"):
        build_train_loader(str(tmp_path), settings, 0, 1)
    root = make_records(tmp_path / "trainonly", 20)
    convert_records(root, ratio=(1,))
    with pytest.raises(UserError, match="has no split 'val'"):
        build_valid_loader(str(root / "wds"), settings, 0, 1)
    next((root / "wds").glob("*.tar")).unlink()
    with pytest.raises(UserError, match="is missing"):
        build_train_loader(str(root / "wds"), settings, 0, 1)


@pytest.mark.parametrize("packing", [False, True])
def test_steps_of_length_leave_few_lengths_and_lose_no_token(folder: str, settings: DataConfig, packing: bool) -> None:
    plain = changed(settings, micro_batch_size=1, packing=packing)
    steps = changed(plain, length_step=62)  # of which 64 is the next that length_multiple divides
    lengths, longest = set(), settings.longest_record
    for one, other in zip(*(take(build_train_loader(folder, each, 0, 1), 30) for each in (plain, steps)), strict=True):
        length = one["tokens"].shape[1]
        assert torch.equal(other["tokens"][:, :length], one["tokens"]) and not other["tokens"][:, length:].any()
        lengths.add(other["tokens"].shape[1])
        if packing:
            assert other["cu_seqlens"][-1] == other["tokens"].shape[1]
    assert lengths <= {*range(64, longest, 64), longest}
    short = changed(plain, packing=False, decoder_seq_len=100, length_multiple=4, length_step=62)
    assert [short.padded_length(tokens) for tokens in (30, 70, 98)] == [64, 100, 100]


def test_padding_free_batches_hold_the_records_of_padded_ones(folder: str, settings: DataConfig) -> None:
    """Micro-batch by micro-batch; rows of one length stay rows."""
    padded, free = (
        take(build_train_loader(folder, changed(settings, micro_batch_size=4, padding_free=on), 0, 1), TRAIN // 4)
        for on in (False, True)
    )
    shapes = set()
    for rows, row in zip(padded, free, strict=True):
        assert row["record_ids"] == rows["record_ids"]
        assert torch.equal(row["pixels"], rows["pixels"])
        trained = [batch["labels"][batch["labels"] != IGNORE_LABEL] for batch in (rows, row)]
        assert torch.equal(*trained)
        shapes.add("cu_seqlens" in row)
        if "cu_seqlens" in row:
            bounds = row["cu_seqlens"].tolist()
            assert row["tokens"].numel() < 0.96 * rows["tokens"].numel()
            for number, (start, end) in enumerate(itertools.pairwise(bounds)):
                width = min(end - start, rows["tokens"].shape[1])  # the last goes on to the end of the row
                assert torch.equal(row["tokens"][0, start : start + width], rows["tokens"][number, :width])
    assert True in shapes, "every batch was padded"
    alike = changed(settings, micro_batch_size=1, padding_free=True)
    assert all("cu_seqlens" not in batch for batch in take(build_train_loader(folder, alike, 0, 1), 3))


PACKED = {"packing": True, "decoder_seq_len": 512, "micro_batch_size": 1}


def test_packed_rows_hold_the_records_of_unpacked_ones(folder: str, settings: DataConfig) -> None:
    alone = {
        batch["record_ids"][0]: batch
        for batch in take(build_train_loader(folder, changed(settings, micro_batch_size=1), 0, 1), TRAIN)
    }
    packed = build_train_loader(folder, changed(settings, **PACKED, record_multiple=4, length_multiple=8), 0, 1)
    seen = []
    while len(seen) < TRAIN:
        batch = next(packed)
        bounds = batch["cu_seqlens"].tolist()
        assert batch["cu_seqlens"].dtype == torch.int32 and bounds[0] == 0
        assert batch["tokens"].shape == batch["labels"].shape == (1, bounds[-1])
        assert bounds[-1] % 8 == 0 and all(bound % 4 == 0 for bound in bounds)
        assert len(bounds) == len(batch["record_ids"]) + 1
        for name, start, end in zip(batch["record_ids"], bounds, bounds[1:], strict=False):
            record = alone[name]
            length = int((record["tokens"] != 0).sum())
            assert length <= end - start
            for part, filling in (("tokens", 0), ("labels", IGNORE_LABEL)):
                assert torch.equal(batch[part][0, start : start + length], record[part][0, :length])
                assert (batch[part][0, start + length : end] == filling).all()
        assert torch.equal(batch["pixels"], torch.cat([alone[name]["pixels"] for name in batch["record_ids"]]))
        for row, start in image_starts(batch, settings):
            assert (batch["tokens"][row, start : start + settings.image_tokens] == settings.image_token_id).all()
        seen += batch["record_ids"]
    assert sorted(seen) == sorted(alone)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 1)])
def test_an_epoch_over_a_kill_and_another_number_of_ranks_holds_every_record_once(
    folder: str, settings: DataConfig, workers: int, packing: bool, before: int, after: int
) -> None:
    """The trainer's own way: states saved with a checkpoint, everything taken after it thrown away by the kill."""
    chosen = changed(settings, micro_batch_size=1, num_workers=workers, packing=packing)
    start = [build_train_loader(folder, chosen, rank, before) for rank in range(before)]
    seen = [name for _ in range(6) for one in start for name in next(one)["record_ids"]]
    states = [one.save_state() for one in start]
    lost = [next(one)["record_ids"] for _ in range(3) for one in start]
    resumed = [build_train_loader(folder, chosen, rank, after, state=states[-1]) for rank in range(after)]
    again = [next(one)["record_ids"] for _ in range(6) for one in resumed]
    assert again[: len(lost)] == lost
    seen += flat([{"record_ids": names} for names in again])
    while len(seen) < TRAIN:
        seen += [name for one in resumed for name in next(one)["record_ids"]]
    assert len(set(seen[:TRAIN])) == TRAIN


def run_ranks(folder: str, settings: DataConfig, size: int, account: Path, seconds_per_batch: float) -> None:
    """Take batches with `size` ranks to the end of the epoch; every third step what was taken and the state are saved.

    Like training with checkpoints: both are written in one file, beside and renamed.
    """
    saved = torch.load(account, weights_only=True) if account.is_file() else {"state": None, "seen": []}
    loaders = [build_train_loader(folder, settings, rank, size, state=saved["state"]) for rank in range(size)]
    step = 0
    while len(saved["seen"]) < TRAIN:
        for one in loaders:
            saved["seen"] += next(one)["record_ids"]
        time.sleep(seconds_per_batch)
        step += 1
        if step % 3 == 0 or len(saved["seen"]) >= TRAIN:
            saved["state"] = loaders[0].save_state()
            torch.save(saved, account.with_suffix(".new"))
            account.with_suffix(".new").rename(account)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_an_epoch_over_a_real_kill_holds_every_record_once(
    folder: str, settings: DataConfig, workers: int, packing: bool, before: int, after: int, tmp_path: Path
) -> None:
    chosen = changed(settings, micro_batch_size=1, num_workers=workers, packing=packing)
    account = tmp_path / "account.pt"
    context = multiprocessing.get_context("fork")
    first = context.Process(target=run_ranks, args=(folder, chosen, before, account, 0.02))
    first.start()
    deadline = time.monotonic() + 60
    while not account.is_file() or len(torch.load(account, weights_only=True)["seen"]) < 10:
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.join()
    killed_at = len(torch.load(account, weights_only=True)["seen"])
    assert 10 <= killed_at < TRAIN
    second = context.Process(target=run_ranks, args=(folder, chosen, after, account, 0))
    second.start()
    second.join(60)
    seen = torch.load(account, weights_only=True)["seen"]
    assert len(set(seen[:TRAIN])) == TRAIN, f"killed after {killed_at}"


@pytest.mark.parametrize("packing", [False, True])
def test_two_ranks_then_one_then_two_hold_every_record_once(folder: str, settings: DataConfig, packing: bool) -> None:
    chosen = changed(settings, micro_batch_size=1, packing=packing)
    state, seen = None, []
    for size, steps in ((2, 5), (1, 7), (2, 100)):
        loaders = [build_train_loader(folder, chosen, rank, size, state=state) for rank in range(size)]
        for _ in range(steps):
            seen += [name for one in loaders for name in next(one)["record_ids"]]
        state = loaders[0].save_state()
    assert len(set(seen[:TRAIN])) == TRAIN


@pytest.mark.parametrize("changes", [{}, PACKED])
def test_a_resume_takes_the_mark_over_and_does_without(folder: str, settings: DataConfig, changes: dict) -> None:
    """Of the random numbers: a state of an older version has none."""
    loader = build_train_loader(folder, changed(settings, **changes), 0, 1)
    take(loader, 7)
    state = loader.save_state()
    marked, unmarked = (build_train_loader(folder, changed(settings, **changes), 0, 1) for _ in range(2))
    marked.load_state(state)
    unmarked.load_state({name: value for name, value in state.items() if name != "mark"})
    assert list(marked._batches.order._epochs) == [state["mark"]["epoch"]] and not unmarked._batches.order._epochs
    wanted = next(loader)["record_ids"]
    assert next(marked)["record_ids"] == next(unmarked)["record_ids"] == wanted


def test_a_packed_state_is_refused_for_other_lengths_or_another_order(folder: str, settings: DataConfig) -> None:
    state = build_train_loader(folder, changed(settings, **PACKED), 0, 1).save_state()
    for changes in ({"decoder_seq_len": 256}, {"packing": False}, {"image_tokens": 5}, {"order": "single"}):
        with pytest.raises(UserError, match="order of the records: saved cyclic, packed into 512 tokens"):
            build_train_loader(folder, changed(settings, **{**PACKED, **changes}), 0, 1, state=state)


def test_lengths_are_measured_once(folder: str, settings: DataConfig, tmp_path: Path, capfd) -> None:
    copy = tmp_path / "wds"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("llava_lengths_*"))
    build_train_loader(str(copy), changed(settings, **PACKED), 0, 1)
    assert "measuring lengths: 100%" in capfd.readouterr().err
    (saved,) = (copy / ".nv-meta").glob("llava_lengths_*.npy")
    build_train_loader(str(copy), changed(settings, **PACKED), 0, 1)
    assert "measuring" not in capfd.readouterr().err
    saved.write_bytes(saved.read_bytes()[:100])
    build_train_loader(str(copy), changed(settings, **PACKED), 0, 1)
    assert "measuring lengths: 100%" in capfd.readouterr().err


def test_steps_of_one_modality(folder: str, settings: DataConfig) -> None:
    """A fifth of the records have no image: their steps hold none at all."""
    chosen = changed(settings, order="modality", step_records=4, mega_batch_mult=3, micro_batch_size=4)
    images = [
        {sum(found == row for found, _ in image_starts(batch, settings)) for row in range(4)}
        for batch in take(build_train_loader(folder, chosen, 0, 1), TRAIN // 4 - 1)
    ]
    assert sum(kinds == {0} for kinds in images) >= 3
    assert sum(len(kinds) > 1 for kinds in images) <= 1


def test_states_of_the_two_orders_by_modality_are_told_apart(folder: str, settings: DataConfig) -> None:
    by_epoch, by_window = (
        changed(settings, order=order, step_records=4, mega_batch_mult=3) for order in ("modality", "modality_window")
    )
    loader = build_train_loader(folder, by_window, 0, 1)
    take(loader, 3)
    state = loader.save_state()
    assert next(build_train_loader(folder, by_window, 0, 1, state=state))["record_ids"] == next(loader)["record_ids"]
    windows = r"modality by windows of \d+ records \(version 1\), 4 records a step"
    with pytest.raises(UserError, match=f"saved {windows}.*, now modality, 4 records a step"):
        build_train_loader(folder, by_epoch, 0, 1, state=state)
    state = build_train_loader(folder, by_epoch, 0, 1).save_state()
    with pytest.raises(UserError, match=f"saved modality, 4 records a step.*, now {windows}"):
        build_train_loader(folder, by_window, 0, 1, state=state)


@pytest.mark.parametrize("packing", [False, True])
def test_a_blend_of_folders(folder: str, settings: DataConfig, tmp_path: Path, packing: bool) -> None:
    root = make_records(tmp_path / "other", 40, prefix="other")
    convert_records(root)
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        f"    - {{path: {folder}, weight: 1}}\n    - {{path: other/wds, weight: 3}}\n  val:\n    path: {folder}\n"
    )
    assert [str(reference.path) for reference in traverse_metadataset(str(blend), split_part="train")] == [
        part.path for part in read_parts(str(blend), "train")
    ]
    chosen = changed(settings, packing=packing, micro_batch_size=1)
    batches = take(build_train_loader(str(blend), chosen, 0, 1), 400)
    other = [any(name.startswith("other") for name in batch["record_ids"]) for batch in batches]
    assert 0.65 <= np.mean(other) <= 0.85
    assert not any(len({name.startswith("other") for name in batch["record_ids"]}) > 1 for batch in batches)
    names = [name for batch in batches for name in batch["record_ids"] if name.startswith("other")]
    assert len(set(names[:36])) == 36, "a folder's epoch holds each of its records once"
    assert len(flat(take(iter(build_valid_loader(str(blend), settings, 0, 1)), 5))) == VALID
    with pytest.raises(UserError, match="cannot be grouped by modality"):
        build_train_loader(
            str(blend), changed(chosen, packing=False, order="modality", step_records=4, mega_batch_mult=1), 0, 1
        )


def test_repetitions_count_for_an_epoch(folder: str, settings: DataConfig, tmp_path: Path) -> None:
    blend = tmp_path / "twice.yaml"
    blend.write_text(f"splits: {{train: {{blend_epochized: [{{path: {folder}, repetitions: 2}}]}}}}\n")
    loader = build_train_loader(str(blend), changed(settings, micro_batch_size=1), 0, 1)
    seen = Counter(flat(take(loader, 2 * TRAIN)))
    assert set(seen.values()) == {2} and len(seen) == TRAIN and loader.save_state()["position"] == loader.records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "has no `splits`"),
        ("splits: {val: {path: x}}", "has no split 'train' \\(it has val\\)"),
        ("splits: {train: {blend: []}}", "wanted one of blend, datasets, blend_epochized"),
        ("splits: {train: {join: [{path: x}]}}", "is no folder"),
        ("splits: {train: {blend: [{path: x, weight: -1}]}}", "has weight -1; wanted a number above 0"),
        ("splits: {train: {blend: [{path: x, weight: .nan}]}}", "has weight nan"),
        ("splits: {train: {blend: [{path: x, subset: {range: [0, 5]}}]}}", "x has subset, which is not known"),
        ("splits: {train: {blend_epochized: [{path: x, repetitions: 0.5}]}}", "wanted a whole number"),
        ("splits: {train: {path: other.yaml}}", "is a YAML file itself"),
        ("splits: {train: {path: absent}}", "absent: absent; wanted an energon folder"),
        ("splits: {{{", "cannot be read as YAML"),
    ],
)
def test_wrong_blends_are_refused(settings: DataConfig, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "blend.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        build_train_loader(str(tmp_path / "blend.yaml"), settings, 0, 1)


def test_tiles_are_images_of_their_own(folder: str, settings: DataConfig) -> None:
    plain = {
        name: batch
        for batch in take(build_train_loader(folder, changed(settings, micro_batch_size=1), 0, 1), 40)
        for name in batch["record_ids"]
    }
    tiled = build_train_loader(folder, changed(settings, micro_batch_size=1, tile_columns=2, tile_rows=1), 0, 1)
    for batch in take(tiled, 40):
        whole = plain[batch["record_ids"][0]]
        images = len(whole["pixels"])
        assert batch["pixels"].shape[0] == 3 * images == len(image_starts(batch, settings))
        placeholders = int((batch["tokens"] == settings.image_token_id).sum())
        assert placeholders == 3 * settings.image_tokens * images
        assert torch.equal(batch["pixels"][2::3], whole["pixels"]), "the thumbnail is the image untiled"
        starts = [start for _, start in image_starts(batch, settings)]
        tiles = [tile * settings.image_tokens for tile in range(min(3, len(starts)))]
        assert [start - starts[0] for start in starts[:3]] == tiles, "an image's tiles stand behind each other"
