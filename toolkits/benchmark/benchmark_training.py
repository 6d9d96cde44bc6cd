"""Our trainer beside a plain loop over transformers' LlavaForConditionalGeneration, step for step, in one run.

    python toolkits/benchmark/benchmark_training.py [--shape 135M ...] [--stage 1 2] [--precision fp32] [--output DIR]

Both sides get the same records in the same batches, the same weights, the same frozen parts and the same precision.
Both are started once per shape, stage and precision, and then take turns: a block of steps of the one, a block of the
other, and a few matrix products to see what these cores can do.  The first losses of both must agree, or the
comparison is refused.  Ours is what the launcher starts, with everything it does around a step; the plain loop has
SDPA and fused AdamW.  Both load their records within the training process (NUM_WORKERS=0).

Stage 1 trains the projector, stage 2 the language model too; the shape `quickstart` trains everything, the tower too.
Printed, and written to DIR/results.json with a plot beside it: samples/s, tokens/s without padding, useful FLOP/s
(step_flop.py says what is counted) and their share of the matrix products', peak memory during the steps (of
the process; on a GPU what torch allocated), and the ratios of ours to the plain loop: medians over neighbouring blocks.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401

# isort: split
from gate import Block, Side
from tqdm import tqdm
from workload import SHAPES, Shape, write_model, write_records

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.geometry import LlavaGeometry, read_geometry_of
from megatron_patch.step_flop import Frozen, Work, step_flop

ROOT = Path(__file__).resolve().parents[2]
SIDES = Path(__file__).with_name("sides")
ENTRY = "pretrain_llava.py"
LAUNCHERS = {1: "run_mcore_llava.sh", 2: "run_sft_mcore_llava.sh"}
FROZEN = {1: ("freeze-language-model", "freeze-vision-tower"), 2: ("freeze-vision-tower",)}
# precision of the plain loop -> of ours, which keeps weights in 32 bits beside those it computes with
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "bf16-mixed": "bf16"}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of the first step: two orders of summation; 8 bits
WARM_UP = 3  # steps before the first block, of each side
PRODUCT_S = 0.3  # seconds of matrix products between two blocks


@dataclass
class Result:
    """What a table row and results.json hold of one comparison."""

    shape: str
    stage: int
    precision: str  # of the plain loop
    samples_per_second: dict[str, float]
    tokens_per_second: dict[str, float]
    useful_tflop_per_second: dict[str, float]
    share_of_products: dict[str, float]
    product_tflop_per_second: float
    peak_mib: dict[str, float]
    speed_ratio: float  # ours / plain, median over pairs of blocks
    speed_ratios: list[float]
    memory_ratio: float
    first_losses: dict[str, float]
    threads: dict[str, int]  # of torch, in each process
    operators: dict[str, dict[str, dict[str, float]]]  # of a profiled step of each side: calls and seconds


def our_command(
    shape: Shape, stage: int, precision: str, start: Path, wds: Path, output: Path, options: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """What the launcher would start, with our entry behind the gate, and the environment.

    start: a Megatron checkpoint, or for a shape without weights the folder of its config.
    """
    frozen = () if shape.all_trained else FROZEN[stage]
    arguments = [
        *("dsw", shape.size, shape.micro_batch, shape.micro_batch * shape.micro_batches, "1e-4", "1e-4"),
        *(shape.tile_tokens, shape.image_tokens + shape.text_tokens + 64, precision, 1, 1, 1, "false", "true"),
        *("false", "false", 10**9 - 1, wds, wds, start if shape.weights else "none", 10**6, 0, output),
    ]
    environment = os.environ | {
        **{name.replace("-", "_").upper(): str(name in frozen).lower() for name in FROZEN[1]},
        **{"CONVERSATION_TEMPLATE": "plain", "LOG_INTERVAL": "10", "EVAL_ITERS": "0", "NUM_WORKERS": "0"},
        **{"NPROC_PER_NODE": "1", "CHECK": "false", "PYTHON": sys.executable, "ALLOW_FRESH_PROJECTOR": "true"},
        **({} if shape.weights else {"TOKENIZER_PATH": str(start)}),
        **options,
    }
    script = ROOT / "examples/llava_mcore" / LAUNCHERS[stage]
    command = ["bash", str(script), *map(str, arguments), *(["--allow-fresh-projector"] if stage == 2 else [])]
    dry = subprocess.run(command, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True)
    if dry.returncode:
        raise RuntimeError(f"{script.name} refused:\n{dry.stderr}")
    words = dry.stdout.splitlines()
    words[words.index(next(word for word in words if word.endswith(ENTRY)))] = str(SIDES / "our_trainer.py")
    return words, environment


def plain_command(shape: Shape, stage: int, precision: str, model: Path, ours: list[str], run: Path) -> list[str]:
    """The plain loop, whose records are those of our command."""
    entry = next(number for number, word in enumerate(ours) if word.endswith("our_trainer.py"))
    run.write_text(json.dumps(ours[entry + 1 :]))
    frozen = () if shape.all_trained else FROZEN[stage]
    script = str(SIDES / "plain_loop.py")
    size = "x".join(map(str, shape.image_px or (shape.side_px, shape.side_px)))
    return [sys.executable, script, str(model), str(run), precision, str(shape.micro_batches), size, *frozen]


class Products:
    """Matrix products of the shape's largest layer, forward, for the ceiling of these cores or this GPU."""

    def __init__(self, shape: Shape, precision: str) -> None:
        import torch

        self._torch, self._cuda = torch, torch.cuda.is_available()
        options = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}
        options["device"] = "cuda" if self._cuda else "cpu"
        hidden, ffn = shape.language["hidden_size"], shape.language["intermediate_size"]
        rows = shape.micro_batch * (shape.image_tokens + shape.text_tokens)
        self._left, self._right = torch.randn(rows, hidden, **options), torch.randn(hidden, 2 * ffn, **options)
        self._flop = 2 * rows * hidden * 2 * ffn

    def flop_per_second(self) -> float:
        """The fastest of some."""
        best, end = 0.0, time.perf_counter() + PRODUCT_S
        while time.perf_counter() < end:
            began = time.perf_counter()
            self._left @ self._right
            if self._cuda:
                self._torch.cuda.synchronize()
            best = max(best, self._flop / (time.perf_counter() - began))
        return best


def check_losses(precision: str, ours: Block, plain: Block) -> None:
    """Raises RuntimeError: the two sides do not train the same."""
    difference = abs(ours.losses[0] / plain.losses[0] - 1)
    if not difference <= LOSS_TOLERANCE[precision]:
        raise RuntimeError(
            f"the first losses are {ours.losses[0]} and {plain.losses[0]}: {difference:.1e} apart, wanted at most "
            f"{LOSS_TOLERANCE[precision]:g}; the two sides do not do the same work"
        )


def compare(
    name: str, stage: int, precision: str, folder: Path, rounds: int, steps: int, options: dict[str, str]
) -> Result:
    """Both sides in turns.  precision: of the plain loop."""
    shape, of_ours = SHAPES[name], PRECISIONS[precision]
    model = folder / "model"
    if not model.exists():
        write_model(model, shape)
        records = 8 * shape.micro_batch * shape.micro_batches
        write_records(folder / "data", shape, records)
    start = model
    if shape.weights:
        start = folder / f"checkpoint-{of_ours}"
        if not start.exists():
            convert_to_megatron(model, None, start, precision=of_ours, model_size=shape.size)
    work = folder / f"{stage}-{precision}"
    work.mkdir()
    command, environment = our_command(shape, stage, of_ours, start, folder / "data/wds", work / "output", options)
    plain_words = plain_command(shape, stage, precision, model, command, work / "run.json")
    threads = next((word for word in command if word.startswith("OMP_NUM_THREADS=")), "OMP_NUM_THREADS=1")
    sides = {"ours": Side("our trainer", command, environment, work / "ours")}
    try:
        plain_environment = os.environ | {"OMP_NUM_THREADS": threads.partition("=")[2]}
        sides["plain"] = Side("plain loop", plain_words, plain_environment, work / "plain")
        products = Products(shape, of_ours)
        first = {side: trainer.run(WARM_UP) for side, trainer in sides.items()}
        if shape.weights:
            check_losses(of_ours, first["ours"], first["plain"])
        blocks: dict[str, list[Block]] = {side: [] for side in sides}
        ceiling = []
        done = first["plain"].more["work"]
        for number in tqdm(range(rounds), desc=f"{name}, stage {stage}, {precision}", leave=False):
            for side in sorted(sides, reverse=bool(number % 2)):  # who comes first alternates
                blocks[side].append(sides[side].run(steps))
            ceiling.append(products.flop_per_second())
        done = {key: value - done[key] for key, value in blocks["plain"][-1].more["work"].items()}
        threads = {side: block[-1].more["threads"] for side, block in blocks.items()}
        profiled = {side: trainer.run(1, profile=True).more["operators"] for side, trainer in sides.items()}
    finally:
        for trainer in sides.values():
            trainer.stop()
    per_step = {key: value / (rounds * steps) for key, value in done.items()}
    geometry = read_geometry_of(model)
    flop = useful_flop(geometry, shape, stage, done) / (rounds * steps)
    seconds = {side: statistics.median(block.seconds / steps for block in found) for side, found in blocks.items()}
    peaks = {side: max(block.peak_bytes for block in found) / 2**20 for side, found in blocks.items()}
    ratios = [b.seconds / a.seconds for a, b in zip(blocks["ours"], blocks["plain"], strict=True)]
    product = statistics.median(ceiling)
    return Result(
        shape=name,
        stage=stage,
        precision=precision,
        samples_per_second={side: per_step["records"] / s for side, s in seconds.items()},
        tokens_per_second={side: per_step["tokens"] / s for side, s in seconds.items()},
        useful_tflop_per_second={side: flop / s / 1e12 for side, s in seconds.items()},
        share_of_products={side: flop / s / product for side, s in seconds.items()},
        product_tflop_per_second=product / 1e12,
        peak_mib=peaks,
        speed_ratio=statistics.median(ratios),
        speed_ratios=ratios,
        memory_ratio=peaks["ours"] / peaks["plain"],
        first_losses={side: block.losses[0] for side, block in first.items()},
        operators=profiled,
        threads=threads,
    )


def useful_flop(geometry: LlavaGeometry, shape: Shape, stage: int, work: dict[str, int]) -> float:
    """FLOP of forward and backward for `work`, as the trainer's own log counts them."""
    frozen = () if shape.all_trained else FROZEN[stage]
    return step_flop(geometry, Frozen("freeze-language-model" in frozen, "freeze-vision-tower" in frozen), Work(**work))


def line(result: Result) -> str:
    """Of the table."""
    ours, plain = (
        f"{result.samples_per_second[side]:8.2f} samples/s {result.tokens_per_second[side]:9.0f} tokens/s "
        f"{result.useful_tflop_per_second[side]:7.3f} TFLOP/s ({result.share_of_products[side]:4.0%}) "
        f"{result.peak_mib[side]:6.0f} MiB"
        for side in ("ours", "plain")
    )
    what = f"{result.shape}, stage {result.stage}, {result.precision}"
    return (
        f"{what:32s} ours  {ours}\n{'':32s} plain {plain}\n"
        f"{'':32s} ratio {result.speed_ratio:.2f}x speed ({min(result.speed_ratios):.2f} to "
        f"{max(result.speed_ratios):.2f}), {result.memory_ratio:.2f}x memory; products reach "
        f"{result.product_tflop_per_second:.3f} TFLOP/s; "
        + "; ".join(
            f"{side}: {result.threads[side]} threads, first loss {result.first_losses[side]:.6f}"
            for side in ("ours", "plain")
        )
    )


def plot(results: list[Result], file: Path) -> None:
    """Bars of samples/s, ours beside the plain loop's, scaled so that the plain loop is 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = [f"{r.shape}\nstage {r.stage}, {r.precision}" for r in results]
    figure, axes = pyplot.subplots(2, 1, figsize=(2 + 1.6 * len(results), 6), sharex=True)
    for axis, what, ratios in (
        (axes[0], "speed", [r.speed_ratio for r in results]),
        (axes[1], "peak memory", [r.memory_ratio for r in results]),
    ):
        bars = axis.bar(range(len(results)), ratios, color="tab:blue")
        axis.bar_label(bars, fmt="%.2f")
        axis.axhline(1, color="tab:orange", label="plain loop over transformers")
        axis.set_ylabel(f"{what}, ours / plain")
        axis.set_xticks(range(len(results)), titles)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def plot_operators(result: Result, file: Path, count: int = 24) -> None:
    """Where a step of each side goes: milliseconds within each operator, the longest first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = {
        side: {name: found["seconds"] for name, found in operators.items()}
        for side, operators in result.operators.items()
    }
    together = {name: sum(of.get(name, 0) for of in seconds.values()) for of in seconds.values() for name in of}
    names = sorted(together, key=together.get)[-count:]
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.28 * len(names)))
    for shift, (side, colour) in zip((0.2, -0.2), (("ours", "tab:blue"), ("plain", "tab:orange")), strict=True):
        of = seconds[side]
        label = f"{side}: {sum(of.values()) * 1000:.0f} ms"
        axis.barh(
            [place + shift for place in range(len(names))],
            [of.get(name, 0) * 1000 for name in names],
            height=0.4,
            color=colour,
            label=label,
        )
    axis.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axis.set_xlabel("ms within the operator, of one step")
    axis.set_title(f"{result.shape}, stage {result.stage}, {result.precision}")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _shortened(operator: str) -> str:
    """Of torch's names what tells them apart."""
    for long, short in (
        ("aten::", ""),
        ("_scaled_dot_product_flash_attention_for_cpu", "flash_attention"),
        ("autograd::engine::evaluate_function: ", "autograd: "),
        ("torch::autograd::", ""),
        ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", "DataLoader"),
        ("LinearWithGradAccumulationAndAsyncCommunication", "Linear"),
    ):
        operator = operator.replace(long, short)
    return operator[:40]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["quickstart", "135M"])
    parser.add_argument("--stage", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["fp32"],
        help="bf16: the plain loop holds weights, gradients and optimizer in 16 bits; bf16-mixed: in 32, and computes "
        "under autocast, as transformers' Trainer does with bf16=True; ours is PR=bf16 beside both",
    )
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each side")
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument(
        "--option", nargs="+", default=[], metavar="NAME=VALUE", help="options of our launcher, e.g. PACKING=true"
    )
    parser.add_argument("--output", type=Path, help="folder for results.json and results.png")
    parser.add_argument("--work", type=Path, help="folder for models and records, kept; default: a temporary one")
    given = parser.parse_args()
    options = dict(option.split("=", 1) for option in given.option)
    results: list[Result] = []
    work = given.work or Path(tempfile.mkdtemp(prefix="benchmark_training_"))
    try:
        for name in given.shape:
            for precision in given.precision:
                for stage in given.stage:
                    shutil.rmtree(work / name / f"{stage}-{precision}", ignore_errors=True)
                    results.append(compare(name, stage, precision, work / name, given.rounds, given.steps, options))
                    print(line(results[-1]), flush=True)
                    if given.output:
                        given.output.mkdir(parents=True, exist_ok=True)
                        text = json.dumps([asdict(result) for result in results], indent=2)
                        (given.output / "results.json").write_text(text + "\n")
                        plot(results, given.output / "results.png")
                        plot_operators(results[-1], given.output / f"{name}-stage{stage}-{precision}.png")
    finally:
        if not given.work:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
