"""plan_llava.sh: does a run fit, how long does it take, which layout is fastest; on paper, for any number of GPUs."""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_patch.device_cards import CARDS, Card
from megatron_patch.errors import UserError
from megatron_patch.geometry import LlavaGeometry
from megatron_patch.launch.job_words import JOB, STAGES, job_call
from megatron_patch.launch.training_rules import PHOTO, fsdp_ranks, image_plan_of, model_of
from megatron_patch.length_mix import MIXES, LengthMix, even
from megatron_patch.memory import RankMemory, Sizes, checkpoint_bytes, parameters, rank_memory, trained_parameters
from megatron_patch.step_flop import Frozen
from megatron_patch.step_time import RECOMPUTES, Plan, StepTime, look_at, predict
from megatron_patch.tile_plan import TilePlan

ABOUT = """Plans a run on paper, without a GPU: memory of each rank, time of a step and of the whole run, and the
layouts that fit, the fastest first.

    bash plan_llava.sh --card H200x8 run_sft_mcore_llava.sh dsw 7B 4 128 ... (the run's own arguments)
    bash plan_llava.sh --card RTX4090x2 --propose run_mcore_llava.sh dsw 7B 1 256 ...

A model and not a measurement; how far it is off stands in toolkits/benchmark/README.md.
"""
USABLE = 0.92  # of a card's memory: the allocator's fragments and the driver take the rest
PARALLEL = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
PROPOSALS = 8


@dataclass(frozen=True)
class Planned:
    """One layout."""

    plan: Plan
    step: StepTime
    ranks: list[RankMemory]  # of the first and the last pipeline stage
    fits: bool

    @property
    def peak(self) -> RankMemory:
        """Of the rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.total)


def card_of(text: str) -> tuple[Card, int]:
    """`H200x8` -> the card, 8; A100-40GBx16, 4090x2 are understood too.  For argparse."""
    name, _, count = text.rpartition("x")
    found = [card for card in CARDS.values() if _plain(card.name) == _plain(name)]
    found = found or [card for card in CARDS.values() if _plain(card.name).endswith(_plain(name))] if name else []
    if len(found) != 1 or not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted CARDxCOUNT, as H200x8; cards: {', '.join(CARDS)}")
    return found[0], int(count)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").removesuffix("gb")


def mix_of(text: str) -> LengthMix:
    """A name of length_mix.MIXES, or tokens of text beside one image.  For argparse."""
    if text in MIXES:
        return MIXES[text]
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: wanted {', '.join(MIXES)}, or tokens of text beside one image")
    return even(int(text))


def size_of(text: str) -> tuple[int, int]:
    """`480x640` -> (480, 640), height and width.  For argparse."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted HEIGHTxWIDTH in pixels, as 480x640")
    return int(height), int(width)


def plan_of(values: Mapping[str, str], frozen: Frozen, world: int, of_node: int, image: TilePlan | None = None) -> Plan:
    """The layout of a run of so many processes, so many of them on a node; image: each one.  Raises UserError."""
    number = {name: int(values[name]) for name in ("TP", "PP", "CP", "BATCH_SIZE", "GLOBAL_BATCH_SIZE")}
    recompute = {"true": "sel", "offload": "false"}.get(values["AC"], values["AC"])
    return Plan(
        number["GLOBAL_BATCH_SIZE"],
        number["BATCH_SIZE"],
        number["TP"],
        number["PP"],
        int(values["VIRTUAL_STAGES"]),
        number["CP"],
        world // (number["TP"] * number["PP"] * number["CP"]),
        values["PR"],
        recompute,
        values["DO"] == "true",
        frozen,
        values["BALANCE_COST"] == "true",
        values["PACKING"] == "true",
        int(values["DECODER_SEQ_LEN"]),
        int(values["NUM_WORKERS"]) or 1,
        fsdp_ranks(values, world, of_node),
        image=image,
    )


def memory_of(geometry: LlavaGeometry, plan: Plan, mix: LengthMix) -> list[RankMemory]:
    """Of the first and the last pipeline stage, at a micro-batch of twice the mean length, at most a full one."""
    lengths = look_at(geometry, plan, mix)
    full = plan.micro_batch * plan.longest
    tokens = full if plan.packed else min(full, 2 * lengths.micro_batch_tokens)
    work = lengths.work(1000)
    sizes = Sizes(
        plan.tensor,
        plan.pipeline,
        plan.context,
        plan.data,
        round(tokens),
        round(tokens * work.labels / max(1, work.tokens)),
        plan.micro_batch * -(-work.images // 1000),
        plan.micro_batches,
        plan.precision,
        plan.recompute,
        plan.distributed_optimizer,
        plan.fully_sharded,
    )
    return [rank_memory(geometry, plan.frozen, sizes, stage) for stage in sorted({0, plan.pipeline - 1})]


def planned(geometry: LlavaGeometry, plan: Plan, card: Card, mix: LengthMix) -> Planned:
    """Time and memory of one layout.  Raises UserError: it cannot be."""
    ranks = memory_of(geometry, plan, mix)
    return Planned(plan, predict(geometry, plan, card, mix), ranks, _fit(ranks, card))


def _fit(ranks: Sequence[RankMemory], card: Card) -> bool:
    return max(rank.total for rank in ranks) <= USABLE * card.memory_bytes


def proposals(geometry: LlavaGeometry, wanted: Plan, card: Card, world: int, mix: LengthMix) -> list[Planned]:
    """Layouts that fit, the fastest first, of all TP, PP, micro-batches and recompute that model and batch allow."""
    found = []
    for tensor, pipeline, micro, recompute in itertools.product(PARALLEL, PARALLEL, MICRO_BATCHES, RECOMPUTES):
        data, rest = divmod(world, tensor * pipeline * wanted.context)
        if rest or tensor > card.devices_per_node or wanted.global_batch % max(1, micro * data) or not data:
            continue
        changes = {"tensor": tensor, "pipeline": pipeline, "virtual_stages": 1, "data": data, "micro_batch": micro}
        try:
            changes |= {"recompute": recompute, "distributed_optimizer": data > 1, "fully_sharded": 1}
            layout = dataclasses.replace(wanted, **changes)
            geometry.check_parallel(tensor, pipeline)
            ranks = memory_of(geometry, layout, mix)
            if _fit(ranks, card):
                found.append(Planned(layout, predict(geometry, layout, card, mix), ranks, fits=True))
        except UserError:
            continue
    return sorted(found, key=lambda one: one.step.seconds)[:PROPOSALS]


# ---------------------------------------------------------------- text


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _layout(plan: Plan) -> str:
    return (
        f"TP {plan.tensor}  PP {plan.pipeline}  CP {plan.context}  DP {plan.data}  BATCH_SIZE {plan.micro_batch}  "
        f"AC {plan.recompute}  DO {str(plan.distributed_optimizer).lower()}"
        + (f"  FSDP over {plan.fully_sharded}" if plan.fully_sharded > 1 else "")
    )


def report(
    one: Planned, geometry: LlavaGeometry, card: Card, iterations: int, image_size: tuple[int, int]
) -> Iterator[str]:
    """Lines about one layout; image_size: height and width of each image."""
    language, tower, projector = parameters(geometry)
    trained = trained_parameters(geometry, one.plan.frozen)
    yield f"model       {language:,} + {tower:,} (tower) + {projector:,} (projector) parameters, {trained:,} trained"
    if (lora := one.plan.frozen.lora) is not None:
        count = sum(lora.parameters(geometry, part) for part in lora.parts)
        yield f"adapters    {count:,} of them, rank {lora.rank}, in {', '.join(lora.parts)}"
    if (image := one.plan.image) is not None and image.tiles > 1:
        height, width = image_size
        yield f"images      of {height} x {width} pixels: {image.tiles} tiles, {image.tokens:,} tokens"
    yield f"layout      {_layout(one.plan)}, on {one.plan.devices} x {card.name}"
    usable = USABLE * card.memory_bytes
    for stage, rank in zip(("first", "last"), one.ranks, strict=False):
        name = f"{stage} stage" if len(one.ranks) > 1 else "each rank"
        parts = ", ".join(f"{part} {_gigabytes(size)}" for part, size in rank.parts.items())
        yield f"memory      {name}: {_gigabytes(rank.total)} GB ({parts})"
    verdict = "fits" if one.fits else "DOES NOT FIT"
    yield f"            {verdict}: {_gigabytes(usable)} of {_gigabytes(card.memory_bytes)} GB are usable"
    size = checkpoint_bytes(geometry, one.plan.frozen, one.plan.precision)
    yield f"checkpoint  {_gigabytes(size)} GB on disk"
    step = one.step
    rate = f"{step.samples_per_second:.1f} samples/s, {step.tokens_per_second_and_device:,.0f} tokens/s per GPU"
    yield f"step        {step.seconds:.2f} s: {rate}, MFU {step.utilisation:.0%}"
    shares = sorted(step.parts.items(), key=lambda part: -part[1])[:5]
    yield "            " + ", ".join(f"{name.replace('_', ' ')} {value / step.seconds:.0%}" for name, value in shares)
    yield f"whole run   {iterations} iterations: {_duration(iterations * step.seconds)}, validations and saves left out"


def _as_json(one: Planned) -> dict:
    return {
        "layout": dataclasses.asdict(one.plan) | {"hidden": sorted(one.plan.hidden)},
        "fits": one.fits,
        "memory_bytes": [rank.parts | {"total": rank.total} for rank in one.ranks],
        "step_seconds": one.step.seconds,
        "samples_per_second": one.step.samples_per_second,
        "tokens_per_second_and_gpu": one.step.tokens_per_second_and_device,
    }


@dataclass(frozen=True)
class Planner:
    """The command."""

    def parser(self) -> argparse.ArgumentParser:
        """The parser of its words."""
        parser = argparse.ArgumentParser(
            prog="plan_llava.sh", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--card", type=card_of, required=True, metavar="CARDxCOUNT", help=f"as H200x8; cards: {', '.join(CARDS)}"
        )
        parser.add_argument("--propose", action="store_true", help="the layouts that fit, the fastest first")
        parser.add_argument(
            "--mix",
            type=mix_of,
            metavar="MIX",
            help=f"lengths of the records: {', '.join(MIXES)}, or tokens of text beside one image; default: 40 in "
            "stage 1, mix665k in stage 2",
        )
        parser.add_argument(
            "--image-size",
            type=size_of,
            default=PHOTO,
            metavar="HEIGHTxWIDTH",
            help="of the data's images in pixels, for a model that sees them at any resolution; default: 480x640",
        )
        parser.add_argument("--json", action="store_true", help="one object: run, proposals")
        parser.add_argument("job", nargs=argparse.REMAINDER, metavar="JOB", help=JOB)
        return parser

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Print the plan; exit code 1 when the run does not fit."""
        parser = self.parser()
        arguments = parser.parse_args(words)
        card, count = arguments.card
        call, _ = job_call(parser, arguments.job, count, min(count, card.devices_per_node), environment)
        geometry, frozen = model_of(call)
        stage = STAGES[arguments.job[0].rpartition("/")[2]]
        mix = arguments.mix or (even(40) if stage == 1 else MIXES["mix665k"])
        try:
            image = image_plan_of(call, arguments.image_size)
            one = planned(geometry, plan_of(call, frozen, count, card.devices_per_node, image), card, mix)
            others = proposals(geometry, one.plan, card, count, mix) if arguments.propose or not one.fits else []
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if arguments.json:
            print(json.dumps({"run": _as_json(one), "proposals": [_as_json(other) for other in others]}, indent=2))
        else:
            print(*report(one, geometry, card, call.int("TRAIN_ITERS"), arguments.image_size), sep="\n")
            if others:
                print("\nlayouts that fit, the fastest first: seconds of a step, GB of the fullest rank")
                for other in others:
                    print(f"  {other.step.seconds:8.2f} {_gigabytes(other.peak.total):>7}  {_layout(other.plan)}")
            elif arguments.propose or not one.fits:
                print(f"\nno layout fits {count} x {card.name}: more cards, or cards with more memory are needed")
        sys.exit(0 if one.fits else 1)


COMMAND = Planner()
