"""The converters' core: records and their images -> checked, counted, written as an energon folder.

Every record is in the shards or in the ledger's rejections with its reason: records in = written + rejected.

One process streams the records, checks their texts, recognises repetitions and deals them to splits and shards; workers
read and check the images and write whole shards.  What is in a shard never depends on who writes it or when, so any
number of workers gives the same bytes, and an interrupted conversion goes on with the shards that are missing.

For the same reason the shards may be shared out.  Parts (`--part i/N`) each stream all records, make every N-th shard
and note it in a journal of their own; joined, the records are streamed once more and every shard is found.
"""

import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_patch.atomic_files import sync, write_text
from megatron_patch.data.preparation import shard_writer
from megatron_patch.data.preparation.deduplication import Deduplicator, hash_of
from megatron_patch.data.preparation.journal import digest_of
from megatron_patch.data.preparation.json_stream import stream_records
from megatron_patch.data.preparation.parts import Part
from megatron_patch.data.preparation.ray_workers import RayWorkers, ray_workers
from megatron_patch.data.preparation.report import SPLITS, PreparationReport, Rejection, RejectionFile
from megatron_patch.data.preparation.sources import Source
from megatron_patch.data.preparation.verification import reopen, reopen_with_energon
from megatron_patch.data.preparation.workers import (
    Done,
    Job,
    LengthLimit,
    Sample,
    ShardBuilder,
    Workers,
    WorkersLost,
)
from megatron_patch.data.preparation.workspace import (
    LEDGER,
    JoinedWorkspace,
    PartWorkspace,
    WholeWorkspace,
    Workspace,
    partial_of,
)
from megatron_patch.data.record import read_exchanges
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError
from megatron_patch.ray_cluster import RayCluster
from megatron_patch.sight import look

__all__ = ["SPLITS", "LengthLimit", "Options", "PreparationReport", "prepare", "stream_records"]

MAX_REJECTED_SHARE = 0.01
LEAST_SHARDS = 10  # per split, where that leaves at least LEAST_SAMPLES_PER_SHARD in each
LEAST_SAMPLES_PER_SHARD = 10
ENGINES = ("local", "ray")
RECORDS_AT_ONCE = 500  # are looked up among the earlier ones together ...
TEXT_BYTES_AT_ONCE = 4 << 20  # ... or fewer, with so much text; also the most text of one shard

_encode_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class Options:
    """How to convert; the defaults suit LLaVA's own data."""

    ratio: tuple[int, ...] = (9, 1, 0)  # shares of train, val and test
    samples_per_shard: int = 1000  # at most; small sets get smaller shards, so that there are at least ten of a split
    overwrite: bool = False  # replace an output that exists
    resume: bool = False  # go on with an interrupted conversion, if there is one
    max_rejected_share: float = MAX_REJECTED_SHARE  # of the records; more of them stop the conversion ...
    keep_going: bool = False  # ... unless this is set
    reject_duplicate_ids: bool = False  # also where their contents differ
    length_limit: LengthLimit | None = None
    reopen_with_energon: bool = False  # read a few records of each split back with energon's own loader as well
    workers: int | None = None  # processes that read images and write shards; 0: none but this one; None: the cores
    part: Part | None = None  # make this part of the shards only
    join: bool = False  # make nothing, but the output of the parts that are done
    engine: str = "local"  # one of ENGINES: who reads images and writes shards, processes here or a Ray cluster
    ray_address: str | None = None  # HOST:PORT; None: RAY_ADDRESS, else the cluster of which this machine is a node

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not 1 <= len(self.ratio) <= 3 or min(self.ratio) < 0 or self.ratio[0] < 1:
            raise UserError(
                f"--split {','.join(map(str, self.ratio))}: wanted up to three whole numbers, shares of train, val and "
                "test, the first at least 1, as in 9,1,0"
            )
        if self.samples_per_shard < 1:
            raise UserError(f"--samples-per-shard {self.samples_per_shard}: wanted at least 1")
        if not 0 <= self.max_rejected_share <= 1:
            raise UserError(f"--max-rejected {self.max_rejected_share:.0%}: wanted a share from 0% to 100%")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers {self.workers}: wanted at least 0")
        if self.join and self.part is not None:
            raise UserError(f"--join --part {self.part}: exclude each other; give --join once, when all parts are done")
        if self.engine == "ray" and (self.join or self.part is not None):
            raise UserError("--engine ray: excludes --part and --join, which need no cluster; give one or the other")
        if self.engine == "ray" and self.workers == 0:
            raise UserError("--engine ray --workers 0: wanted at least 1, shards that are begun at a time")
        if self.ray_address is not None and self.engine != "ray":
            raise UserError(f"--ray-address {self.ray_address}: has no meaning without --engine ray")
        if self.length_limit is not None:
            self.length_limit.encoder()  # refuses what does not fit together

    def shape_output(self) -> dict[str, Any]:
        """Those on which the shards depend."""
        return {
            "split": list(self.ratio),
            "samples_per_shard": self.samples_per_shard,
            "reject_duplicate_ids": self.reject_duplicate_ids,
            "length_limit": None if self.length_limit is None else self.length_limit.shape_output(),
        }


StartWorkers = Callable[[ShardBuilder], Workers | RayWorkers]


class Progress(Protocol):
    """What a progress bar must be able to do; tqdm is."""

    def update(self, n: int) -> Any:
        """So many more records are done."""

    def close(self) -> None:
        """The end."""


class _Silent:
    """No progress bar."""

    def update(self, n: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def prepare(
    source: Source,
    output: Path,
    options: Options,
    progress: Callable[[int], Progress] = lambda total: _Silent(),
) -> PreparationReport:
    """Records of any source -> energon folder `output`, which grows as `<output>.partial` and is renamed at the end.

    progress: makes a progress bar for about so many records.

    Raises UserError.  When the data are refused, nothing is left behind; when the conversion is interrupted or the disk
    is full, `<output>.partial` stays and options.resume goes on with it.  So it does when a part is refused or done, or
    a join is refused.
    """
    began = time.monotonic()
    _check_output(output, options)
    if options.engine == "ray":
        with RayCluster(options.ray_address, look(source.places()), "sources, output") as cluster:
            return _convert(source, output, options, progress, ray_workers(cluster, options.workers), began)
    # One more than the cores: there is always one that waits for the disk.
    count = min(8, len(os.sched_getaffinity(0)) + 1) if options.workers is None else options.workers
    count = 0 if options.join else count
    return _convert(source, output, options, progress, lambda maker: Workers(count, maker), began)


def _convert(
    source: Source,
    output: Path,
    options: Options,
    progress: Callable[[int], Progress],
    start: StartWorkers,
    began: float,
) -> PreparationReport:
    expected = source.count()
    began_with = {**source.describe(), "records_expected": expected, **options.shape_output()}
    try:
        workspace = _open_workspace(source, output, began_with, options)
        try:
            ledger = _Preparation(source, options, workspace, expected, began).run(progress, start)
        except WorkersLost:
            workspace.leave()
            raise
        except UserError:
            workspace.refuse()
            raise
        except BaseException:
            workspace.leave()
            raise
        workspace.finish()
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error}); make room and give --resume, or remove {partial_of(output)} and "
            "give --output a place with room for the data"
        ) from error
    return ledger


def _open_workspace(source: Source, output: Path, began_with: dict[str, Any], options: Options) -> Workspace:
    """Where the shards grow.  Raises UserError."""
    if options.join:
        return JoinedWorkspace(output, began_with, look(source.places()))
    if options.part is not None:
        seen = look(source.places())
        return PartWorkspace(output, began_with, seen, options.part, options.resume, options.overwrite)
    return WholeWorkspace(output, began_with, options.resume, options.overwrite)


def _check_output(output: Path, options: Options) -> None:
    """Refuse an output that is not to be replaced."""
    if output.exists() and not options.overwrite:
        raise UserError(f"{output}: exists already; give --overwrite to replace it, or another --output")
    if output.exists() and (not output.is_dir() or (not (output / ".nv-meta").is_dir() and any(output.iterdir()))):
        raise UserError(f"{output}: is not empty and no energon folder, so --overwrite will not remove it")


@dataclass(slots=True)
class _Prepared:
    """A record whose text was found good, and the hash of its id, if it has one."""

    sample: Sample
    id_hash: int | None


def _prepare(source: Source, number: int, item: Any) -> _Prepared:
    """Check the text of a record; its images are read later.  Raises RecordError.

    `number` is the record's place in the source, used as its id when it has none.
    """
    record = source.read(item)
    read_exchanges(record.conversations, len(record.images), len(record.videos))
    rest: dict[str, Any] = {"conversations": record.conversations}
    if record.image_names is not None:
        rest["image"] = record.image_names
    if record.video_names is not None:
        rest["video"] = record.video_names
    if record.system is not None:
        rest["system"] = record.system
    body = _encode_json(rest)[1:].encode("utf-8", "surrogatepass")
    images, videos = tuple(record.images), tuple(record.videos)
    record_id = number if record.record_id is None else record.record_id
    head = b'{"id": ' + _encode_json(str(record_id)).encode("utf-8", "surrogatepass") + b", "
    if record.record_id is None:
        return _Prepared(Sample(number, head + body, images, hash_of(body), videos=videos), None)
    data = head + body
    return _Prepared(Sample(number, data, images, hash_of(data), videos=videos), hash_of(head))


class SplitChooser:
    """Deals records to splits: in every block of sum(ratio) records each split gets its exact share, at random places.

    Blocks keep small sets fair; random places keep a pattern in the source out of the splits.  The very first record
    goes to train.
    """

    def __init__(self, ratio: tuple[int, ...], seed: int = 0) -> None:
        self._block = [split for split, share in zip(SPLITS, ratio, strict=False) for _ in range(share)]
        self._random = random.Random(seed)
        self._dealt = self._random.sample(self._block, len(self._block))
        last_train = max(place for place, split in enumerate(self._dealt) if split == "train")
        self._dealt.append(self._dealt.pop(last_train))

    def next(self) -> str:
        """Split of the next record."""
        if not self._dealt:
            self._dealt = self._random.sample(self._block, len(self._block))
        return self._dealt.pop()


class _Dealer:
    """Collects the samples of each split until they fill a shard."""

    def __init__(self, options: Options, expected: int) -> None:
        self._chooser = SplitChooser(options.ratio)
        self._most = {}
        for split, share in zip(SPLITS, options.ratio, strict=False):
            smaller = max(LEAST_SAMPLES_PER_SHARD, -(-expected * share // sum(options.ratio) // LEAST_SHARDS))
            self._most[split] = min(options.samples_per_shard, smaller)
        self._samples: dict[str, list[Sample]] = {split: [] for split in self._most}
        self._text_bytes = dict.fromkeys(self._most, 0)
        self._shards = dict.fromkeys(self._most, 0)
        self._jobs = 0

    def deal(self, sample: Sample) -> Iterator[Job]:
        """Put a sample into its shard; gives the shard when it is full."""
        split = self._chooser.next()
        self._samples[split].append(sample)
        self._text_bytes[split] += len(sample.data)
        if len(self._samples[split]) == self._most[split] or self._text_bytes[split] >= TEXT_BYTES_AT_ONCE:
            yield self._job(split)

    def rest(self) -> Iterator[Job]:
        """The last shard of each split."""
        for split, samples in self._samples.items():
            if samples:
                yield self._job(split)

    def _job(self, split: str) -> Job:
        job = Job(split, shard_writer.shard_name(split, self._shards[split]), self._samples[split], self._jobs)
        self._samples[split], self._text_bytes[split] = [], 0
        self._shards[split] += 1
        self._jobs += 1
        return job


class _Preparation:
    """One run over a source."""

    def __init__(self, source: Source, options: Options, workspace: Workspace, expected: int, began: float) -> None:
        self._source = source
        self._options = options
        self._workspace = workspace
        self._expected = expected
        self._began = began
        self._accounted = 0  # records, as far as the progress bar knows
        self._ledger = PreparationReport(Path(source.name).name)
        self._counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}  # split -> shard -> samples
        # A part's are in its journal, or found again when the parts are joined.
        self._rejections = None if options.part else RejectionFile(workspace.folder / "rejected.jsonl")
        self._ids = Deduplicator()
        self._contents = Deduplicator()

    def run(self, progress: Callable[[int], Progress], start: StartWorkers) -> PreparationReport:
        """Write shards, rejections, ledger and `.nv-meta`, and read them back.  Raises UserError and OSError."""
        folder = self._workspace.folder
        try:
            self._write_shards(progress, start)
            self._check_limit(self._ledger.records_in)
            if self._rejections is not None:
                self._rejections.finish()
        finally:
            if self._rejections is not None:
                self._rejections.close()
        self._ledger.check()
        if self._ledger.records_in == 0:
            raise UserError(f"{self._source.name}: holds no records")
        if self._options.part is not None:
            self._ledger.seconds = time.monotonic() - self._began
            return self._ledger
        for left in folder.glob("*.part-*"):  # by workers on machines that died
            left.unlink(missing_ok=True)
        self._fill_train()
        shard_writer.write_meta(folder, self._counts)
        write_text(folder / LEDGER, json.dumps(self._ledger.to_json(), indent=2) + "\n", durable=True)
        with ThreadPoolExecutor(8) as threads:  # waiting together takes the disk little longer than waiting once
            list(threads.map(sync, folder.iterdir()))
        sync(folder)
        written = time.monotonic()
        self._ledger.seconds = written - self._began
        filled = [split for split in SPLITS if self._ledger.written[split]]
        found = reopen(folder)
        assert found == {split: self._ledger.written[split] for split in filled}, (found, self._ledger)
        if self._options.reopen_with_energon:
            found = reopen_with_energon(folder, filled)
        self._ledger.seconds_to_reopen = time.monotonic() - written
        assert found == {split: self._ledger.written[split] for split in filled}, (found, self._ledger)
        return self._ledger

    def _write_shards(self, progress: Callable[[int], Progress], start: StartWorkers) -> None:
        options = self._options
        maker = ShardBuilder(self._source, self._workspace.folder, options.length_limit)
        waiting: deque[tuple[str, str, str, Future[Done] | Done]] = deque()
        with start(maker) as workers:
            bar = None
            try:
                for job in self._jobs():
                    if options.part and Part.of_job(job.number, options.part.count) != options.part:
                        self._ledger.of_other_parts += len(job.samples)
                        continue
                    found = self._workspace.find(job)
                    begun = workers.submit(job) if found is None else found
                    # Not the job itself, whose texts would stay in memory.
                    waiting.append((job.split, job.name, digest_of(job), begun))
                    bar = bar or progress(self._expected)  # after the workers were forked: it may start a thread
                    while len(waiting) > workers.at_once:
                        bar.update(self._enter(workers, *waiting.popleft()))
                while waiting:
                    bar.update(self._enter(workers, *waiting.popleft()))
            finally:
                if bar is not None:
                    bar.close()

    def _jobs(self) -> Iterator[Job]:
        """Stream the source: every record goes into a job or is rejected."""
        dealer = _Dealer(self._options, self._expected)
        block: list[_Prepared] = []
        text_bytes = 0
        for number, item in enumerate(self._source.items()):
            self._ledger.records_in += 1
            try:
                prepared = _prepare(self._source, number, item)
            except RecordError as error:
                self._reject(Rejection.of(number, item, error))
                continue
            block.append(prepared)
            text_bytes += len(prepared.sample.data)
            if len(block) == RECORDS_AT_ONCE or text_bytes >= TEXT_BYTES_AT_ONCE:
                for sample in self._without_repeats(block):
                    yield from dealer.deal(sample)
                block, text_bytes = [], 0
        for sample in self._without_repeats(block):
            yield from dealer.deal(sample)
        yield from dealer.rest()

    def _without_repeats(self, block: list[_Prepared]) -> Iterator[Sample]:
        """The samples that are no repetition of an earlier record; the others are rejected."""
        hashes = np.array([prepared.sample.content for prepared in block], dtype=np.uint64)
        fresh = []
        for prepared, repeated in zip(block, self._contents.add(hashes), strict=True):
            if repeated:
                error = RecordError("duplicate", "of an earlier record, word for word")
                self._reject(Rejection.of(prepared.sample.number, json.loads(prepared.sample.data), error))
            else:
                fresh.append(prepared)
        with_id = [prepared for prepared in fresh if prepared.id_hash is not None]
        id_hashes = np.array([prepared.id_hash for prepared in with_id], dtype=np.uint64)
        repeats = {p.sample.number for p, repeated in zip(with_id, self._ids.add(id_hashes), strict=True) if repeated}
        for prepared in fresh:
            sample = prepared.sample
            if sample.number not in repeats:
                yield sample
            elif self._options.reject_duplicate_ids:
                error = RecordError("duplicate id", "of an earlier record with other content")
                self._reject(Rejection.of(sample.number, json.loads(sample.data), error))
            else:
                yield sample._replace(repeats_id=True)

    def _enter(
        self, workers: Workers | RayWorkers, split: str, shard: str, digest: str, begun: "Future[Done] | Done"
    ) -> int:
        """Enter a job into the report; returns how many more records it covers."""
        if isinstance(begun, Done):
            done = begun
        else:
            done = workers.result(begun)
            self._workspace.enter(shard, digest, done)
        if done.written:
            self._counts[split][shard] = done.written
        self._ledger.written[split] += done.written
        self._ledger.text_only += done.text_only
        self._ledger.repeated_ids += done.repeated_ids
        for rejection in done.rejected:
            self._reject(rejection)
        before, self._accounted = self._accounted, self._ledger.accounted()
        return self._accounted - before

    def _reject(self, rejection: Rejection) -> None:
        """Enter a rejection, and stop when there are more than the limit allows however many records follow."""
        self._ledger.reject(rejection)
        if self._rejections is not None:
            self._rejections.add(rejection)
        # Records that were not expected have no conversation, so each of them is among the rejected.
        self._check_limit(self._expected + self._ledger.rejected.total())

    def _check_limit(self, total: int) -> None:
        """Raises UserError when more of `total` records than allowed are rejected, or nothing is left."""
        ledger = self._ledger
        rejected, share = ledger.rejected.total(), self._options.max_rejected_share
        too_many = rejected > share * total and not self._options.keep_going
        nothing_left = rejected and rejected == ledger.records_in == total
        if not (too_many or nothing_left):
            return
        reasons = ", ".join(f"{reason} {count}" for reason, count in ledger.reasons())
        examples = "".join(f"\n  {rejection}" for rejection in ledger.examples)
        if too_many:
            raise UserError(
                f"{self._source.name}: {rejected} of the first {ledger.records_in} records are rejected ({reasons}), "
                f"more than {100 * share:.3g}% of all.  Fix the data, or give --keep-going to leave such records "
                f"out.  The first ones:{examples}"
            )
        raise UserError(f"{self._source.name}: every one of its {total} records is rejected ({reasons}):{examples}")

    def _fill_train(self) -> None:
        """When images turned out bad until nothing was left to train on, another split becomes train."""
        filled = next((split for split in SPLITS if self._counts[split]), "train")
        if self._counts["train"] or filled == "train":
            return
        folder = self._workspace.folder
        for number, (name, count) in enumerate(self._counts[filled].items()):
            new_name = shard_writer.shard_name("train", number)
            (folder / f"{name}.idx").rename(folder / f"{new_name}.idx")
            (folder / name).rename(folder / new_name)
            self._counts["train"][new_name] = count
        self._counts[filled] = {}
        self._ledger.written["train"], self._ledger.written[filled] = self._ledger.written[filled], 0
