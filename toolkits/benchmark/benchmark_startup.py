"""Measure how long the commands take before they do their work, side by side with the bare imports of others.

    python toolkits/benchmark/benchmark_startup.py [--repeats 5] [--processes 1 2]

Everything is a command in a fresh process, as a user types it: the launcher from its call to the first iteration's line
(fresh, resumed, with several processes), from its last iteration to the saved checkpoint, its dry run, and
the steps of the quickstart that train nothing.  The models are the quickstart's, on a tenth of its images.  Prints
medians and ranges in seconds; the machine should have nothing else to do.  Where it has, the CPU's seconds of all
processes of a command tell more: for a run those up to its first iteration.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "examples/llava_mcore/run_mcore_llava.sh"
CONVERTER = REPOSITORY / "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh"
DATA = REPOSITORY / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
QUICKSTART = "examples.llava_mcore.quickstart"
ITERATION = re.compile(r" iteration +\d+/")
SAVED = "successfully saved checkpoint"
# What the launchers leave to the user's environment.
ENVIRONMENT = {"ACCELERATOR": "cpu", "LOG_INTERVAL": "1", "EVAL_ITERS": "0", "FREEZE_LANGUAGE_MODEL": "false"}


def cpu_seconds(process: int) -> float:
    """Of a running process, of what it has started and of those that have ended."""
    ticks, found = 0, [process]
    for number in found:
        folder = Path(f"/proc/{number}")
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            for thread in (folder / "task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime of proc(5), counted behind the name
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_seconds_of_ended() -> float:
    """Of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Commands:
    """Runs commands in the repository's folder and keeps how long each took, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)  # seconds, too

    def time(self, name: str, words: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Measure a command that succeeds, from its start to its end."""
        began, cpu_before = time.monotonic(), cpu_seconds_of_ended()
        done = self._run(words, environment or {})
        self.seconds[name].append(time.monotonic() - began)
        self.cpu[name].append(cpu_seconds_of_ended() - cpu_before)
        if done.returncode:
            sys.exit(f"error: {name} ended with exit code {done.returncode}\n{done.stdout[-2000:]}")

    def time_training(self, name: str, words: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        """Measure a run of one iteration: from its start to the iteration's line, to the checkpoint, to its end."""
        printed = []
        began = last = time.monotonic()
        with subprocess.Popen(
            list(map(str, words)),
            cwd=REPOSITORY,
            env={**os.environ, "PYTHON": sys.executable, **ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout:
                printed.append(line)
                if ITERATION.search(line):
                    self.cpu[f"{name}: to the first iteration"].append(cpu_seconds(process.pid))
                for what, found in (
                    ("to the first iteration", ITERATION.search(line)),
                    ("from there to the saved checkpoint", SAVED in line),
                ):
                    if found:
                        self.seconds[f"{name}: {what}"].append(time.monotonic() - last)
                        last = time.monotonic()
        self.seconds[f"{name}: from there to the end"].append(time.monotonic() - last)
        self.seconds[f"{name}: all"].append(time.monotonic() - began)
        if process.returncode:
            sys.exit(f"error: {name} ended with exit code {process.returncode}\n{''.join(printed)[-4000:]}")

    def _run(self, words: Sequence[str | Path], environment: Mapping[str, str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, words)),
            cwd=REPOSITORY,
            env={**os.environ, "PYTHON": sys.executable, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def training(folder: Path, output: str, iterations: int, tensor: int = 1) -> list[str | Path]:
    """A launcher's words for stage 1 on the quickstart's models, as quickstart.sh has them."""
    data = folder / "data/stage1/wds"
    return [
        *("bash", LAUNCHER, "dsw", "tiny", "64", "64", "2e-3", "1e-5", "16", "32", "fp32", str(tensor), "1", "1"),
        *("false", "true", "false", "false", "200", data, data, folder / "checkpoint", str(iterations), "0"),
        folder / output,
    ]


def measure(folder: Path, processes: Sequence[int], commands: Commands) -> None:
    """Every command once, in a new folder."""
    python = sys.executable
    data, models, checkpoint = folder / "data", folder / "models", folder / "checkpoint"
    for package in ("torch", "transformers"):
        commands.time(f'python -c "import {package}"', [python, "-c", f"import {package}"])
    commands.time("quickstart: digits", [python, "-m", f"{QUICKSTART}.make_digits", data, "--copies", "1"])
    texts = [data / stage / "digits.json" for stage in ("stage1", "stage2")]
    commands.time("quickstart: models", [python, "-m", f"{QUICKSTART}.make_models", models, "--texts", *texts])
    commands.time("quickstart: shards", [python, DATA, data / "stage1", "--output", data / "stage1/wds"])
    conversion = ["bash", CONVERTER, "tiny", models / "llm", models / "clip", checkpoint, "1", "1", "false", "fp32"]
    commands.time("quickstart: Hugging Face -> Megatron", conversion)
    commands.time("dry run", training(folder, "none", 1), {**ENVIRONMENT, "DRY_RUN": "1"})
    for count in processes:
        name = f"{count} process{'es' if count > 1 else ''}"
        output = f"output{count}"
        commands.time_training(f"{name}, fresh", training(folder, output, 1, count), {})
        commands.time_training(f"{name}, resumed", training(folder, output, 2, count), {})
    trained = folder / f"output{processes[0]}"
    export = ["bash", CONVERTER, "tiny", trained / "checkpoint", "none", folder / "exported", "1", "1", "true", "fp32"]
    commands.time("quickstart: Megatron -> Hugging Face", [*export, models / "llm"])
    answer = [python, "-m", f"{QUICKSTART}.answer", folder / "exported", data / "heldout", "--out", folder / "answers"]
    commands.time("quickstart: answers", answer, {"OMP_NUM_THREADS": "1"})
    curve = [python, "-m", f"{QUICKSTART}.plot_loss", folder / "loss.png", f"loss={trained}/tensorboard"]
    commands.time("quickstart: loss curves", curve)


def table(seconds: Mapping[str, Sequence[float]], cpu: Mapping[str, Sequence[float]]) -> str:
    """Rows of Markdown."""
    rows = ["| command | median, s | range, s | CPU, median, s |", "|---|---|---|---|"]
    for name, found in seconds.items():
        used = f"{statistics.median(cpu[name]):.2f}" if name in cpu else ""
        rows.append(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f}-{max(found):.2f} | {used} |")
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of everything; default: 5")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes; default: 1 2")
    arguments = parser.parse_args()
    commands = Commands()
    for number in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), arguments.processes, commands)
        print(f"{number + 1} of {arguments.repeats} done", file=sys.stderr)
    print(table(commands.seconds, commands.cpu))


if __name__ == "__main__":
    main()
