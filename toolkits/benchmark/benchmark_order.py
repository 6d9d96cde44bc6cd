"""Memory and start-up of what each process holds of the data order, for a million to a billion records.

    python toolkits/benchmark/benchmark_order.py [--records 1e6 1e7 1e8 1e9] [--former REVISION] [--work DIR]

Each figure comes from a process of its own, which has imported everything before: MB that its memory grows by at the
most, mapped files included, and seconds of CPU (other programs on the machine change these less than the clock's).
`start` is until the first record's number is known, `resume` the same for a record near the end of an epoch: with the
mark of the random numbers that a saved state holds, and without, as from a state of an older version.

    folder   opening an energon folder of empty shards, 10,000 records each: metadata, sizes, fingerprint
    cyclic   the shuffled order
    packed   rows of 2,048 tokens, kept in a file; `once` is packing them, by one process of each node
    modality, modality_window
             steps of 1,024 records of one modality, over a whole epoch (up to --whole-epoch records) and within windows

Lengths are drawn like LLaVA-1.5's mix.  More rows than --pack are not packed: for them the file holds rows of three
records each, `once` is an extrapolation from the largest number that was packed, and the file of lengths is empty (it
is opened and not read).  With --former the code of that commit is measured beside, as far as --former-most and
--former-pack go: before windows it held everything in memory, and each process packed for itself.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401

# isort: split
import numpy as np
from tqdm import tqdm

from megatron_patch.data.loading import row_cache
from megatron_patch.data.loading.config import GROUPED
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.loading.lengths import open_lengths, write_lengths
from megatron_patch.data.loading.packing import RECORDS_FILE, WINDOWS_FILE, PackedRows
from megatron_patch.data.loading.row_cache import packed_rows
from megatron_patch.data.loading.sampler import GroupedSampler, PackedSampler, ShuffledSampler, WindowGroupedSampler
from megatron_patch.data.preparation.shard_writer import shard_name, write_meta

ROOT = Path(__file__).resolve().parents[2]
PER_SHARD, CAPACITY, SEED = 10_000, 2048, 1234
NEAR_END = 0.999  # of an epoch, where a resume costs most
ROOM = "megatron_patch/data/loading"
KINDS = ("folder", "cyclic", "packed", "modality", "modality_window")
STEP_RECORDS, MEGA_BATCH_MULT = 1024, 50


# ---------------------------------------------------------------------------------------------- what is measured


def shard_counts(records: int) -> np.ndarray:
    """Records per shard."""
    return np.full(-(-records // PER_SHARD), min(records, PER_SHARD), dtype=np.int64)


def file_of(work: Path, what: str, records: int) -> Path:
    """Where a file or folder for so many records lies."""
    return work / f"{what}_{records}"


def first_record(order: Any, how: str, mark: Path) -> tuple[int, ...]:
    """The records that a start or a resume is waiting for; an unmarked one leaves its mark."""
    place = 0 if how == "start" else int(NEAR_END * order.positions)
    if how == "resume":
        order.restore(json.loads(mark.read_text()))
    found = order[place]
    if how == "unmarked":
        mark.write_text(json.dumps(order.mark(place)))
    return found


def measured_now(kind: str, records: int, how: str, work: Path) -> Callable[[], Any]:
    """What a process does at its start."""
    mark = file_of(work, f"mark_{kind}", records)

    def run() -> Any:
        if kind == "folder":
            folder = EnergonFolder(str(file_of(work, "folder", records)), "train")
            return folder, folder.name(len(folder) - 1)
        if kind == "cyclic":
            order = ShuffledSampler(shard_counts(records), SEED)
            return order, first_record(order, how, mark)
        lengths = open_lengths(file_of(work, "lengths", records), records)
        if kind in GROUPED:
            build = GroupedSampler if kind == "modality" else WindowGroupedSampler
            grouped = build(shard_counts(records), SEED, lengths, STEP_RECORDS, MEGA_BATCH_MULT)
            return grouped, first_record(grouped, how, mark)
        rows = PackedRows.open(file_of(work, "rows", records), records, CAPACITY)
        packed = PackedSampler(rows, SEED, shuffle=True)
        return packed, lengths, first_record(packed, how, mark)

    return run


def measured_formerly(kind: str, records: int, how: str, work: Path) -> Callable[[], Any]:
    """The same by the code that --former names, which lies in `work`."""
    sampler, dataset = (module_of(work / f"former_{name}.py") for name in ("sampler", "dataset"))

    def run() -> Any:
        if kind == "folder":
            folder = dataset.EnergonFolder(str(file_of(work, "folder", records)), "train")
            return folder, folder.name(len(folder) - 1)
        counts = shard_counts(records).tolist()
        if kind == "cyclic":
            order = sampler.ShuffledSampler(counts, SEED)
            return order, order[int(NEAR_END * records) if how == "unmarked" else 0]
        found = open_lengths(file_of(work, "lengths", records), records)
        lengths = sampler.RecordLengths(np.array(found.tokens), np.array(found.images))
        order = sampler.PackedSampler(counts, SEED, lengths, CAPACITY, shuffle=True)
        return order, order[int(NEAR_END * order.positions) if how == "unmarked" else 0]

    return run


def module_of(file: Path) -> ModuleType:
    """A Python file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def status_mb(name: str) -> float:
    """A line of this process's memory, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1000


def cpu_seconds() -> float:
    """Of this process and its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(side: str, kind: str, records: int, how: str, work: Path) -> dict[str, float]:
    """Figures of a `start`, a `resume` or one without a mark, by the code of `now` or `former`."""
    make = measured_now if side == "now" else measured_formerly
    return measure(make(kind, records, how, work))


def measure(run: Callable[[], Any]) -> dict[str, float]:
    """MB of growth at the highest, CPU's and clock's seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
    before, cpu, clock = status_mb("VmRSS"), cpu_seconds(), time.perf_counter()
    held = run()
    found = {"seconds": cpu_seconds() - cpu, "clock": time.perf_counter() - clock}
    found["mb"] = status_mb("VmHWM") - before
    del held
    return found


# ----------------------------------------------------------------------------------------------- what is prepared


def make_folder(folder: Path, records: int) -> None:
    """An energon folder whose shards and indices are empty files."""
    folder.mkdir()
    names = [shard_name("train", number) for number in range(len(shard_counts(records)))]
    for name in names:
        for file in (name, f"{name}.idx"):
            os.close(os.open(folder / file, os.O_CREAT | os.O_WRONLY))
    write_meta(folder, {"train": dict(zip(names, shard_counts(records).tolist(), strict=True))})


def lengths_in_chunks(records: int) -> Iterator[np.ndarray]:
    """int32 [2, any]: three of four records with an image of 576 tokens, texts log-normal around 150 tokens."""
    random = np.random.RandomState(1)
    for start in range(0, records, PER_SHARD):
        size = min(PER_SHARD, records - start)
        texts = np.clip(random.lognormal(5.0, 0.9, size), 20, CAPACITY - 600).astype(np.int32)
        images = (random.rand(size) < 0.75).astype(np.int32)
        yield np.array([texts + 576 * images, images])


def make_packed(work: Path, records: int, really: bool) -> dict[str, float] | None:
    """Files of lengths and rows; what packing cost, where it was done."""
    lengths, rows = file_of(work, "lengths", records), file_of(work, "rows", records)
    if really:
        write_lengths(lengths, lengths_in_chunks(records), records)
        row_cache.LEAST_RECORDS = 0
        found = open_lengths(lengths, records)
        cost = measure(lambda: packed_rows(shard_counts(records), SEED, found, CAPACITY, True, work))
        (made,) = (path for path in work.glob("llava_rows_*") if path.is_dir())
        made.rename(rows)
        return cost
    np.lib.format.open_memmap(lengths, "w+", dtype=np.int32, shape=(2, records)).flush()
    with lengths.open("ab") as end:
        end.write(b"0" * 16)
    rows.mkdir()
    kind = np.uint32 if 2 * records <= 2**32 else np.uint64
    kept = np.lib.format.open_memmap(rows / RECORDS_FILE, "w+", dtype=kind, shape=(records,))
    windows = []
    window = 16 * PER_SHARD
    for start in range(0, records, window):
        places = np.arange(start, min(start + window, records))
        ends = (np.arange(len(places)) % 3 == 2) | (places == places[-1])
        kept[start : start + len(places)] = places * 2 + ends
        windows.append([int(ends.sum()), len(places), 0])
    kept.flush()
    np.save(rows / WINDOWS_FILE, np.array(windows, dtype=np.int64))
    return None


def write_former(revision: str, work: Path) -> None:
    """The modules of a commit.  Raises SystemExit where it is not at hand."""
    for name in ("sampler", "dataset"):
        shown = subprocess.run(
            ["git", "-C", str(ROOT), "show", f"{revision}:{ROOM}/{name}.py"], capture_output=True, text=True
        )
        if shown.returncode:
            raise SystemExit(f"error: --former {revision}: {shown.stderr.strip()}; wanted a commit of this repository")
        (work / f"former_{name}.py").write_text(shown.stdout)


# ------------------------------------------------------------------------------------------------------- the table


def in_process(function: Callable[..., dict[str, float] | None], *arguments: Any) -> dict[str, float] | None:
    """What the function gives in a child of this process, which has imported everything.  Raises RuntimeError."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(function(*arguments)))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"measuring {arguments} failed") from None
    finally:
        child.join()


def cells(found: dict[str, float] | None, *names: str) -> str:
    """Of the table; a dash where it was not measured."""
    return " | ".join("-" if found is None else f"{found[name]:.0f}" if name == "mb" else
                      f"{found[name]:.2f}" for name in names)  # fmt: skip


def rows(
    sizes: list[int], most: dict[str, int], pack: int, whole_epoch: int, former: bool, work: Path
) -> Iterator[str]:
    """Lines of the table."""
    packed: list[tuple[int, float]] = []
    for records in sizes:
        make_folder(file_of(work, "folder", records), records)
        for kind in KINDS:
            once = ""
            if kind == "modality" and records > whole_epoch:
                continue
            if kind == "packed":
                cost = in_process(make_packed, work, records, records <= pack)
                if cost:
                    packed.append((records, cost["seconds"]))
                    once = f"{cost['seconds']:.2f}"
                elif packed:
                    once = f"about {packed[-1][1] * records / packed[-1][0]:.0f}"
            figures: list[str] = []
            for side, ways in (("now", ("start", "unmarked", "resume")), ("former", ("start", "unmarked"))):
                found = dict.fromkeys(ways)
                if side == "now" or (former and records <= most.get(kind, 0)):
                    for how in ways[:1] if kind == "folder" else ways:
                        found[how] = in_process(measured, side, kind, records, how, work)
                highest = max((one for one in found.values() if one), key=lambda one: one["mb"], default=None)
                figures.append(cells(highest, "mb"))
                figures += [cells(found[how], "seconds") for how in ("start", "resume", "unmarked") if how in found]
            yield f"| {records:.0e} | {kind} | {' | '.join(figures)} | {once} |".replace("e+0", "e")
        for what in ("lengths", "rows", "folder"):
            subprocess.run(["rm", "-rf", str(file_of(work, what, records))], check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": lambda text: int(float(text)), "metavar": "N"}
    parser.add_argument("--records", nargs="+", default=[10**6, 10**7, 10**8, 10**9], **number)
    parser.add_argument("--pack", default=10**7, help="most records that are packed", **number)
    parser.add_argument("--whole-epoch", default=10**7, help="most records that are grouped over an epoch", **number)
    parser.add_argument("--former", metavar="REVISION", help="commit to compare with")
    parser.add_argument("--former-most", default=10**8, help="most records that it is given", **number)
    parser.add_argument("--former-pack", default=10**6, help="most records that it packs", **number)
    parser.add_argument("--work", type=Path, help="folder for files: 4 GB at 1e9; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark_order_", dir=given.work) as name:
        work = Path(name)
        if given.former:
            write_former(given.former, work)
        most = {"folder": 10**10, "cyclic": given.former_most, "packed": given.former_pack}
        print(
            "| records | what | MB | start, s | resume, s | from an older state, s | former MB | start, s | resume, s "
            "| once, s |"
        )
        print("|" + "---|" * 10)
        for line in tqdm(
            rows(given.records, most, given.pack, given.whole_epoch, bool(given.former), work),
            total=len(given.records) * len(KINDS),
            leave=False,
        ):
            tqdm.write(line)


if __name__ == "__main__":
    main()
