"""How fast, and in how much memory, are records converted?  Beside `cp` + `sync`, and webdataset's ShardWriter.

    python benchmark_conversion.py [--records 20000] [--rounds 3] [--work DIR]

Makes a folder like LLaVA-Pretrain (JPEG files of about 30 kB; a few hundred different ones, each written many times)
and runs, in turn and several times, from a disk cache that holds the source:

- copy: `cp -r` of the finished shards, then `sync` of every copied file;
- ShardWriter: one process reads the same JSON file with json.load and the same images, unchecked, writes the same
  parts with webdataset's ShardWriter into shards of the same size, then `sync` of every shard;
- conversion: convert_llava_pretrain_to_wds.py: streams, checks and counts every record, puts shards, index and account
  on the disk, and then reopens them with energon.

`seconds` are from the first look at the source until everything is on the disk.  `whole` is the command as the user
waits for it: with the start of Python, imports, and energon's import to reopen the shards, which take a few seconds
whatever the size of the data.  The targets are about `seconds`; the shares for `whole` are printed beside them.
Memory is the most that a command and its children hold together at one time (PSS: pages they share count once).
Exit code 0: all targets are met; 1: not.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
CONVERTER = Path(__file__).with_name("convert_llava_pretrain_to_wds.py")
SHARE_OF_COPY = 0.5
TIMES_SHARD_WRITER = 4.0
PEAK_MIB = 500
DISTINCT_IMAGES = 300
SAMPLES_PER_SHARD = 1000
WORDS = "a the of on with street cat dog red large photo man woman table two tree light water".split()  # noqa: SIM905


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds: float
    whole: float


def make_source(folder: Path, records: int) -> None:
    """LLaVA-Pretrain in small: images in numbered folders, captions in one JSON file."""
    import numpy as np
    from PIL import Image

    numbers = np.random.default_rng(0)
    images = []
    for _ in range(min(records, DISTINCT_IMAGES)):
        # Smooth shapes with a little noise: such a JPEG is as large as a photograph of its size.
        small = numbers.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(small).resize((336, 252), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = np.clip(pixels + numbers.normal(0, 14, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
        images.append(buffer.getvalue())
    generator = random.Random(0)
    listed = []
    for number in range(records):
        name = f"{number // 1000:05d}/{number:09d}.jpg"
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[number % len(images)])
        caption = " ".join(generator.choices(WORDS, k=12))
        turns = [
            {"from": "human", "value": "<image>\nRender a clear and concise summary of the photo."},
            {"from": "gpt", "value": f"{caption}, number {number}"},
        ]
        listed.append({"id": f"{number:09d}", "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(listed))
    subprocess.run(["sync"], check=True)


def write_with_shard_writer(source: Path, output: Path) -> None:
    """The contender, in a process of its own; prints its seconds as the converter does."""
    import webdataset

    began = time.monotonic()
    output.mkdir()
    with webdataset.ShardWriter(str(output / "%06d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for number, record in enumerate(json.loads((source / "data.json").read_text())):
            image = (source / "images" / record["image"]).read_bytes()
            content = {"id": record["id"], "conversations": record["conversations"], "image": record["image"]}
            writer.write({"__key__": f"{number:08d}", "jpg": image, "json": json.dumps(content).encode()})
    subprocess.run(["sync", *output.glob("*.tar")], check=True)
    print(f"converted in {time.monotonic() - began:.2f} s")


def measured(command: list[object], output: Path) -> Measured:
    """Run a command that writes a folder, then remove the folder.  Raises RuntimeError when the command failed."""
    subprocess.run(["sync"], check=True)  # what came before shall not be paid for here
    began = time.monotonic()
    process = _start(command)
    printed, _ = process.communicate()
    whole = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"{command[:3]} ended with code {process.returncode}: {printed[-2000:]}")
    shutil.rmtree(output)
    said = re.search(r"converted in ([\d.]+) s", printed)
    return Measured(float(said[1]) if said else whole, whole)


def peak_mib(command: list[object], output: Path) -> float:
    """The most memory that a command and its children hold at one time, in a run of its own: looking costs time."""
    process, peak_kib = _start(command), 0
    while process.poll() is None:
        peak_kib = max(peak_kib, sum(map(_pss_kib, _tree(process.pid))))
        time.sleep(0.02)
    process.communicate()
    shutil.rmtree(output)
    return peak_kib / 1024


def _start(command: list[object]) -> subprocess.Popen:
    command = list(map(str, command))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY, text=True)


def _tree(process: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it ended meanwhile
        return []
    return [process, *(below for child in children for below in _tree(int(child)))]


def _pss_kib(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def commands(source: Path, shards: Path, output: Path) -> dict[str, list[object]]:
    """{contender: command}: from the source, or the finished shards, to `output`."""
    copy = f'cp -r "{shards}" "{output}" && sync "{output}"/*.tar'
    return {
        "copy": ["bash", "-c", copy],
        "ShardWriter": [sys.executable, __file__, "--shard-writer", source, output],
        "conversion": conversion(source, output),
    }


def conversion(source: Path, output: Path) -> list[object]:
    """Ours."""
    return [sys.executable, CONVERTER, source, "--output", output]


def race(work: Path, records: int, rounds: int) -> bool:
    """Make the data, run all contenders in turn, print the table; returns whether all targets are met."""
    make_source(work / "source", records)
    subprocess.run(list(map(str, conversion(work / "source", work / "wds"))), check=True, capture_output=True)
    shard_bytes = sum(path.stat().st_size for path in (work / "wds").glob("*.tar"))
    print(
        f"{records} records, {shard_bytes / 1e6:.0f} MB of shards, {os.cpu_count()} cores, medians of {rounds} rounds"
    )
    runs: dict[str, list[Measured]] = {}
    contenders = commands(work / "source", work / "wds", work / "output")
    peaks = {contender: peak_mib(command, work / "output") for contender, command in contenders.items()}
    for _ in tqdm(range(rounds), desc="rounds"):
        for contender, command in contenders.items():
            runs.setdefault(contender, []).append(measured(command, work / "output"))
    print(f"{'':12} {'seconds':>8} {'records/s':>10} {'MB/s':>6} {'whole':>8} {'peak MiB':>9}")
    found = {}
    for contender, measures in runs.items():
        seconds = statistics.median(run.seconds for run in measures)
        whole = statistics.median(run.whole for run in measures)
        found[contender] = Measured(seconds, whole)
        print(
            f"{contender:12} {seconds:8.2f} {records / seconds:10.0f} {shard_bytes / seconds / 1e6:6.0f} "
            f"{whole:8.2f} {peaks[contender]:9.0f}"
        )
    ours, copy, writer = found["conversion"], found["copy"], found["ShardWriter"]
    share, times = copy.seconds / ours.seconds, writer.seconds / ours.seconds
    print(f"speed: {share:.0%} of copy (target {SHARE_OF_COPY:.0%}), {times:.1f} x ShardWriter", end=" ")
    print(f"(target {TIMES_SHARD_WRITER:.0f})")
    print(f"whole commands: {copy.whole / ours.whole:.0%} of copy, {writer.whole / ours.whole:.1f} x ShardWriter")
    print(f"peak memory: {peaks['conversion']:.0f} MiB (target below {PEAK_MIB})")
    return share >= SHARE_OF_COPY and times >= TIMES_SHARD_WRITER and peaks["conversion"] < PEAK_MIB


def main() -> int:
    """Command line; returns the exit code."""
    if sys.argv[1:2] == ["--shard-writer"]:
        write_with_shard_writer(Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000, metavar="N", help="default: 20000, some 2 GB of disk")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the data are made; default: the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.work) as work:
        return 0 if race(Path(work), arguments.records, arguments.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
