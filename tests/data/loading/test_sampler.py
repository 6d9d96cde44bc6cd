"""Orders: every record at one position of an epoch, whatever the order; rows full; steps of one kind."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_patch.data.loading import sampler
from megatron_patch.data.loading.row_cache import packed_rows
from megatron_patch.data.loading.sampler import (
    BLEND_BLOCK,
    BlendSampler,
    GroupedSampler,
    PackedSampler,
    RecordLengths,
    RecordSampler,
    SequentialSampler,
    ShuffledSampler,
    WindowGroupedSampler,
)
from megatron_patch.errors import UserError

CAPACITY = 100


def lengths_of(tokens: list[int], seed: int = 0) -> RecordLengths:
    images = np.random.RandomState(seed).randint(0, 2, len(tokens))
    return RecordLengths(np.array(tokens, dtype=np.int32), images.astype(np.int32))


def epoch_of(chosen: RecordSampler, number: int) -> list[tuple[int, ...]]:
    return [chosen[number * chosen.positions + offset] for offset in range(chosen.positions)]


def packed_sampler(counts: list[int], seed: int, lengths: RecordLengths, capacity: int, shuffle: bool) -> PackedSampler:
    nowhere = Path("/absent")  # so few rows are not written
    return PackedSampler(packed_rows(counts, seed, lengths, capacity, shuffle, nowhere), seed, shuffle)


def flat(groups: list[tuple[int, ...]]) -> list[int]:
    return [index for group in groups for index in group]


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, CAPACITY), max_size=9), min_size=1, max_size=30),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 40),
    step=st.integers(1, 7),
)
def test_every_epoch_of_every_order_holds_every_record_once(
    shards: list[list[int]], seed: int, window: int, step: int
) -> None:
    shards[0].append(1)
    counts = [len(shard) for shard in shards]
    lengths = lengths_of([length for shard in shards for length in shard])
    saved, sampler.WINDOW_RECORDS = sampler.WINDOW_RECORDS, window
    try:
        for build in (
            lambda: ShuffledSampler(counts, seed),
            lambda: SequentialSampler(counts),
            lambda: GroupedSampler(counts, seed, lengths, step, 3),
            lambda: WindowGroupedSampler(counts, seed, lengths, step, 3),
            lambda: packed_sampler(counts, seed, lengths, CAPACITY, shuffle=True),
            lambda: packed_sampler(counts, seed, lengths, CAPACITY, shuffle=False),
        ):
            chosen = build()
            for number in (0, 1, 5):
                groups = epoch_of(chosen, number)
                assert sorted(flat(groups)) == list(range(sum(counts)))
                assert all(lengths.tokens[list(group)].sum() <= CAPACITY for group in groups)
            assert [chosen[p] for p in range(3)] == [build()[p] for p in range(3)]
    finally:
        sampler.WINDOW_RECORDS = saved


def whole_epoch(counts: list[int], seed: int, epoch: int) -> list[np.ndarray]:
    """The definition of the shuffled order, drawn at once: windows, each permuted."""
    random = np.random.RandomState([seed % 2**32, epoch])
    starts = np.cumsum([0, *counts])
    windows: list[np.ndarray] = []
    open_shards: list[np.ndarray] = []
    for shard in random.permutation(len(counts)):
        open_shards.append(np.arange(starts[shard], starts[shard + 1]))
        if len(open_shards) >= sampler.WINDOW_SHARDS and sum(map(len, open_shards)) >= sampler.WINDOW_RECORDS:
            windows.append(np.concatenate(open_shards))
            open_shards = []
    if open_shards:
        windows.append(np.concatenate(open_shards))
    return [random.permutation(window) for window in windows]


def whole_epoch_of_rows(rows_per_window: list[int], seed: int, epoch: int) -> list[int]:
    """The same for packed rows."""
    random = np.random.RandomState([seed % 2**32, epoch, 2])
    starts = np.cumsum([0, *rows_per_window])
    order = random.permutation(len(rows_per_window))
    return np.concatenate([starts[window] + random.permutation(rows_per_window[window]) for window in order]).tolist()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many windows of few records, and few of them kept."""
    for name, value in (("WINDOW_RECORDS", 20), ("WINDOW_SHARDS", 2), ("STATE_WINDOWS", 3), ("WINDOWS_KEPT", 2)):
        monkeypatch.setattr(sampler, name, value)


@pytest.mark.parametrize("seed", [0, 7, 2**35 + 1])
def test_windows_give_what_an_epoch_drawn_at_once_gives_in_any_order_of_asking(narrow: None, seed: int) -> None:
    random = np.random.RandomState(seed % 97)
    counts = [*random.randint(0, 30, 90).tolist(), 0, 0]
    epochs = {epoch: np.concatenate(whole_epoch(counts, seed, epoch)).tolist() for epoch in range(3)}
    records = sum(counts)
    wanted = [*epochs[0], *epochs[1], *epochs[2]]
    for asked in (range(2 * records), random.randint(0, 3 * records, 300).tolist(), range(records - 1, -1, -1)):
        chosen = ShuffledSampler(counts, seed)
        assert flat(chosen[position] for position in asked) == [wanted[position] for position in asked]
    lengths = lengths_of(random.randint(0, CAPACITY + 1, records).tolist())
    packed = packed_sampler(counts, seed, lengths, CAPACITY, shuffle=True)
    windows = whole_epoch(counts, seed, 0)
    sizes = packed.rows.rows_per_window.tolist()
    first = np.cumsum([0, *sizes])
    for number, window in enumerate(windows):  # each window is packed by itself
        rows = [packed.rows[row] for row in range(first[number], first[number + 1])]
        assert sorted(flat(rows)) == sorted(window)
    for epoch in (0, 4):
        order = whole_epoch_of_rows(sizes, seed, epoch)
        assert epoch_of(packed, epoch) == [packed.rows[row] for row in order]
        middle = packed.positions // 2
        again = packed_sampler(counts, seed, lengths, CAPACITY, shuffle=True)
        assert again[epoch * packed.positions + middle] == packed.rows[order[middle]], "a resume finds other rows"


def test_a_process_holds_a_few_windows_and_draws_none_twice(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [10] * 400
    drawn: list[int] = []
    draw = sampler.Windows._draw
    monkeypatch.setattr(sampler.Windows, "_draw", lambda self, number: (drawn.append(number), draw(self, number))[1])
    chosen = ShuffledSampler(counts, 1)
    step = 20  # over a border of windows again and again, as balanced steps are asked for
    for start in range(0, 4000 - step, step // 2):
        for position in (*range(start, start + step), start, start + step - 1):
            chosen[position]
    assert drawn == list(range(200))
    windows = chosen.draw(0)
    for number in range(200):
        windows.window(number)
    assert windows.window.cache_info().currsize == 2 and len(windows._states) == 67


def test_a_mark_spares_the_way_and_changes_nothing(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [10] * 400
    lengths = lengths_of(np.random.RandomState(3).randint(20, CAPACITY, 4000).tolist())
    skipped: list[int] = []
    in_one_place = sampler._in_one_place
    monkeypatch.setattr(sampler, "_in_one_place", lambda size: (skipped.append(size), in_one_place(size))[1])
    for build, most in (
        (lambda: ShuffledSampler(counts, 1), 2),
        (lambda: packed_sampler(counts, 1, lengths, CAPACITY, shuffle=True), 2),
        (lambda: BlendSampler([ShuffledSampler(counts, 1), ShuffledSampler(counts, 2)], [0, 4000], [2, 1], 3), 40),
        (lambda: SequentialSampler(counts), 0),
        (lambda: packed_sampler(counts, 1, lengths, CAPACITY, shuffle=False), 0),
        (lambda: GroupedSampler(counts, 1, lengths, 4, 3), 0),
        (lambda: WindowGroupedSampler(counts, 1, lengths, 4, 3), 0),
    ):
        order = build()
        position = 5 * order.positions - order.positions // 10  # most of an epoch, behind others
        mark = json.loads(json.dumps(order.mark(position)))
        wanted = [order[place] for place in range(position, position + 600)]
        again = build()
        skipped.clear()
        again.restore(mark)
        found = again[position]
        assert len(skipped) <= most, "it was drawn from the beginning of the epoch"
        assert [found, *(again[place] for place in range(position + 1, position + 600))] == wanted
        assert again[position - order.positions // 2] == order[position - order.positions // 2], "the way back"
        unmarked = build()
        unmarked.restore({})
        assert unmarked[position] == wanted[0]


def test_the_orders_are_the_same_for_ever() -> None:
    """Saved positions rely on it: when this fails, raise state.FORMAT."""
    shuffled = ShuffledSampler([4, 4, 4], 7)
    assert flat(shuffled[p] for p in range(14)) == [1, 7, 8, 9, 0, 5, 11, 4, 3, 2, 6, 10, 7, 2]
    lengths = lengths_of([50, 20, 70, 30, 90, 10, 40, 60, 25, 35, 45, 55])
    packed = packed_sampler([4, 4, 4], 7, lengths, CAPACITY, shuffle=True)
    rows = [(1, 8), (3, 2), (11, 10), (9, 0), (5, 4), (7, 6), (7, 6), (5, 4)]
    assert [packed[p] for p in range(8)] == rows
    grouped = GroupedSampler([4, 4, 4], 7, lengths, 2, 2)
    assert flat(grouped[p] for p in range(14)) == [0, 11, 5, 6, 2, 4, 1, 8, 9, 7, 10, 3, 7, 2]
    by_windows = WindowGroupedSampler([4, 4, 4], 7, lengths, 2, 2)
    assert flat(by_windows[p] for p in range(14)) == [10, 7, 3, 0, 2, 4, 8, 9, 5, 1, 6, 11, 9, 7]
    blend = BlendSampler([ShuffledSampler([3], 7), SequentialSampler([4])], [0, 3], [2, 1], 7)
    assert flat(blend[p] for p in range(14)) == [2, 1, 0, 3, 2, 4, 1, 0, 5, 1, 2, 6, 3, 4]


def test_packed_rows_change_their_order_but_not_their_records() -> None:
    lengths = lengths_of([30] * 300)
    packed = packed_sampler([10] * 30, 3, lengths, CAPACITY, shuffle=True)
    first, second = epoch_of(packed, 0), epoch_of(packed, 1)
    assert first != second and sorted(first) == sorted(second)
    assert {len(row) for row in first} == {3}


@pytest.mark.parametrize(("capacity", "least"), [(2048, 0.96), (4096, 0.998)])
def test_rows_are_nearly_full_on_a_realistic_mix(capacity: int, least: float) -> None:
    """Lengths like LLaVA-1.5's instruction mix: three of four with 576 image tokens, texts log-normal around 150."""
    random = np.random.RandomState(1)
    texts = np.clip(random.lognormal(5.0, 0.9, 20_000), 20, capacity - 600).astype(np.int32)
    images = (random.rand(20_000) < 0.75).astype(np.int32)
    lengths = RecordLengths(texts + 576 * images, images)
    packed = packed_sampler([1000] * 20, 1, lengths, capacity, shuffle=True)
    rows = epoch_of(packed, 0)
    fullness = lengths.tokens.sum() / (len(rows) * capacity)
    assert fullness == pytest.approx(packed.rows.fullness)
    print(f"rows of {capacity}: {fullness:.1%} full, {20_000 / len(rows):.1f} records each")
    assert fullness >= least


def test_grouped_steps_hold_one_modality_and_like_lengths() -> None:
    random = np.random.RandomState(2)
    tokens = random.randint(10, 500, 1000).astype(np.int32)
    lengths = RecordLengths(tokens, random.randint(0, 2, 1000).astype(np.int32))
    grouped = GroupedSampler([100] * 10, 5, lengths, step_records=8, mega_batch_mult=10)
    records = flat(epoch_of(grouped, 0))
    steps = [records[start : start + 8] for start in range(0, 1000, 8)]
    mixed = [step for step in steps if len({int(lengths.images[index]) for index in step}) > 1]
    assert len(mixed) <= 2  # what did not fill a step
    spread = np.median([np.ptp(tokens[step]) for step in steps])
    assert spread < 0.2 * np.ptp(tokens), spread
    middles = np.array([tokens[step].mean() for step in steps])
    assert abs(np.corrcoef(middles, np.arange(len(middles)))[0, 1]) < 0.3, "steps are in order of their length"
    assert records != flat(epoch_of(grouped, 1))


def test_steps_grouped_by_windows(narrow: None) -> None:
    """Those of each window hold one modality but for one of them, also in an epoch that begins within a step."""
    random = np.random.RandomState(2)
    counts = [10] * 97 + [7]
    records, step = sum(counts), 8
    lengths = RecordLengths(random.randint(10, 500, records).astype(np.int32), random.randint(0, 2, records))
    grouped = WindowGroupedSampler(counts, 5, lengths, step, mega_batch_mult=3)
    window = grouped.window_records
    assert window == 24  # WINDOW_RECORDS in whole steps
    for epoch in (0, 1, 3):
        first = -(-epoch * records // step) * step  # of the endless sequence, where a step begins
        steps = [flat(grouped[p] for p in range(start, start + step)) for start in range(first, first + 800, step)]
        mixed = [len({int(lengths.images[index]) for index in found}) > 1 for found in steps]
        by_window = [mixed[start : start + window // step] for start in range(0, len(mixed), window // step)]
        assert all(sum(one) <= 1 and not any(one[:-1]) for one in by_window), by_window
        assert sum(mixed) < len(mixed) / 2
    spread = np.median([np.ptp(lengths.tokens[found]) for found in steps])
    wider = WindowGroupedSampler(counts, 5, lengths, step, mega_batch_mult=1)
    alone = [flat(wider[p] for p in range(start, start + step)) for start in range(first, first + 800, step)]
    assert spread < np.median([np.ptp(lengths.tokens[found]) for found in alone])
    assert flat(epoch_of(grouped, 0)) != flat(epoch_of(grouped, 1))


def test_a_grouped_window_is_reached_without_the_others(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [10] * 400
    lengths = lengths_of([20] * 4000)
    drawn: list[int] = []
    draw = sampler._GroupedWindows._draw
    monkeypatch.setattr(
        sampler._GroupedWindows, "_draw", lambda self, number: (drawn.append(number), draw(self, number))[1]
    )
    grouped = WindowGroupedSampler(counts, 1, lengths, 4, 3)
    for position in (7999, 7998, 7999, 4000):
        grouped[position]
    assert drawn == [200, 1]
    assert grouped.draw(0).window.cache_info().maxsize == 2


def test_a_blend_keeps_its_weights_and_loses_no_record() -> None:
    orders = [ShuffledSampler([30], 1), ShuffledSampler([100], 1), SequentialSampler([7])]
    blend = BlendSampler(orders, [0, 30, 130], [3, 1, 1], seed=9)
    seen = flat(blend[position] for position in range(5 * BLEND_BLOCK))
    folders = np.digitize(seen, [30, 130])
    assert np.bincount(folders).tolist() == [3000, 1000, 1000]
    assert np.bincount(folders[:BLEND_BLOCK]).tolist() == [600, 200, 200]
    for folder, (start, size) in enumerate([(0, 30), (30, 100), (130, 7)]):
        own = [index for index in seen if start <= index < start + size]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(start, start + size)), folder
    assert flat(blend[p] for p in (4999, 3, 1500)) == [seen[4999], seen[3], seen[1500]], "reading at random differs"


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="less than 1/1000"):
        BlendSampler([SequentialSampler([5]), SequentialSampler([5])], [0, 5], [1, 5000], seed=0)


def test_lengths_have_a_fingerprint_of_their_own() -> None:
    lengths = lengths_of([5, 6, 7])
    other = dataclasses.replace(lengths, tokens=lengths.tokens + np.int32(1))
    assert lengths.fingerprint == lengths_of([5, 6, 7]).fingerprint != other.fingerprint
    stored = RecordLengths(lengths.tokens, lengths.images, known_fingerprint="read before")
    assert stored.fingerprint == "read before"
