"""The step-time model beside real runs of 1 to 4 processes on this machine's CPU, over gloo.

    python toolkits/benchmark/check_step_time.py [--work FOLDER] [--layouts DP2 TP2]

Makes handwritten digits and a small LLaVA (8 layers of width 256), and trains it through the public launcher, a few
steps per layout, one thread per process.  The CPU's card is measured in the same run: the ceiling of a matrix product,
memory, and gloo between two processes; what training reaches of the ceiling, and the interpreter's time per layer, come
from two runs of one process with different micro-batches, which are therefore met by construction.  All other layouts
are predictions.  Needs a quiet machine, some minutes.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import toolkits.environment  # noqa: E402, F401
from megatron_patch.device_cards import Card, cpu_card  # noqa: E402
from megatron_patch.geometry import LlavaGeometry, read_geometry_of  # noqa: E402
from megatron_patch.length_mix import even  # noqa: E402
from megatron_patch.step_time import Plan, StepTime, predict  # noqa: E402

LANGUAGE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8}
IMAGE_TOKENS, LONGEST = 16, 256
GLOBAL_BATCH, STEPS, WARM = 8, 8, 2
ELAPSED = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")


@dataclass(frozen=True)
class Run:
    """One layout."""

    name: str
    micro_batch: int
    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    def plan(self) -> Plan:
        """For the model."""
        return Plan(
            GLOBAL_BATCH,
            self.micro_batch,
            self.tensor,
            self.pipeline,
            data=self.data,
            precision="fp32",
            longest=LONGEST,
            workers=1,
        )


CALIBRATION = (Run("one process", 4), Run("one process, micro-batch 1", 1))
PREDICTED = (
    Run("one process, micro-batch 2", 2),
    Run("DP2", 2, data=2),
    Run("DP4", 2, data=4),
    Run("TP2", 2, tensor=2),
    Run("PP2", 2, pipeline=2),
    Run("TP2 x DP2", 2, tensor=2, data=2),
)


def prepare(work: Path) -> None:
    """Data and the folder of configuration and tokenizer below `work`."""

    def call(*words: object) -> None:
        subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)

    call("-m", "examples.llava_mcore.quickstart.make_digits", work / "data", "--copies", 1)
    texts = work / "data/stage1/digits.json", work / "data/stage2/digits.json"
    call("-m", "examples.llava_mcore.quickstart.make_models", work / "models", "--texts", *texts)
    tools = REPOSITORY / "toolkits"
    convert = tools / "multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    call(convert, work / "data/stage2", "--output", work / "wds")
    words = ["tiny", work / "models/llm", work / "models/clip", work / "checkpoint", 1, 1, "false", "fp32"]
    script = tools / "model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(script), *map(str, words)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(work / "checkpoint/llava", work / "shape")
    config = json.loads((work / "llava/config.json").read_text())
    config["text_config"] |= LANGUAGE | {"num_key_value_heads": LANGUAGE["num_attention_heads"]}
    config["text_config"]["head_dim"] = LANGUAGE["hidden_size"] // LANGUAGE["num_attention_heads"]
    (work / "llava/config.json").write_text(json.dumps(config))


def measure_run(work: Path, run: Run) -> tuple[float, int, int]:
    """Median seconds of a step, and samples and tokens of all steps."""
    output = work / run.name.replace(" ", "_").replace(",", "")
    arguments = [
        *("dsw", "tiny", run.micro_batch, GLOBAL_BATCH, "1e-3", "1e-4", IMAGE_TOKENS, LONGEST, "fp32"),
        *(run.tensor, run.pipeline, 1, "false", "true", "false", "false", 1000),
        *(work / "wds", work / "wds", "none", STEPS, 1, output),
    ]
    options = {
        "TOKENIZER_PATH": work / "shape",
        "FREEZE_LANGUAGE_MODEL": "false",
        "FREEZE_VISION_TOWER": "false",
        "CONVERSATION_TEMPLATE": "v1",
        "EVAL_ITERS": 0,
        "NUM_WORKERS": 1,
        "CHECK": "false",
        "ACCELERATOR": "cpu",
        "NPROC_PER_NODE": run.tensor * run.pipeline * run.data,
        "OMP_NUM_THREADS": 1,
        "PYTHON": sys.executable,
    }
    script = REPOSITORY / "examples/llava_mcore/run_mcore_llava.sh"
    done = subprocess.run(
        ["bash", str(script), *map(str, arguments), "--no-save-optim"],
        env={**os.environ, **{name: str(value) for name, value in options.items()}},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"{run.name}: the run ended with exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    found = [float(ms) / 1000 for ms in ELAPSED.findall(done.stdout)]
    summary = json.loads((output / "summary.json").read_text())
    return statistics.median(found[WARM:]), summary["samples"], summary["tokens"]


def worker() -> None:
    """Of torchrun: seconds of an all-reduce of 16 MB and of 4 kB between two processes, as JSON from rank 0."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for amount in (16 * 2**20, 4096):
        tensor = torch.zeros(amount // 4)
        times = []
        for _ in range(25):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        found[amount] = statistics.median(times)
    if dist.get_rank() == 0:
        print("MEASURED", json.dumps(found), flush=True)
    dist.destroy_process_group()


def measure_gloo() -> tuple[float, float]:
    """Bytes/s and seconds of a hop between two processes, by the formula of a ring."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(re.search(r"MEASURED (.*)", done.stdout)[1])
    large, small = found[str(16 * 2**20)], found["4096"]
    return 16 * 2**20 / (large - small), small / 2


def measure_ceilings() -> tuple[float, float]:
    """FLOP/s of the decoder's matrix product in one thread, bytes/s of reading two arrays and writing one."""
    import torch

    torch.set_num_threads(1)

    def best(function: Callable[[], object], count: int = 25) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    rows, hidden, ffn = 512, LANGUAGE["hidden_size"], 2 * LANGUAGE["intermediate_size"]
    states, weights = torch.randn(rows, hidden), torch.randn(hidden, ffn)
    product = best(lambda: [states @ weights for _ in range(20)]) / 20
    one, other, result = (torch.ones(2**24) for _ in range(3))
    triad = best(lambda: torch.add(one, other, out=result))
    return 2 * rows * hidden * ffn / product, 3 * 4 * 2**24 / triad


def calibrate(
    geometry: LlavaGeometry, measured: list[float], text: int, memory: float, gloo: tuple[float, float], cores: int
) -> Card:
    """The card with which the two runs of one process come out as measured.

    Both do the same work; micro-batches of one record call each layer more often.
    """

    def with_speed(flops: float, layer_s: float) -> Card:
        return cpu_card(flops, memory, *gloo, cores, layer_s)

    def at(card: Card, run: Run) -> StepTime:
        return predict(geometry, run.plan(), card, even(text))

    first, second = CALIBRATION
    more_calls = (second.plan().micro_batches - first.plan().micro_batches) * geometry.language.layers
    layer_s = max(0.0, (measured[1] - measured[0]) / more_calls)
    unit = at(with_speed(1e9, layer_s), first)
    fixed = unit.host + unit.optimizer
    work = unit.seconds - fixed
    return with_speed(1e9 * work / (measured[0] - fixed), layer_s)


def main() -> None:
    """Measure, predict, print both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep everything there; default: a temporary one")
    parser.add_argument("--layouts", nargs="+", choices=[run.name for run in PREDICTED])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    work = arguments.work or Path(tempfile.mkdtemp(prefix="step_time_"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        prepare(work)
        compare(work, [run for run in PREDICTED if not arguments.layouts or run.name in arguments.layouts])
    finally:
        if arguments.work is None:
            shutil.rmtree(work)


def compare(work: Path, layouts: list[Run]) -> None:
    """Print the card and the table."""
    cores = len(os.sched_getaffinity(0))
    ceiling, memory = measure_ceilings()
    gloo = measure_gloo()
    results = [measure_run(work, run) for run in CALIBRATION]
    samples, tokens = (sum(result[number] for result in results) for number in (1, 2))
    text = round(tokens / samples) - IMAGE_TOKENS
    geometry = read_geometry_of(work / "shape")
    card = calibrate(geometry, [result[0] for result in results], text, memory, gloo, cores)
    reached = card.rate("fp32")
    print(
        f"cpu card: {cores} cores; matrix product {ceiling / 1e9:.1f} GFLOP/s, in training {reached / 1e9:.1f} "
        f"({reached / ceiling:.0%}); {card.layer_s * 1e3:.2f} ms per layer and micro-batch; "
        f"memory {memory / 1e9:.1f} GB/s; gloo {gloo[0] / 1e9:.2f} GB/s, "
        f"{gloo[1] * 1e6:.0f} us a hop; records of {text} + {IMAGE_TOKENS} tokens"
    )
    print("| layout | measured, ms | predicted, ms | ratio | most of it |\n|---|---|---|---|---|", flush=True)
    for run in (*CALIBRATION, *layouts):
        known = dict(zip(CALIBRATION, results, strict=True))
        seconds = known[run][0] if run in known else measure_run(work, run)[0]
        step = predict(geometry, run.plan(), card, even(text))
        most = sorted(step.parts.items(), key=lambda part: -part[1])[:4]
        told = ", ".join(f"{name} {part / step.seconds:.0%}" for name, part in most if part / step.seconds >= 0.01)
        ratio = f"{step.seconds / seconds:.2f}" + (" (set)" if run in known else "")
        print(f"| {run.name} | {seconds * 1e3:.0f} | {step.seconds * 1e3:.0f} | {ratio} | {told} |", flush=True)


if __name__ == "__main__":
    main()
