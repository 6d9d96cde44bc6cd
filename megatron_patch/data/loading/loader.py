"""Train and valid loaders over an energon dataset.

Position p of the endless sequence holds one record, or with packing one row of them (sampler.py).  Micro-batch number k
of data-parallel rank r of R takes the positions (k * R + r) * B ... + B - 1 after the start, B being the micro-batch
size.  So in a step R ranks see what one rank sees in R times as many micro-batches, rank r's k-th is the single rank's
number k * R + r, and workers change nothing.
With a record cost (step_balance.py) the positions of each step are dealt to ranks and micro-batches in another way:
then the step as a whole, and not its micro-batches, is that of every number of ranks.
A record that cannot be used leaves an empty row (packed: a shorter one) behind: counted, named, and nobody else's
position moves.

The folders are megatron-energon's; its own loader is not used, because its order depends on ranks times workers, its
state is pickled, must be replayed and fits one parallelism only.  Here the state is one number that fits all.
"""

import logging
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_patch.data.loading import state as data_state
from megatron_patch.data.loading.balance import BalancedPositions, layout_of
from megatron_patch.data.loading.collator import as_it_is, collate, collate_packed, collate_padding_free
from megatron_patch.data.loading.config import GROUPED, DataConfig
from megatron_patch.data.loading.dataset import Dataset as EnergonDataset
from megatron_patch.data.loading.feature_cache import FeatureCache
from megatron_patch.data.loading.label_check import ALWAYS_TOLERATED, check_labels
from megatron_patch.data.loading.lengths import lengths_folder, record_lengths
from megatron_patch.data.loading.row_cache import packed_rows
from megatron_patch.data.loading.sampler import (
    BlendSampler,
    GroupedSampler,
    PackedSampler,
    RecordLengths,
    RecordSampler,
    SequentialSampler,
    ShuffledSampler,
    WindowGroupedSampler,
)
from megatron_patch.data.loading.task_encoder import EncodedRecord, TaskEncoder
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError, current_reason
from megatron_patch.errors import UserError
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.object_storage import StorageError

logger = logging.getLogger(__name__)

NAMED_IN_LOG = 100  # skipped records that are written to the log one by one

# What a step has to do, for the figures of throughput: records, their tokens without padding, the trained ones,
# images (tiles are images of their own), the pairs of tokens of which one sees the other, and of the images those whose
# features are cached, which the tower does not see.
WORK = ("records", "tokens", "labels", "images", "pairs", "cached")

NAME_OF_ERROR = f"{StorageError.__module__}.{StorageError.__name__}"

Batch = dict[str, Any]
Skipped = tuple[str, str, str]  # record, reason, detail


def build_train_loader(
    path: str,
    config: DataConfig,
    data_parallel_rank: int,
    data_parallel_size: int,
    with_pixels: bool = True,
    state: dict[str, Any] | None = None,
) -> "TrainLoader":
    """Endless loader over the train split, from its start or from a saved state.

    With config.feature_cache its batches hold `features` [N, P, hidden] in place of pixels; the records, their order
    and the state are the same.

    Raises UserError: config, data or state do not fit, or training on a first sample could not teach what it should.
    """
    dataset = EnergonDataset(path, "train")
    encoder = TaskEncoder(config, with_pixels)
    if data_parallel_rank == 0 or not dataset.stored:  # else every rank would make the same thousand requests
        check_labels(dataset, encoder, config.max_skipped_share)
    order, meaning = _train_order(dataset, encoder, config)
    features = FeatureCache(config.feature_cache) if config.feature_cache is not None else None
    loader = TrainLoader(
        _Batches(dataset, order, encoder, config, with_pixels, config.packing, features),
        config,
        data_parallel_rank,
        data_parallel_size,
        meaning,
        record_lengths(dataset, encoder, config) if config.balance_cost is not None else None,
    )
    if state is not None:
        loader.load_state(state)
    return loader


def build_valid_loader(
    path: str, config: DataConfig, data_parallel_rank: int, data_parallel_size: int, with_pixels: bool = True
) -> "ValidLoader":
    """Loader over the val split, never packed, whose every iter() starts at the first record again.

    Raises UserError.
    """
    dataset = EnergonDataset(path, "val")
    batches = _Batches(
        dataset, _stored(dataset, config), TaskEncoder(config, with_pixels), config, with_pixels, packed=False
    )
    return ValidLoader(batches, config, data_parallel_rank, data_parallel_size)


def _train_order(dataset: EnergonDataset, encoder: TaskEncoder, config: DataConfig) -> tuple[RecordSampler, str]:
    """The order of training, and a text that changes whenever its positions come to mean other records."""
    kind, seed = config.order, config.seed
    if kind in GROUPED and dataset.weights is not None:
        raise UserError(
            f"{dataset.path}: folders with weights cannot be grouped by modality, for a step would mix them; "
            "use blend_epochized with repetitions, or the order cyclic"
        )
    if not config.packing and kind not in GROUPED:
        return _blended(dataset, seed, lambda _, counts: _plain(counts, config)), kind
    lengths = record_lengths(dataset, encoder, config)
    if kind == "modality":
        step, mult = config.step_records, config.mega_batch_mult
        meaning = f"modality, {step} records a step, {mult} steps together, lengths {lengths.fingerprint}"
        return GroupedSampler(dataset.shard_counts, seed, lengths, step, mult), meaning
    if kind == "modality_window":
        step, mult = config.step_records, config.mega_batch_mult
        order = WindowGroupedSampler(dataset.shard_counts, seed, lengths, step, mult)
        meaning = (
            f"modality by windows of {order.window_records} records (version {order.VERSION}), {step} records a step, "
            f"{mult} steps together, lengths {lengths.fingerprint}"
        )
        return order, meaning

    def packed(start: int, counts: np.ndarray) -> PackedSampler:
        shuffle, folder = kind == "cyclic", lengths_folder(dataset)
        rows = packed_rows(counts, seed, lengths, config.longest_record, shuffle, folder, start)
        return PackedSampler(rows, seed, shuffle)

    meaning = f"{kind}, packed into {config.longest_record} tokens, lengths {lengths.fingerprint}"
    return _blended(dataset, seed, packed), meaning


def _plain(shard_counts: np.ndarray, config: DataConfig) -> RecordSampler:
    return ShuffledSampler(shard_counts, config.seed) if config.order == "cyclic" else SequentialSampler(shard_counts)


def _stored(dataset: EnergonDataset, config: DataConfig) -> RecordSampler:
    return _blended(dataset, config.seed, lambda _, counts: SequentialSampler(counts))


def _blended(dataset: EnergonDataset, seed: int, build: Callable[[int, np.ndarray], RecordSampler]) -> RecordSampler:
    """One order over all folders, or with weights one for each, blended; build(first record, records per shard)."""
    if dataset.weights is None:
        return build(0, dataset.shard_counts)
    orders = [build(start, folder.shard_counts) for start, folder in zip(dataset.starts, dataset.folders, strict=False)]
    return BlendSampler(orders, dataset.starts, dataset.weights, seed)


class _Batches(Dataset):
    """`batches[positions]` -> the micro-batch of what is there, with the counts of its records."""

    def __init__(
        self,
        dataset: EnergonDataset,
        order: RecordSampler,
        encoder: TaskEncoder,
        config: DataConfig,
        with_pixels: bool,
        packed: bool,
        features: FeatureCache | None = None,
    ) -> None:
        assert features is None or len(features) == len(dataset), f"{features.folder} is of another dataset"
        self.dataset, self.order = dataset, order
        self._encoder, self._config, self._with_pixels = encoder, config, with_pixels
        self._features = features
        self._collate = collate_packed if packed else collate_padding_free if config.padding_free else collate

    def __getitem__(self, positions: Sequence[int]) -> tuple[Batch, dict[str, int], list[Skipped]]:
        rows: list[EncodedRecord | None] = []
        counts = {"kept": 0, "truncated": 0}
        skipped: list[Skipped] = []
        indices = [index for position in positions for index in self.order[position]]
        reads = self.dataset.reads(indices, [self._features is None] * len(indices))
        for index, read in zip(indices, reads, strict=True):
            try:
                row = self._encode(index, read)
            except RecordError as error:
                skipped.append((self.dataset.name(index), error.reason, error.detail))
                rows.append(None)
                continue
            counts["kept"] += 1
            counts["truncated"] += row.truncated
            rows.append(row)
        kept = [row for row in rows if row is not None]
        counts |= _work(kept)
        pad_token_id = self._encoder.conversation.pad_token_id
        if self._features is None:
            return self._collate(rows, self._config, pad_token_id, self._with_pixels), counts, skipped
        batch = self._collate(rows, self._config, pad_token_id, with_pixels=False)
        counts["cached"] = counts["images"]
        if self._with_pixels:
            batch["features"] = torch.cat([self._features.none(), *(row.features for row in kept)])
        return batch, counts, skipped

    def _encode(self, index: int, read: Callable[[], dict[str, Any] | None]) -> EncodedRecord:
        try:
            parts = read()
        except (OSError, ValueError, tarfile.TarError) as error:
            raise RecordError("malformed", f"shard: {type(error).__name__}: {error}") from error
        if parts is None:
            raise RecordError("excluded", "by split.yaml")
        if self._features is None:
            return self._encoder.encode(parts)
        text = self._encoder.encode_text(cook(parts))
        return EncodedRecord(**vars(text), pixels=None, features=self._features.read(index, self._with_pixels))


def _work(rows: Sequence[EncodedRecord]) -> dict[str, int]:
    """The WORK of some records."""
    lengths = [len(row.tokens) for row in rows]
    return {
        "records": len(rows),
        "tokens": sum(lengths),
        "labels": sum(int((row.labels != IGNORE_LABEL).sum()) for row in rows),
        "images": sum(row.tiles for row in rows),
        "pairs": sum(length * (length + 1) // 2 for length in lengths),
        "cached": 0,
    }


class _Positions(Sampler[Sequence[int]]):
    """Positions of one rank's micro-batches, for ever."""

    def __init__(self, start: int, stride: int, batch_size: int) -> None:
        self._start, self._stride, self._batch_size = start, stride, batch_size

    def __iter__(self) -> Iterator[Sequence[int]]:
        position = self._start
        while True:
            yield range(position, position + self._batch_size)
            position += self._stride


class _InOneSentence:
    """Micro-batches of torch's iterator; of a worker's StorageError, which carries a traceback, the sentence is kept.

    No generator: a suspended one is part of a cycle, and workers would end only when somebody collects garbage.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> "_InOneSentence":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StorageError as error:
            raise StorageError(str(error).rstrip().splitlines()[-1].removeprefix(f"{NAME_OF_ERROR}: ")) from None


class _Loader:
    """What train and valid loaders share: positions, workers, and the record counters taken."""

    def __init__(self, batches: _Batches, config: DataConfig, data_parallel_rank: int, data_parallel_size: int) -> None:
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise UserError(f"data-parallel rank {data_parallel_rank} is not within 0..{data_parallel_size - 1}")
        self.counts: dict[str, int] = {"kept": 0, "truncated": 0, "skipped": 0}
        self.inherited: dict[str, int] = {}  # counts among those of a run with another number of ranks
        self.work: dict[str, int] = dict.fromkeys(WORK, 0)  # of the batches taken since this process started
        self.waited_s = 0.0  # seconds in which training stood still until its next batch was there
        self._batches = batches
        self._config = config
        self._rank = data_parallel_rank
        self._size = data_parallel_size

    @property
    def records(self) -> int:
        """Records of the split."""
        return len(self._batches.dataset)

    def _positions(self, position: int) -> Sampler[Sequence[int]]:
        """Of this rank's micro-batches, from a position of the sequence on."""
        batch_size = self._config.micro_batch_size
        return _Positions(position + self._rank * batch_size, self._size * batch_size, batch_size)

    def _iterate(self, position: int) -> Iterator[tuple[Batch, dict[str, int], list[Skipped]]]:
        """Micro-batches of this rank from a position of the sequence on."""
        workers = self._config.num_workers
        # The loader draws a seed for its workers: from a generator of its own, for the global one belongs to training.
        generator = torch.Generator().manual_seed(self._config.seed)
        self._batches.order[position]  # far into an epoch this takes seconds: here once, not in every worker
        batches = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._positions(position),
            num_workers=workers,
            collate_fn=as_it_is,
            generator=generator,
            prefetch_factor=2 if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        return _InOneSentence(iter(batches))

    def _count(self, counts: dict[str, int], skipped: list[Skipped]) -> None:
        """Add a batch that is being handed out; UserError when too many records had to be skipped."""
        for name, count in counts.items():
            counters = self.work if name in self.work else self.counts
            counters[name] += count
        for record, reason, detail in skipped:
            if reason == "excluded":  # by the user's own list: counted, but no fault
                self.counts["excluded"] = self.counts.get("excluded", 0) + 1
                continue
            self.counts["skipped"] += 1
            self.counts[f"skipped: {reason}"] = self.counts.get(f"skipped: {reason}", 0) + 1
            if self.counts["skipped"] <= NAMED_IN_LOG:
                logger.warning("%s: record %s skipped: %s: %s", self._batches.dataset.path, record, reason, detail)
        own = {name: count - self.inherited.get(name, 0) for name, count in self.counts.items()}
        seen = own["kept"] + own["skipped"]
        limit = max(ALWAYS_TOLERATED, self._config.max_skipped_share * seen)
        if skipped and own["skipped"] > limit:
            reasons = "; ".join(f"{name[9:]} {own[name]}" for name in own if name[:9] == "skipped: " and own[name])
            record, reason, detail = skipped[-1]
            share = f"{self._config.max_skipped_share:.0%}"
            raise UserError(
                f"{self._batches.dataset.path}: {own['skipped']} of {seen} records had to be skipped "
                f"({reasons}), the last one {record}: {reason}: {detail}; tolerated are {share}; "
                "check DECODER_SEQ_LEN, the template, and the ledger beside the shards"
            )


class TrainLoader(_Loader):
    """Endless iterator over micro-batches; its state is exact for the batches that were taken from it."""

    def __init__(
        self,
        batches: _Batches,
        config: DataConfig,
        data_parallel_rank: int,
        data_parallel_size: int,
        meaning: str,
        lengths: RecordLengths | None = None,
    ) -> None:
        """lengths: of all records, where steps are balanced."""
        super().__init__(batches, config, data_parallel_rank, data_parallel_size)
        self._meaning, self._lengths = meaning, lengths
        if lengths is not None:
            self._layout = layout_of(config.step_records, data_parallel_size, config.micro_batch_size)
        self._start = 0  # where the first step of this process begins
        self._position = 0  # where the next micro-batch of rank 0 starts, the same number on every rank
        self._iterator: Iterator[tuple[Batch, dict[str, int], list[Skipped]]] | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._iterate(self._position)
        began = time.perf_counter()
        batch, counts, skipped = next(self._iterator)
        self.waited_s += time.perf_counter() - began
        self._count(counts, skipped)
        self._position += self._size * self._config.micro_batch_size
        return batch

    def _positions(self, position: int) -> Sampler[Sequence[int]]:
        if self._lengths is None:
            return super()._positions(position)
        order = self._batches.order
        return BalancedPositions(position, self._rank, self._layout, order, self._lengths, self._config)

    def save_state(self) -> dict[str, Any]:
        """Position after the batches taken so far, and this rank's counts; no communication, plain types only.

        Where steps are balanced, only between two of them: within one, the ranks have taken other records than others
        would have.
        """
        assert self._lengths is None or (self._position - self._start) % self._config.step_records == 0
        return {
            "position": self._position,
            "mark": self._batches.order.mark(self._position),
            "data": self._expected_data(),
            "topology": self._topology(),
            "counts": dict(self.counts),
            "inherited": dict(self.inherited),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved, whatever the numbers of ranks and workers and the micro-batch size were.

        Raises UserError when it was saved for other data or another seed.  Counts go on where the state is this rank's
        own (state.redistribute makes it so) and start at zero otherwise.
        """
        self._position = data_state.check(state, self._expected_data(), self._batches.dataset.path)
        self._start = self._position
        self._batches.order.restore(state.get("mark", {}))  # older states have none, and are longer under way
        self._iterator = None
        if state["topology"] == self._topology():
            zeros = dict.fromkeys(("kept", "truncated", "skipped"), 0)
            self.counts = zeros | {current_reason(name): count for name, count in state["counts"].items()}
            self.inherited = {current_reason(name): count for name, count in state.get("inherited", {}).items()}

    def _expected_data(self) -> dict[str, Any]:
        return data_state.describe(self._batches.dataset.fingerprint, self.records, self._config.seed, self._meaning)

    def _topology(self) -> dict[str, int]:
        return {"data_parallel_rank": self._rank, "data_parallel_size": self._size}


class ValidLoader(_Loader):
    """Every iter() gives the same micro-batches from the first record on, for ever."""

    def __iter__(self) -> Iterator[Batch]:
        self.counts = {"kept": 0, "truncated": 0, "skipped": 0}  # each evaluation has counters of its own
        for batch, counts, skipped in self._iterate(0):
            self._count(counts, skipped)
            yield batch
