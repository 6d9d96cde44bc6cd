"""Saving and loading a checkpoint beside `cp` and `sync` of the same files, in one run, in turns.

    python toolkits/benchmark/benchmark_checkpoint.py [--shape 135M] [--rounds 5] [--processes 1] [--work DIR]
    python toolkits/benchmark/benchmark_checkpoint.py --shape 7B-4-layers --lora-rank 16

A run of the launcher trains some iterations, saves and ends; the next one loads that, trains and saves again: so ROUNDS
saves and loads, with the optimizer's state, beside ROUNDS copies.  The seconds are those of Megatron's own timers, of
the slowest process.  Copied is the checkpoint that has just been saved, its bytes still in memory, as they are for the
load.  With --async-save training waits for a copy in memory only, and that is what the save's timer shows: a copy of as
many bytes from memory to memory is measured beside it.  With --lora-rank the base is copied too: what every save would
write at least if it held all weights; else, as a load begins with memory for the optimizer's state, the time until
another process has as much, which a virtual machine may have to get back from its host.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401

# isort: split
import torch
from benchmark_training import LAUNCHERS, ROOT
from tqdm import tqdm
from workload import SHAPES, Shape, write_model, write_records

from megatron_patch.conversion import convert_to_megatron

START = 8  # seconds from a trainer's start to its load
ITERATIONS = 3  # of a run: by then the process that writes asynchronous saves has started
TIMER = re.compile(r"(load|save)-checkpoint \.*: \([\d.]+, ([\d.]+)\)")
STAGE = 2


def train(shape: Shape, work: Path, iterations: int, processes: int, options: dict[str, str]) -> dict[str, float]:
    """Seconds of what the timers of one run show: `load`, `save`.  Raises RuntimeError."""
    arguments = [
        *("dsw", shape.size, shape.micro_batch, shape.micro_batch * processes, "1e-4", "1e-4"),
        *(shape.tile_tokens, shape.image_tokens + shape.text_tokens + 64, "fp32", 1, 1, 1),
        *("true" if processes > 1 else "false", "true", "false", "false", 10**6),
        *(work / "data/wds", work / "data/wds", work / "checkpoint", iterations, 0, work / "run"),
    ]
    environment = os.environ | {
        **{"CONVERSATION_TEMPLATE": "plain", "EVAL_ITERS": "0", "NUM_WORKERS": "0", "CHECK": "false"},
        **{"NPROC_PER_NODE": str(processes), "PYTHON": sys.executable, "KEEP_LAST": "1", "FREEZE_VISION_TOWER": "true"},
        **options,
    }
    command = ["bash", str(ROOT / "examples/llava_mcore" / LAUNCHERS[STAGE]), *map(str, arguments)]
    done = subprocess.run([*command, "--allow-fresh-projector"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the run ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return {name: float(milliseconds) / 1000 for name, milliseconds in TIMER.findall(done.stdout)}


def copy_and_sync(source: Path, target: Path) -> float:
    """Seconds until a copy lies on the disk."""
    os.sync()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def copy_in_memory(size: int) -> float:
    """Seconds until `size` bytes stand in memory once more."""
    source = torch.ones(size, dtype=torch.uint8)
    began = time.perf_counter()
    source.clone()
    return time.perf_counter() - began


def fresh_memory(size: int) -> float:
    """Seconds until a process has `size` bytes more, after as many and as long a wait as a trainer's start."""
    program = f"""
import time, torch
torch.set_num_threads({torch.get_num_threads()})
time.sleep({START})
before = torch.ones({size}, dtype=torch.uint8)
began = time.perf_counter()
torch.ones({size}, dtype=torch.uint8)
print(time.perf_counter() - began)
"""
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _range(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def row(name: str, size: int, seconds: Sequence[float], copies: Sequence[float], of_what: str) -> str:
    """Of the table."""
    ratios = [copy / found for copy, found in zip(copies, seconds, strict=True)]
    ratio = statistics.median(ratios)
    return (
        f"{name:14s} {_range(seconds)} {size / 1e9 / statistics.median(seconds):6.2f} GB/s  "
        f"{ratio:5.2f}x the speed of {of_what} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def measure(shape: Shape, work: Path, rounds: int, processes: int, options: dict[str, str]) -> None:
    """Print the table."""
    write_model(work / "model", shape)
    write_records(work / "data", shape, ITERATIONS * shape.micro_batch * processes * (rounds + 1))
    convert_to_megatron(work / "model", None, work / "checkpoint", precision="fp32", model_size=shape.size)
    train(shape, work, ITERATIONS, processes, options)
    base = work / "checkpoint/release"
    names = ["copy", *(["memory"] if options["ASYNC_SAVE"] == "true" else []), "save", "load"]
    found: dict[str, list[float]] = {name: [] for name in (*names, "base", "fresh")}
    for number in tqdm(range(rounds), leave=False):
        timers = train(shape, work, ITERATIONS * (number + 2), processes, options)
        (saved,) = (work / "run/checkpoint").glob("iter_*")
        size = size_of(saved)
        timers["copy"] = copy_and_sync(saved, work / "copied")
        timers["base"] = copy_and_sync(base, work / "copied") if "LORA_RANK" in options else 0.0
        timers["fresh"] = 0.0 if "LORA_RANK" in options else fresh_memory(size - size_of(base))
        timers["memory"] = copy_in_memory(size) if "memory" in names else 0.0
        for name in found:
            found[name].append(timers[name])
    print(f"{size / 1e9:.2f} GB, {processes} process{'es' if processes > 1 else ''}, medians of {rounds} rounds")
    labels = {"copy": "cp + sync", "memory": "copy in memory"}
    for name in names:
        print(row(labels.get(name, name), size, found[name], found["copy"], "cp + sync"))
    if "memory" in names:
        print(row("save", size, found["save"], found["memory"], "a copy in memory"))
    if "LORA_RANK" in options:
        of_base = f"{size_of(base) / 1e9:.2f} GB, cp + sync {statistics.median(found['base']):.2f} s"
        print(f"the base, weights alone: {of_base}; the checkpoint is {size / size_of(base):.1%} of it")
    else:
        print(f"memory for the optimizer's state, {(size - size_of(base)) / 1e9:.2f} GB: {_range(found['fresh'])}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name, shape in SHAPES.items() if shape.weights]
    parser.add_argument("--shape", choices=shapes, default="135M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="data-parallel, with a distributed optimizer")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--work", type=Path, help="folder on the disk to be measured; default: a temporary one")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank; 0: the language model")
    given = parser.parse_args()
    options = {"ASYNC_SAVE": str(given.async_save).lower()}
    if given.lora_rank:
        options["LORA_RANK"] = str(given.lora_rank)
    with tempfile.TemporaryDirectory(prefix="benchmark_checkpoint_", dir=given.work) as folder:
        measure(SHAPES[given.shape], Path(folder), given.rounds, given.processes, options)


if __name__ == "__main__":
    main()
