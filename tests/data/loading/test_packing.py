"""Packed rows: which records share one, and that files give what memory gives."""

import bisect
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_patch.data.loading import packing, row_cache
from megatron_patch.data.loading.packing import PackedRows, best_fit, pack
from megatron_patch.data.loading.row_cache import packed_rows
from megatron_patch.data.loading.sampler import RecordLengths

CAPACITY = 100
COUNTS = [40, 0, 25, 60, 75]


def rows_of(records: np.ndarray, tokens: np.ndarray) -> list[tuple[int, ...]]:
    packed = pack(records, tokens, CAPACITY)
    rows = PackedRows.of([(packed, int(tokens.sum()))], len(records), CAPACITY)
    return [rows[number] for number in range(len(rows))]


def sorted_list_best_fit(tokens: list[int], capacity: int) -> list[int]:
    """Best fit as the textbook has it: of the rows with room the one with the least, and of these the first."""
    free: list[tuple[int, int]] = []
    chosen = [0] * len(tokens)
    rows = 0
    for place in sorted(range(len(tokens)), key=lambda place: -tokens[place]):
        fit = bisect.bisect_left(free, (tokens[place], -1))
        if fit < len(free):
            left, row = free.pop(fit)
        else:
            left, row, rows = capacity, rows, rows + 1
        chosen[place] = row
        bisect.insort(free, (left - tokens[place], row))
    return chosen


def test_packing_takes_the_fullest_row_that_fits() -> None:
    assert rows_of(np.arange(5), np.array([60, 50, 40, 50, 100])) == [(4,), (0, 2), (1, 3)]
    assert rows_of(np.arange(3), np.array([60, 80, 20])) == [(1, 2), (0,)]


@hypothesis_settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, CAPACITY), max_size=120))
def test_rows_are_those_of_the_textbook(tokens: list[int]) -> None:
    assert best_fit(np.array(tokens, dtype=np.int32), CAPACITY).tolist() == sorted_list_best_fit(tokens, CAPACITY)


def test_within_a_row_records_keep_their_order() -> None:
    assert rows_of(np.array([9, 4, 7]), np.array([20, 50, 30])) == [(9, 4, 7)]


@pytest.fixture
def lengths() -> RecordLengths:
    random = np.random.RandomState(5)
    return RecordLengths(random.randint(0, CAPACITY + 1, 300).astype(np.int32), np.zeros(300, dtype=np.int32))


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "LEAST_RECORDS", 1)
    monkeypatch.setattr("megatron_patch.data.loading.sampler.WINDOW_RECORDS", 50)
    monkeypatch.setattr("megatron_patch.data.loading.sampler.WINDOW_SHARDS", 1)


def every_row(rows: PackedRows) -> list[tuple[int, ...]]:
    return [rows[number] for number in range(len(rows))]


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_from_a_file_are_those_in_memory(
    cached: None, lengths: RecordLengths, shuffle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = packed_rows(COUNTS, 3, lengths, CAPACITY, shuffle, tmp_path, start=100)
    (cache,) = tmp_path.glob("llava_rows_*[!k]")
    again = packed_rows(COUNTS, 3, lengths, CAPACITY, shuffle, tmp_path, start=100)
    assert isinstance(again._records, np.memmap) and again._records.dtype == np.uint32
    monkeypatch.setattr(row_cache, "LEAST_RECORDS", 1000)
    memory = packed_rows(COUNTS, 3, lengths, CAPACITY, shuffle, tmp_path, start=100)
    assert len(memory.rows_per_window) == (3 if shuffle else 4)
    assert every_row(stored) == every_row(again) == every_row(memory)
    assert stored.fullness == memory.fullness == lengths.tokens[100:].sum() / (CAPACITY * len(memory))
    assert list(tmp_path.glob("llava_rows_*[!k]")) == [cache]


def test_other_rows_have_a_file_of_their_own(cached: None, lengths: RecordLengths, tmp_path: Path) -> None:
    packed_rows(COUNTS, 3, lengths, CAPACITY, True, tmp_path)
    for counts, seed, capacity, shuffle, start in (
        (COUNTS[::-1], 3, CAPACITY, True, 0),
        (COUNTS, 4, CAPACITY, True, 0),
        (COUNTS, 3, 200, True, 0),
        (COUNTS, 3, CAPACITY, False, 0),
        (COUNTS, 3, CAPACITY, True, 1),
    ):
        packed_rows(counts, seed, lengths, capacity, shuffle, tmp_path, start)
    other = RecordLengths(lengths.tokens, lengths.images, known_fingerprint="another")
    packed_rows(COUNTS, 3, other, CAPACITY, True, tmp_path)
    assert len(list(tmp_path.glob("llava_rows_*[!k]"))) == 7
    packed_rows(COUNTS, 5, lengths, CAPACITY, False, tmp_path)  # no seed in it
    assert len(list(tmp_path.glob("llava_rows_*[!k]"))) == 7


@pytest.mark.parametrize("name", [packing.RECORDS_FILE, packing.WINDOWS_FILE])
def test_damaged_rows_are_packed_again(cached: None, lengths: RecordLengths, name: str, tmp_path: Path) -> None:
    wanted = every_row(packed_rows(COUNTS, 3, lengths, CAPACITY, True, tmp_path))
    (file,) = tmp_path.glob(f"llava_rows_*/{name}")
    for damage in (file.read_bytes()[:-8], b""):
        file.write_bytes(damage)
        assert every_row(packed_rows(COUNTS, 3, lengths, CAPACITY, True, tmp_path)) == wanted


def test_packing_that_is_broken_off_leaves_nothing(
    cached: None, lengths: RecordLengths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(row_cache, "pack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packed_rows(COUNTS, 3, lengths, CAPACITY, True, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert len(packed_rows(COUNTS, 3, lengths, CAPACITY, True, tmp_path)) > 1


def test_a_window_that_was_lost_is_noticed() -> None:
    with pytest.raises(AssertionError, match="2 records were packed, wanted 3"):
        PackedRows.of([(pack(np.arange(2), np.array([1, 2]), CAPACITY), 3)], 3, CAPACITY)
