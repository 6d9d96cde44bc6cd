"""How long would a step take?  Tables of the model in megatron_patch/step_time.py, for 1 to 1,024 GPUs.

    python toolkits/benchmark/step_time.py --card H100 --gpus 1..1024 --micro-batch 8 --global-batch 128 --stage 2
    python toolkits/benchmark/step_time.py --card H200 --gpus 64 --tp 2 --pp 4 --mix mix665k --balance-cost --json
    python toolkits/benchmark/step_time.py --kind llava_next --image-size 480x640 --decoder-seq-len 4096
    python toolkits/benchmark/step_time.py --published

--gpus 1..1024 are powers of two.  --global-batch is a step's on any number of GPUs; where there are more data-parallel
ranks than micro-batches in it, it grows with them, and the table says so.  Nothing is measured here:
check_step_time.py in this folder compares with real runs on a CPU.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.device_cards import CARDS
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.launch.plan import size_of
from megatron_patch.launch.training_rules import PHOTO
from megatron_patch.length_mix import MIXES, LengthMix, even
from megatron_patch.llava_folder import LlavaFolder
from megatron_patch.step_flop import Frozen
from megatron_patch.step_time import RECOMPUTES, Plan, StepTime, predict
from toolkits.benchmark.known_models import LANGUAGE_MODELS, llava
from toolkits.benchmark.published_rows import ROWS

FROZEN = {"1": Frozen(True, True), "2": Frozen(vision_tower=True), "all": Frozen()}


def devices(text: str) -> list[int]:
    """`1..1024` -> the powers of two; `8,24` -> those."""
    first, dots, last = text.partition("..")
    if dots:
        return [number for number in (2**power for power in range(21)) if int(first) <= number <= int(last)]
    return [int(number) for number in text.split(",")]


def mix_of(text: str) -> LengthMix:
    """A name, or tokens of text beside one image each."""
    return MIXES[text] if text in MIXES else even(int(text))


def parser() -> argparse.ArgumentParser:
    """Arguments; names as the launchers' where they have one."""
    found = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    found.add_argument("--published", action="store_true", help="published rows beside the model's")
    found.add_argument("--card", choices=CARDS, default="H100")
    found.add_argument("--gpus", type=devices, default=devices("1..1024"), metavar="1..1024 or 8,24")
    model = found.add_mutually_exclusive_group()
    model.add_argument("--model", choices=LANGUAGE_MODELS, default="llama-7b", help="with CLIP-L/14 at 336 px")
    model.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a converted checkpoint, for its numbers")
    found.add_argument("--kind", choices=("llava", "llava_next"), default="llava", help="of --model")
    found.add_argument(
        "--image-size",
        type=size_of,
        default=PHOTO,
        metavar="HEIGHTxWIDTH",
        help="of each image, for a model that sees them at any resolution; default: 480x640",
    )
    found.add_argument("--stage", choices=FROZEN, default="2", help="what is trained; all: the vision tower too")
    found.add_argument("--mix", type=mix_of, default="mix665k", metavar=f"{' '.join(MIXES)} or TOKENS")
    found.add_argument("--precision", choices=("bf16", "fp16", "fp8", "fp32"), default="bf16")
    found.add_argument("--micro-batch", type=int, default=1)
    found.add_argument("--global-batch", type=int, default=128)
    found.add_argument("--decoder-seq-len", type=int, default=2048)
    for name in ("tp", "pp", "cp", "virtual-stages"):
        found.add_argument(f"--{name}", type=int, default=1)
    found.add_argument("--recompute", choices=RECOMPUTES, default="false")
    found.add_argument("--distributed-optimizer", action=argparse.BooleanOptionalAction, default=True)
    found.add_argument("--balance-cost", action="store_true")
    found.add_argument("--packing", action="store_true")
    found.add_argument("--hide", nargs="*", choices=("tensor", "context", "data"), default=["context"])
    found.add_argument("--json", action="store_true")
    return found


def plan_of(arguments: argparse.Namespace, gpus: int, geometry: LlavaGeometry) -> Plan:
    """For so many GPUs.  Raises UserError."""
    model = arguments.tp * arguments.pp * arguments.cp
    if gpus % model:
        raise UserError(f"TP x PP x CP = {model} does not divide {gpus} GPUs")
    data = gpus // model
    least = arguments.micro_batch * data * (arguments.pp if arguments.virtual_stages > 1 else 1)
    return Plan(
        -(-arguments.global_batch // least) * least,
        arguments.micro_batch,
        arguments.tp,
        arguments.pp,
        arguments.virtual_stages,
        arguments.cp,
        data,
        arguments.precision,
        arguments.recompute,
        arguments.distributed_optimizer,
        FROZEN[arguments.stage],
        arguments.balance_cost,
        arguments.packing,
        arguments.decoder_seq_len,
        hidden=frozenset(arguments.hide),
        image=geometry.any_resolution and geometry.any_resolution.plan(arguments.image_size),
    )


def table(found: list[tuple[int, Plan, StepTime]]) -> list[str]:
    """Markdown; shares of the step below 0.5% in all rows are left out."""
    names = [
        name for name in found[0][2].parts if any(step.parts[name] / step.seconds >= 0.005 for _, _, step in found)
    ]
    heads = ("GPUs", "step, samples", "s", "samples/s", "tokens/s/GPU", "MFU", "scaling", *names)
    first = found[0][2].samples_per_second / found[0][0]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in heads) + " |", "|---" * len(heads) + "|"]
    for gpus, plan, step in found:
        cells = [
            str(gpus),
            str(plan.global_batch),
            f"{step.seconds:.3g}",
            f"{step.samples_per_second:.4g}",
            f"{step.tokens_per_second_and_device:.0f}",
            f"{step.utilisation:.1%}",
            f"{step.samples_per_second / gpus / first:.0%}",
            *(f"{step.parts[name] / step.seconds:.1%}" for name in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def published() -> list[str]:
    """Published beside predicted."""
    lines = [
        "| run | published | predicted | ratio | source | assumed |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        value = row.predicted()
        ratio = f"{value / row.published:.2f}"
        if row.calibrates:
            ratio += " (sets the efficiency)"
        elif any(other.share_of == row.name for other in ROWS):
            ratio += f" (sets its program's share, {row.published / value:.0%})"
        figures = f"{row.published:g} {row.unit}/s/GPU | {value:.4g} | {ratio}"
        lines.append(f"| {row.name} | {figures} | {row.source} | {row.assumed} |")
    return lines


def main() -> None:
    """Print a table, or JSON."""
    arguments = parser().parse_args()
    if arguments.published:
        print("\n".join(published()))
        return
    try:
        geometry: LlavaGeometry = (
            LlavaFolder.of(arguments.checkpoint).geometry()
            if arguments.checkpoint
            else llava(arguments.model, kind=arguments.kind)
        )
        plans = [(gpus, plan_of(arguments, gpus, geometry)) for gpus in arguments.gpus]
        card = CARDS[arguments.card]
        found = [(gpus, plan, predict(geometry, plan, card, arguments.mix)) for gpus, plan in plans]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        told = [
            {
                "gpus": gpus,
                "global_batch": plan.global_batch,
                "seconds": step.seconds,
                "samples_per_second": step.samples_per_second,
                "tokens_per_second_and_device": step.tokens_per_second_and_device,
                "utilisation": step.utilisation,
                "parts": step.parts,
            }
            for gpus, plan, step in found
        ]
        print(json.dumps(told, indent=2))
        return
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
