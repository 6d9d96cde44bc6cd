"""What can be proven on one GPU, in one call: the same losses as on the CPU, then the throughput of a 7B LLaVA.

    python tests/gpu/on_one_gpu.py OUT                                     all of it, within nine minutes
    python tests/gpu/on_one_gpu.py OUT --accelerator cpu --size tiny       the script itself, tried without a GPU

The machine needs requirements.txt with a CUDA build of torch; Transformer Engine is used where it imports, and hidden
for the rows without it.  Nothing is downloaded: models have random weights, images are made here.  Results go to the
console and, after each row, to OUT/results.json; the trace of a step lies beside it unless it is large.  What the runs
write is in a temporary folder.  The most telling rows come first; what --limit leaves no time for is said to be so.

Losses: 20 iterations of a tiny model under each setting, against fp32 on the CPU; largest relative difference.
Throughput: samples per second from the run's own log (median of the last iterations) at eight micro-batches per step,
as a share of the limit of an H100 or H200, 989 TFLOP/s of dense bf16 over the useful work of a sample: 8.05 and 17.01
TFLOP in stage 1 (256 or 576 image tokens and 40 of text), 35.8 in stage 2 (576 + 300).
"""

import argparse
import gzip
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models
from tests.training.conftest import write_dataset
from tests.training.launching import ROOT, Workspace, command, losses

CONVERTER = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
RATE = re.compile(r"samples/s: ([0-9.]+)")
PEAK_FLOP = 989e12  # per second: dense bf16 of an H100 or H200, from NVIDIA's datasheet


MICRO_BATCHES = 8  # per step: with one alone the optimizer would take a quarter of it
START_S = 45  # a run that has less time left is not started
TRACE_BYTES = 16 * 2**20  # a larger trace stays behind
HIDDEN = "without Transformer Engine"


@dataclass(frozen=True)
class Speed:
    """One throughput run of a 7B model."""

    title: str
    script: str
    side_px: int  # of images, cut into patches of 14 px
    text_tokens: int
    micro_batch: int
    tflop_per_sample: float
    options: dict[str, object] = field(default_factory=dict)
    profiled: bool = False


def stage_2(title: str, micro_batch: int = 4, profiled: bool = False, **options: object) -> Speed:
    """576 image tokens and 300 of text, the whole language model trained."""
    options = {"FREEZE_LANGUAGE_MODEL": "false"} | options
    return Speed(f"stage 2, {title}", "run_sft_mcore_llava.sh", 336, 300, micro_batch, 35.8, options, profiled)


SPEEDS = (
    stage_2("576 + 300", profiled=True),
    stage_2("packed", 1, PACKING="true", DECODER_SEQ_LEN=4000),
    stage_2("fp8", PR="fp8", FP8_RECIPE="tensorwise"),
    Speed("stage 1, 576 + 40", "run_mcore_llava.sh", 336, 40, 16, 17.01),
    stage_2(HIDDEN),
    Speed("stage 1, 256 + 40", "run_mcore_llava.sh", 224, 40, 32, 8.05),
)
PACKED = {"PACKING": "true", "BATCH_SIZE": 1}
SETTINGS: dict[str, dict[str, object]] = {
    "fp32": {"PR": "fp32"},
    "fp32, packed": {"PR": "fp32", **PACKED},
    "bf16": {"PR": "bf16"},
    f"bf16, {HIDDEN}": {"PR": "bf16"},
    "bf16, packed": {"PR": "bf16", **PACKED},
    "fp8": {"PR": "fp8", "FP8_RECIPE": "tensorwise"},
    "bf16, distributed optimizer": {"PR": "bf16", "DO": "true"},
    "bf16, recompute selective": {"PR": "bf16", "AC": "sel"},
    "bf16, recompute full": {"PR": "bf16", "AC": "full"},
}


def command_of(workspace: Workspace, output: Path, **changes: object) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a launcher that does not save the optimizer state: 84 GB for a 7B."""
    words, environment = command(workspace, output, **changes)
    return [*words, "--no-save-optim"], environment


class Runs:
    """Launcher runs below a folder, until the time is over."""

    def __init__(self, folder: Path, end: float) -> None:
        """`end`: on time.monotonic()'s clock."""
        self.folder, self.end = folder, end
        self.hiding = folder / "hiding"
        (self.hiding / "transformer_engine").mkdir(parents=True)
        (self.hiding / "transformer_engine/__init__.py").write_text('raise ModuleNotFoundError("hidden")\n')

    def launch(self, workspace: Workspace, name: str, hide: bool = False, **changes: object) -> tuple[int, str]:
        """Run a launcher; returns exit code (124: out of time) and everything it printed.

        Nothing that was saved remains: a disk holds few models of 7B.
        """
        left = self.end - time.monotonic()
        if left < START_S:
            return 124, f"not started: {left:.0f} s left"
        line, environment = command_of(workspace, self.folder / name, **changes)
        if hide:
            environment["PYTHONPATH"] = str(self.hiding)
        with (self.folder / f"{name}.printed").open("w+") as printed:
            try:
                code = subprocess.run(
                    line, env=environment, stdout=printed, stderr=subprocess.STDOUT, timeout=left
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
            shutil.rmtree(self.folder / name / "checkpoint", ignore_errors=True)
            printed.seek(0)
            return code, printed.read()


def compare_losses(runs: Runs, accelerator: str, workers: int, report: Callable[[dict], None]) -> None:
    """The table of losses; each row: setting, largest difference, or why there is none."""
    folder = runs.folder / "losses"
    tiny_models.make_tiny_llava(folder / "hf", "mistral")
    convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
    write_dataset(folder / "records")
    subprocess.run([sys.executable, str(CONVERTER), str(folder / "records")], check=True, capture_output=True)
    workspace = Workspace(folder / "checkpoint", folder / "records/wds")
    with ThreadPoolExecutor(workers) as pool:  # tiny runs, which wait for their imports most of the time
        judges = {
            packed: pool.submit(
                runs.launch, workspace, f"judge{packed}", PR="fp32", ACCELERATOR="cpu", **(PACKED if packed else {})
            )
            for packed in (False, True)
        }
        started = [
            pool.submit(
                runs.launch, workspace, f"losses{number}", HIDDEN in title, ACCELERATOR=accelerator, NPROC_PER_NODE=1,
                **options,
            )
            for number, (title, options) in enumerate(SETTINGS.items())
        ]  # fmt: skip
        for (title, options), run in zip(SETTINGS.items(), started, strict=True):
            expected = losses(judges["PACKING" in options].result()[1])
            code, printed = run.result()
            found = losses(printed)
            row: dict[str, object] = {"setting": title, "exit": code}
            if code == 0 and expected.keys() == found.keys():
                row["largest difference"] = max(abs(found[i] / loss - 1) for i, loss in expected.items())
                shown = f"{row['largest difference']:.1e}"
            else:
                row["said"] = printed[-1500:]
                shown = f"exit {code}: {printed.strip()[-300:]}"
            print(f"{title:36s} {shown}", flush=True)
            report(row)


def write_model_folder(folder: Path, size: str, side_px: int) -> Path:
    """Configuration, processor and tokenizer of a LLaVA of this size; no weights."""
    tiny_models.make_tiny_llava(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    if size == "7B":
        config["text_config"] |= {
            **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064, "max_position_embeddings": 4096},
        }
        config["vision_config"] |= {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
            **{"image_size": side_px, "patch_size": 14},
        }
        config["image_seq_length"] = (side_px // 14) ** 2
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        processor |= {"size": {"shortest_edge": side_px}, "crop_size": {"height": side_px, "width": side_px}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_images(folder: Path, side_px: int, text_tokens: int, records: int = 512) -> Path:
    """Records of one image and about so many tokens of text; returns the energon folder."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    found = []
    for number in range(records):
        small = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side_px, side_px)).save(folder / f"images/{number}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"{number} " + "x " * (text_tokens // 2)},
        ]
        found.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(found))
    subprocess.run([sys.executable, str(CONVERTER), str(folder)], check=True, capture_output=True)
    return folder / "wds"


def changes_of(speed: Speed, size: str, accelerator: str, iterations: int, model: Path) -> dict[str, object]:
    """The launcher's arguments and options of a throughput run."""
    image_tokens = (speed.side_px // 14) ** 2 if size == "7B" else tiny_models.IMAGE_TOKENS
    micro_batch = speed.micro_batch if size == "7B" else 1
    changes = {
        **{"MODEL_SIZE": size, "BATCH_SIZE": micro_batch, "GLOBAL_BATCH_SIZE": MICRO_BATCHES * micro_batch},
        **{"SEQ_LEN": image_tokens, "DECODER_SEQ_LEN": image_tokens + speed.text_tokens + 120},
        **{"PR": "bf16" if size == "7B" else "fp32", "TRAIN_ITERS": iterations, "SAVE_INTERVAL": 10**6},
        **{"PRETRAIN_CHECKPOINT_PATH": "none", "TOKENIZER_PATH": model, "EVAL_ITERS": 0, "script": speed.script},
        **{"FREEZE_LANGUAGE_MODEL": "true", "FREEZE_VISION_TOWER": "true", "CONVERSATION_TEMPLATE": "plain"},
        **{"ACCELERATOR": accelerator, "NPROC_PER_NODE": 1, "NUM_WORKERS": 8 if size == "7B" else 0},
        **{"FL": "true", "DO": "true"},
    } | speed.options
    if size != "7B":
        changes["DECODER_SEQ_LEN"] = 400  # of the 512 positions of a tiny model
    if speed.profiled:
        changes["PROFILE"] = f"{iterations}-{iterations}"
    return changes


def longest_kernels(trace: Path, count: int = 25) -> dict[str, float]:
    """Milliseconds of a torch trace by kernel (by operator where nothing ran on a GPU), the longest first."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    for category in ("kernel", "cpu_op"):
        spent: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == category:
                spent[event["name"][:100]] += event["dur"] / 1000
        if spent:
            break
    return dict(spent.most_common(count))


def measure_speed(
    runs: Runs, size: str, accelerator: str, iterations: int, out: Path, report: Callable[[dict], None]
) -> None:
    """Samples per second of each row, and where the time of a profiled step went."""
    for number, speed in enumerate(SPEEDS):
        side_px = speed.side_px if size == "7B" else tiny_models.IMAGE_SIDE_PX
        model = write_model_folder(runs.folder / f"model{number}", size, side_px)
        changes = changes_of(speed, size, accelerator, iterations, model)
        wds = write_images(runs.folder / f"data{number}", side_px, speed.text_tokens, 512 if size == "7B" else 48)
        code, printed = runs.launch(Workspace(model, wds), f"speed{number}", HIDDEN in speed.title, **changes)
        rates = [float(rate) for rate in RATE.findall(printed)][: -1 if speed.profiled else None]
        row: dict[str, object] = {"run": speed.title, "exit": code}
        if len(rates) >= 4:
            row["samples per second"] = statistics.median(rates[len(rates) // 2 :])
            shown = f"{row['samples per second']:8.2f} samples/s"
            if size == "7B":
                row["share of the bf16 limit"] = row["samples per second"] * speed.tflop_per_sample * 1e12 / PEAK_FLOP
                shown += f", {row['share of the bf16 limit']:.0%} of the limit"
        else:
            row["said"] = printed[-1500:]
            shown = f"exit {code}: {printed.strip()[-300:]}"
        for trace in (runs.folder / f"speed{number}").glob("profile/*.json.gz"):
            row["milliseconds by kernel"] = longest_kernels(trace)
            if trace.stat().st_size <= TRACE_BYTES:
                shutil.copy(trace, out / "trace.json.gz")
        print(f"{speed.title:36s} {shown}", flush=True)
        report(row)


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("7B", "tiny"), default="7B", help="of the throughput runs")
    parser.add_argument("--iterations", type=int, default=7, help="of each throughput run")
    parser.add_argument("--workers", type=int, default=4, help="tiny runs at a time")
    parser.add_argument("--limit", type=float, default=520, metavar="SECONDS", help="for all of it")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.limit
    arguments.output.mkdir(parents=True)
    results: dict[str, list[dict]] = {"losses": [], "throughput": []}

    def report(part: str) -> Callable[[dict], None]:
        def add(row: dict) -> None:
            results[part].append(row)
            (arguments.output / "results.json").write_text(json.dumps(results, indent=2))

        return add

    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), end)
        compare_losses(runs, arguments.accelerator, arguments.workers, report("losses"))
        measure_speed(
            runs, arguments.size, arguments.accelerator, arguments.iterations, arguments.output, report("throughput")
        )


if __name__ == "__main__":
    main()
