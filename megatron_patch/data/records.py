"""The converters' core: a LLaVA-format JSON and its pictures -> checked, counted, written as an energon folder.

Every record is in the shards or in the ledger's rejections with its reason: records in = written + rejected.
"""

import hashlib
import json
import os
import random
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_patch.data import shards
from megatron_patch.data.image import open_picture
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.samples import read_exchanges
from megatron_patch.errors import UserError

SPLITS = ("train", "val", "test")
MAX_REJECTED_SHARE = 0.01
LEAST_SHARDS = 10  # per split, where that leaves at least LEAST_SAMPLES_PER_SHARD in each
LEAST_SAMPLES_PER_SHARD = 10
READ_BYTES = 1 << 20
MAX_RECORD_CHARACTERS = 64 << 20


def stream_records(path: Path) -> Iterator[Any]:
    """The records of a JSON list or of JSON lines, one at a time.  Raises UserError for text that is not JSON."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _stream(file, path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _stream(file: TextIO, path: Path) -> Iterator[Any]:
    """Decode value after value from a buffer that is refilled when a value does not end within it."""
    decoder = json.JSONDecoder()
    buffer, position, at_end, in_list, number = "", 0, False, False, 0

    def fail(what: str) -> UserError:
        return UserError(f"{path}: {what} after record {number}; wanted a JSON list of records, or one record per line")

    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if position < len(buffer):
            if number == 0 and not in_list and buffer[position] == "[":
                in_list = True
                position += 1
                continue
            if in_list and buffer[position] == "]":
                rest = buffer[position + 1 :] + file.read(READ_BYTES)
                if rest.strip():
                    raise fail("text after the end of the list")
                return
            try:
                record, end = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                if at_end:
                    raise fail(f"broken JSON ({error.msg})") from None
                if len(buffer) - position > MAX_RECORD_CHARACTERS:
                    raise fail(f"no complete value within {MAX_RECORD_CHARACTERS >> 20} million characters") from None
            else:
                # A number at the buffer's end may go on in the next piece; records are objects, which close themselves.
                if isinstance(record, dict) or at_end or end < len(buffer):
                    number += 1
                    position = end
                    yield record
                    continue
        elif at_end:
            if in_list:
                raise fail("the list is not closed")
            return
        more = file.read(READ_BYTES)
        at_end = not more
        buffer, position = buffer[position:] + more, 0


@dataclass
class Ledger:
    """The account of a conversion."""

    records_in: int = 0
    written: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    rejected: Counter = field(default_factory=Counter)  # reason -> records
    repeated_ids: int = 0  # written although another record has the same id: their contents differ
    text_only: int = 0
    examples: list[str] = field(default_factory=list)  # the first rejections, in words

    def check(self) -> None:
        """in = written + rejected: otherwise this program is wrong."""
        assert self.records_in == sum(self.written.values()) + self.rejected.total(), self

    def to_json(self, source: str) -> dict[str, Any]:
        """What ledger.json holds."""
        return {
            "source": source,
            "records_in": self.records_in,
            "written": self.written,
            "rejected": self.rejected.total(),
            "rejected_by_reason": dict(self.rejected.most_common()),
            "text_only": self.text_only,
            "repeated_ids": self.repeated_ids,
        }


@dataclass(frozen=True)
class Prepared:
    """A record that was found good: its parts, and hashes by which repetitions are recognised."""

    parts: dict[str, bytes]
    id_hash: int | None
    content_hash: int


def prepare_record(record: Any, number: int, image_roots: Sequence[Path]) -> Prepared:
    """Check one record and read its pictures, whose bytes stay as they are.  Raises RecordError.

    `number` is the record's place in the source, used as its id when it has none.
    """
    if not isinstance(record, dict):
        raise RecordError("malformed", f"a record is {type(record).__name__}, wanted an object")
    images = record.get("image")
    names = [] if images in (None, "") else images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) and name for name in names):
        raise RecordError("malformed", "image is neither a file name nor a list of file names")
    read_exchanges(record.get("conversations"), len(names))
    pictures = [_read_picture(name, image_roots) for name in names]
    record_id = record.get("id")
    content = {
        "id": str(number if record_id is None else record_id),
        "conversations": record["conversations"],
        **({"image": images} if names else {}),
    }
    data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    parts = {("jpg" if place == 0 else f"{place}.jpg"): picture for place, picture in enumerate(pictures)}
    id_hash = None if record_id is None else _hash(str(record_id).encode("utf-8", "surrogatepass"))
    return Prepared({**parts, "json": data}, id_hash, _hash(data))


def _read_picture(name: str, image_roots: Sequence[Path]) -> bytes:
    """Bytes of a picture that decodes fully and lies below one of image_roots; the first that has it counts."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise RecordError("picture missing", f"{name!r} points outside the picture folder")
    path = next((path for path in (root / name for root in image_roots) if path.is_file()), None)
    if path is None:
        raise RecordError("picture missing", f"{name}: not in {' or '.join(map(str, image_roots))}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError("picture unreadable", f"{name}: {error.strerror}") from None
    if len(data) > shards.MAX_MEMBER_BYTES:
        raise RecordError("picture unreadable", f"{name}: {len(data)} bytes")
    try:
        open_picture(data)
    except RecordError as error:
        raise RecordError(error.reason, f"{name}: {error.detail}") from error
    return data


def _hash(data: bytes) -> int:
    """64 bits: for millions of records a chance collision is less likely than 1 in 10,000."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def in_order(
    function: Callable[[int, Any], Any], items: Iterable[Any], threads: int
) -> Iterator[tuple[int, Any, "Future[Any]"]]:
    """(number, item, finished future) in the order of the items, a bounded number of them at work."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[int, Any, Future[Any]]] = deque()
        try:
            for number, item in enumerate(items):
                waiting.append((number, item, pool.submit(function, number, item)))
                if len(waiting) > 4 * threads:
                    waiting[0][2].exception()
                    yield waiting.popleft()
            while waiting:
                waiting[0][2].exception()
                yield waiting.popleft()
        finally:
            for _, _, future in waiting:
                future.cancel()


class SplitChooser:
    """Deals records to splits: in every block of sum(ratio) records each split gets its exact share, at random places.

    Blocks keep small sets fair; random places keep a pattern in the source out of the splits.
    """

    def __init__(self, ratio: tuple[int, ...], seed: int = 0) -> None:
        self._block = [split for split, share in zip(SPLITS, ratio, strict=False) for _ in range(share)]
        self._random = random.Random(seed)
        self._dealt: list[str] = []

    def next(self) -> str:
        """Split of the next good record."""
        if not self._dealt:
            self._dealt = self._random.sample(self._block, len(self._block))
        return self._dealt.pop()


def convert(
    source: Path,
    image_roots: Sequence[Path],
    output: Path,
    ratio: tuple[int, ...] = (9, 1, 0),
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    keep_going: bool = False,
    threads: int | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> Ledger:
    """LLaVA-format JSON + pictures -> energon folder `output`, written beside it and renamed at the end.

    Args:
        image_roots: folders that image names start from, tried in this order.
        ratio: shares of train, val and test among the good records.
        samples_per_shard: upper limit; small sets get smaller shards, so that there are at least ten of a split.
        overwrite: replace an output that exists.
        keep_going: go on when more than 1% of the records are rejected.
        threads: readers of pictures at work at the same time.
        progress: wraps the iteration over records, given their number.

    Raises UserError; then nothing new is left behind.
    """
    _check(source, image_roots, output, ratio, samples_per_shard, overwrite)
    total = sum(1 for _ in stream_records(source))
    if total == 0:
        raise UserError(f"{source}: holds no records")
    beside = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        ledger = _write(
            source, image_roots, beside, ratio, samples_per_shard, keep_going, threads or _threads(), progress, total
        )
        filled = [split for split in SPLITS if ledger.written[split]]
        found = shards.read_back(beside, filled)
        assert found == {split: ledger.written[split] for split in filled}, (found, ledger.written)
        if output.exists():
            old = output.with_name(f"{output.name}.old-{os.getpid()}")
            output.rename(old)
            beside.rename(output)
            shutil.rmtree(old)
        else:
            beside.rename(output)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"{output}: cannot be written ({error}); give --output a place with room for the data"
        ) from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return ledger


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _check(
    source: Path,
    image_roots: Sequence[Path],
    output: Path,
    ratio: tuple[int, ...],
    samples_per_shard: int,
    overwrite: bool,
) -> None:
    """Refuse what can be seen to be wrong before anything is created."""
    if not source.is_file():
        raise UserError(f"{source}: no such file; wanted the JSON file with the conversations")
    for image_root in image_roots:
        if not image_root.is_dir():
            raise UserError(f"{image_root}: no such folder; wanted the folder that the records' image names start from")
    if not 1 <= len(ratio) <= 3 or min(ratio) < 0 or ratio[0] < 1:
        raise UserError(
            f"--split {','.join(map(str, ratio))}: wanted up to three whole numbers, shares of train, val and test, "
            "the first at least 1, as in 9,1,0"
        )
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: wanted at least 1")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists already; give --overwrite to replace it, or another --output")
    if output.exists() and not (output / ".nv-meta").is_dir() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty and no energon folder, so --overwrite will not remove it")


def _write(
    source: Path,
    image_roots: Sequence[Path],
    folder: Path,
    ratio: tuple[int, ...],
    samples_per_shard: int,
    keep_going: bool,
    threads: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
    total: int,
) -> Ledger:
    """Write shards, `.nv-meta` and ledger into `folder`."""
    ledger = Ledger()
    chooser = SplitChooser(ratio)
    writers = {}
    for split, share in zip(SPLITS, ratio, strict=False):
        expected = total * share // sum(ratio)
        writers[split] = shards.ShardWriter(
            folder, split, min(samples_per_shard, max(LEAST_SAMPLES_PER_SHARD, -(-expected // LEAST_SHARDS)))
        )
    ids: set[int] = set()
    contents: set[int] = set()
    prepared_records = in_order(
        lambda number, record: prepare_record(record, number, image_roots), stream_records(source), threads
    )
    try:
        with (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected:
            for number, record, future in progress(prepared_records, total):
                ledger.records_in += 1
                try:
                    prepared = future.result()
                    if prepared.content_hash in contents:
                        raise RecordError("duplicate", "of an earlier record, word for word")
                except RecordError as error:
                    _reject(ledger, rejected, number, record, error)
                    if ledger.rejected.total() > MAX_REJECTED_SHARE * total and not keep_going:
                        raise _too_many(source, ledger, total) from error
                    continue
                split = chooser.next()
                writers[split].write(sum(ledger.written.values()), prepared.parts)
                ledger.written[split] += 1
                ledger.text_only += len(prepared.parts) == 1
                ledger.repeated_ids += prepared.id_hash in ids
                contents.add(prepared.content_hash)
                if prepared.id_hash is not None:
                    ids.add(prepared.id_hash)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    ledger.check()
    if ledger.written["train"] == 0:
        raise UserError(
            f"{source}: no record is left for training ({ledger.records_in} read, reasons: "
            f"{_reasons(ledger)}); nothing was written"
        )
    shards.write_meta(folder, {split: writer.counts for split, writer in writers.items()})
    (folder / "ledger.json").write_text(json.dumps(ledger.to_json(source.name), indent=2) + "\n")
    return ledger


def _reject(ledger: Ledger, rejected: TextIO, number: int, record: Any, error: RecordError) -> None:
    """Enter a rejection into the account and its file."""
    ledger.rejected[error.reason] += 1
    record_id = record.get("id") if isinstance(record, dict) else None
    line = {"record": number, "id": record_id, "reason": error.reason, "detail": error.detail}
    rejected.write(json.dumps(line) + "\n")
    if len(ledger.examples) < 10:
        ledger.examples.append(f"record {number} (id {record_id}): {error.reason}: {error.detail}")


def _reasons(ledger: Ledger) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in ledger.rejected.most_common()) or "none rejected"


def _too_many(source: Path, ledger: Ledger, total: int) -> UserError:
    examples = "\n  ".join(ledger.examples)
    return UserError(
        f"{source}: {ledger.rejected.total()} of the first {ledger.records_in} records are rejected "
        f"({_reasons(ledger)}), more than {MAX_REJECTED_SHARE:.0%} of all {total}; nothing was written.  "
        f"Mend the data, or give --keep-going to leave such records out.  The first ones:\n  {examples}"
    )
