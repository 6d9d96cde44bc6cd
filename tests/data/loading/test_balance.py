"""Equal work: the same records in each step, no rank with more to do than needed, resume as ever."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_patch.data.loading import DataConfig, build_train_loader
from megatron_patch.data.loading.loader import TrainLoader
from megatron_patch.errors import UserError
from megatron_patch.step_balance import Layout, RecordCost, _longest_first, balanced, in_turn, rank_costs
from megatron_patch.tile_plan import AnyResolution
from tests.data.factories import changed, convert_records, image_bytes

COST = RecordCost(token=1000, pair=1, image=30_000)
TRAIN = 93


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    layout=st.builds(Layout, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)),
    seed=st.integers(0, 2**32 - 1),
    equal=st.booleans(),
)
def test_a_plan_deals_every_record_once_and_is_never_worse_than_taking_turns(
    layout: Layout, seed: int, equal: bool
) -> None:
    random = np.random.RandomState(seed)
    size = layout.step_records
    tokens = random.randint(0, 2 if equal else 3000, size).tolist()
    images = random.randint(0, 3, size).tolist()
    plan = balanced(tokens, images, COST, layout)
    assert np.array(plan).shape == (layout.ranks, layout.micro_batches, layout.records)
    assert sorted(np.ravel(plan).tolist()) == list(range(size))
    before, after = (rank_costs(one, tokens, images, COST) for one in (in_turn(layout), plan))
    assert max(after) <= max(before)


def test_what_a_rank_has_to_do() -> None:
    """By hand: two ranks, one micro-batch of two rows each, the shorter row padded to the longer."""
    tokens, images = [10, 4, 6, 6], [1, 0, 0, 2]
    first, second = 2 * (10 * 1000 + 55) + 30_000, 2 * (6 * 1000 + 21) + 60_000
    assert rank_costs(in_turn(Layout(2, 1, 2)), tokens, images, COST) == [first, second]
    # long rows beside long ones, short beside short: one rank at a time, so only the padding is saved
    plan = balanced([9, 1, 9, 1], [0] * 4, COST, Layout(1, 2, 2))
    assert sorted(map(sorted, plan[0])) == [[0, 2], [1, 3]]


def test_the_longest_goes_first_to_the_rank_that_has_least() -> None:
    """Graham's rule by hand, three items to each of two ranks: 8, then 7 and 6, then 5 and 4, then 3."""
    assert _longest_first([3, 4, 5, 6, 7, 8], 2) == [[5, 2, 1], [4, 3, 0]]


def test_the_plan_is_close_to_the_best() -> None:
    """Lengths like LLaVA-1.5's mix.  The best is at least the mean without any padding, and at least the longest."""
    random = np.random.RandomState(3)
    for layout, most in ((Layout(8, 16, 1), 1.001), (Layout(8, 8, 4), 1.06), (Layout(16, 2, 4), 1.06)):
        ratios = []
        for _ in range(20):
            images = (random.rand(layout.step_records) < 0.9).astype(int)
            texts = np.clip(random.lognormal(5.0, 0.9, layout.step_records), 20, 1400).astype(int)
            tokens, images = (texts + 576 * images).tolist(), images.tolist()
            whole = sum(map(COST.text, tokens)) + COST.image * sum(images)
            least = max(whole / layout.ranks, layout.records * COST.text(max(tokens)))
            ratios.append(max(rank_costs(balanced(tokens, images, COST, layout), tokens, images, COST)) / least)
        assert np.median(ratios) <= most, (layout, np.median(ratios))


def loaders(folder: str, config: DataConfig, size: int, state: dict | None = None) -> list[TrainLoader]:
    return [build_train_loader(folder, config, rank, size, state=state) for rank in range(size)]


def step(ranks: list[TrainLoader], records: int) -> list[str]:
    """What all ranks see in a step of so many records."""
    batch_size = ranks[0]._config.micro_batch_size
    micro_batches = records // (len(ranks) * batch_size)
    seen = [next(one)["record_ids"] for one in ranks for _ in range(micro_batches)]
    assert {len(names) for names in seen} == {batch_size}
    return [name for names in seen for name in names]


@pytest.fixture
def equal_work(settings: DataConfig) -> DataConfig:
    """Steps of twelve records."""
    return changed(settings, step_records=12, balance_cost=COST)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (3, {"num_workers": 2}),
        (4, {"micro_batch_size": 3}),
        (2, {"order": "modality", "mega_batch_mult": 2}),
        (6, {"order": "single", "micro_batch_size": 1}),
    ],
)
def test_a_step_has_the_same_records_on_any_number_of_ranks(
    folder: str, equal_work: DataConfig, size: int, changes: dict
) -> None:
    """Over two epochs, steps across their border included; without the option the same."""
    chosen = changed(equal_work, **changes)
    ranks = loaders(folder, chosen, size)
    alone = loaders(folder, chosen, 1)
    in_turns = loaders(folder, changed(chosen, balance_cost=None), size)
    seen = []
    for _ in range(2 * TRAIN // 12):
        records = step(ranks, 12)
        assert sorted(records) == sorted(step(alone, 12)) == sorted(step(in_turns, 12))
        seen += records
    assert len(set(seen[:84])) == 84 and len(set(seen)) == TRAIN


@pytest.mark.parametrize(("before", "after"), [((2, 2), (4, 3)), ((4, 3), (1, 4)), ((3, 1), (2, 6))])
def test_a_run_goes_on_with_other_ranks_and_micro_batches(
    folder: str, equal_work: DataConfig, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Within an epoch, twice, and also switched on or off or with steps of another size: nothing lost or doubled."""
    expected = step(loaders(folder, changed(equal_work, micro_batch_size=1, balance_cost=None), 1), 2 * TRAIN)
    seen, state = [], None
    runs = [
        (before, {}, 3),
        (after, {}, 2),
        (before, {"balance_cost": None}, 1),
        (after, {"step_records": 24}, 2),
        (before, {}, 4),
    ]
    for (size, batch_size), changes, steps in runs:
        chosen = changed(equal_work, micro_batch_size=batch_size, **changes)
        ranks = loaders(folder, chosen, size, state)
        for _ in range(steps):
            found = step(ranks, chosen.step_records)
            assert sorted(found) == sorted(expected[len(seen) : len(seen) + chosen.step_records])
            seen += found
        states = [one.save_state() for one in ranks]
        assert {one["position"] for one in states} == {len(seen)}
        state = states[0]
    assert len(set(seen[:TRAIN])) >= TRAIN - 12


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_on_as_many_ranks_is_exact(folder: str, equal_work: DataConfig, workers: int) -> None:
    chosen = changed(equal_work, num_workers=workers)
    ranks = loaders(folder, chosen, 2)
    for _ in range(5):
        step(ranks, 12)
    resumed = loaders(folder, chosen, 2, ranks[0].save_state())
    for _ in range(6):
        assert step(resumed, 12) == step(ranks, 12)


def test_a_state_within_a_step_is_a_mistake(folder: str, equal_work: DataConfig) -> None:
    (alone,) = loaders(folder, equal_work, 1)
    next(alone)
    with pytest.raises(AssertionError):
        alone.save_state()


def test_ranks_are_more_equal_than_without(folder: str, equal_work: DataConfig) -> None:
    """What the batches hold in truth, padding included: tokens and images of each rank, over an epoch."""

    def slowest(config: DataConfig) -> int:
        ranks, total = loaders(folder, config, 3), 0
        for _ in range(TRAIN // 12):
            costs = []
            for one in ranks:
                batches = [next(one) for _ in range(2)]
                rows = sum(int(COST.text(batch["tokens"].shape[1])) * 2 for batch in batches)
                costs.append(rows + COST.image * sum(len(batch["pixels"]) for batch in batches))
            total += max(costs)
        return total

    with_tiles = changed(equal_work, tile_columns=2)
    for chosen in (equal_work, with_tiles):
        before, after = slowest(changed(chosen, balance_cost=None)), slowest(chosen)
        print(f"slowest rank: {after / before:.3f} of what it was")
        assert after < 0.97 * before


def test_tiles_of_any_resolution_are_balanced(equal_work: DataConfig, tmp_path: Path) -> None:
    """Images of several shapes take 3 to 5 tiles; where these are all that costs, every rank gets as many."""
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nwhich digit is it?"}, {"from": "gpt", "value": "the digit"}]
    sizes, random = ((14, 28), (42, 14), (28, 28), (14, 42)), np.random.RandomState(5)
    records = []
    for number in range(60):
        name = f"{number}.png"
        (tmp_path / "images" / name).write_bytes(image_bytes(number, sizes[random.choice(4, p=(0.6, 0.1, 0.2, 0.1))]))
        records.append({"id": str(number), "image": name, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    convert_records(tmp_path, ratio=(1,))
    rule = AnyResolution(((14, 28), (28, 14), (28, 28), (42, 14), (14, 42)), side_px=14, patches=2)
    cost = RecordCost(token=0, pair=0, image=1)
    chosen = changed(equal_work, image_aspect_ratio="anyres", any_resolution=rule, balance_cost=cost)
    chosen = changed(chosen, micro_batch_size=1)

    def tiles_of_ranks(config: DataConfig) -> list[list[int]]:
        ranks = loaders(str(tmp_path / "wds"), config, 3)
        return [[sum(len(next(one)["pixels"]) for _ in range(4)) for one in ranks] for _ in range(60 // 12)]

    in_turns, dealt = tiles_of_ranks(changed(chosen, balance_cost=None)), tiles_of_ranks(chosen)
    assert list(map(sum, in_turns)) == list(map(sum, dealt)), "the same tiles in each step"
    apart, balanced_apart = ([max(step) - min(step) for step in steps] for steps in (in_turns, dealt))
    assert max(apart) >= 3, "a step of which every rank gets as many anyway proves little"
    assert max(balanced_apart) <= 2 and sum(balanced_apart) < sum(apart)


def test_ranks_change_places_from_step_to_step(folder: str, equal_work: DataConfig) -> None:
    """The record that costs most is not always the same rank's: unusable ones, which cost nothing, would pile up."""
    ranks = loaders(folder, changed(equal_work, micro_batch_size=1), 4)
    longest = []
    for _ in range(8):
        lengths = [max(next(one)["tokens"].shape[1] for _ in range(3)) for one in ranks]
        longest.append(int(np.argmax(lengths)))
    assert len(set(longest)) >= 3, longest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": True}, "balance_cost and packing exclude each other"),
        ({"step_records": 0}, "step_records is 0, wanted at least 1 with balance_cost"),
    ],
)
def test_what_cannot_be_balanced_is_refused(equal_work: DataConfig, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        changed(equal_work, **changes)


@pytest.mark.parametrize("step_records", [13, 1])
def test_a_step_that_cannot_be_shared_out_is_refused(folder: str, equal_work: DataConfig, step_records: int) -> None:
    words = f"a step of {step_records} records cannot be shared out over 3 .*multiple of 6"
    with pytest.raises(UserError, match=words):
        build_train_loader(folder, changed(equal_work, step_records=step_records), 0, 3)
