"""The step-time model: identities of arithmetic, published rows within a factor, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_patch.device_cards import CARDS, cpu_card
from megatron_patch.errors import UserError
from megatron_patch.length_mix import MIX665K, MIXES, even
from megatron_patch.step_flop import Frozen, Work, step_flop
from megatron_patch.step_time import ALL_FROZEN, MEMORY_SHARE, NOTHING_FROZEN, SAMPLED_STEPS, Plan, look_at, predict
from megatron_patch.tile_plan import whole_image
from toolkits.benchmark.known_models import llava
from toolkits.benchmark.published_rows import ROWS

ROOT = Path(__file__).resolve().parents[1]
LLAVA, H100 = llava("llama-7b"), CARDS["H100"]
STAGE_1, STAGE_2 = Frozen(True, True), Frozen(vision_tower=True)
PROJECTOR = 1024 * 4096 + 4096**2  # weights, without biases
EVEN = even(300)


def plan(global_batch: int = 64, **changes: object) -> Plan:
    return Plan(global_batch, **{"frozen": STAGE_2, **changes})


def test_one_device_does_the_useful_work_at_its_rate() -> None:
    """Even records, nothing recomputed: FLOP by speed, and an optimizer that reads and writes."""
    step = predict(LLAVA, plan(64), H100, EVEN)
    tokens = 576 + 300
    work = Work(64, 64 * tokens, 64 * 150, 64, 64 * tokens * (tokens + 1) // 2)
    compute = step.tower + step.projector + step.decoder + step.head
    assert compute == pytest.approx(step_flop(LLAVA, STAGE_2, work) / H100.rate("bf16"), rel=1e-6)
    assert step.flop == step_flop(LLAVA, STAGE_2, work)
    trained = LLAVA.language.parameters + PROJECTOR
    assert step.optimizer == pytest.approx(trained * 34 / (3.35e12 * 0.8), rel=1e-3)
    assert step.seconds == pytest.approx(compute + step.optimizer)
    assert step.utilisation == pytest.approx(0.436 * compute / step.seconds)


def test_tiles_of_an_image_are_work() -> None:
    """LLaVA-NeXT, 480 x 640 pixels: 5 tiles, 2,340 tokens of the text beside 300."""
    geometry = llava("llama-7b", kind="llava_next")
    image = geometry.any_resolution.plan((480, 640))
    step = predict(geometry, plan(64, longest=4096, image=image), H100, EVEN)
    tokens = 2340 + 300
    work = Work(64, 64 * tokens, 64 * 150, 64 * 5, 64 * tokens * (tokens + 1) // 2)
    assert step.flop == step_flop(geometry, STAGE_2, work)
    one = predict(geometry, plan(64, longest=4096), H100, EVEN)
    assert step.tower == pytest.approx(5 * one.tower) and step.projector == pytest.approx(5 * one.projector)
    # a JPEG is decoded once however many tiles are cut of it, and each of these has a cost of its own
    reading = dataclasses.replace(H100, cores=1, peak={"bf16": 1e18})
    whole, cut = (
        predict(geometry, plan(64, longest=4096, image=of_each, frozen=ALL_FROZEN), reading, EVEN).loading
        for of_each in (None, image)
    )
    assert cut / whole == pytest.approx(1 + 4 * 0.45, rel=0.01)


def test_twice_the_ranks_halve_the_work_of_each() -> None:
    one, two = (predict(LLAVA, plan(64, data=data), H100, EVEN) for data in (1, 2))
    assert two.decoder == pytest.approx(one.decoder / 2) and two.tower == pytest.approx(one.tower / 2)
    assert one.data_traffic == 0 < two.data_traffic
    assert two.optimizer == one.optimizer
    shared = predict(LLAVA, plan(64, data=2, distributed_optimizer=True), H100, EVEN)
    assert shared.optimizer == pytest.approx(one.optimizer / 2)


def test_gradients_cross_a_ring() -> None:
    """2 (n - 1) / n of four bytes per trained weight; half of it in 16 bits where weights are gathered."""
    bandwidth = H100.node_bandwidth
    step = predict(LLAVA, plan(64, data=8, frozen=STAGE_1), H100, EVEN)
    hops = 14 * H100.node_latency_s
    assert step.data_traffic == pytest.approx(2 * 7 / 8 * 4 * PROJECTOR / bandwidth + hops)
    sharded = predict(LLAVA, plan(64, data=8, frozen=STAGE_1, distributed_optimizer=True), H100, EVEN)
    assert sharded.data_traffic == pytest.approx(7 / 8 * 6 * PROJECTOR / bandwidth + hops)
    for shared in (False, True):  # so few bytes move while others compute
        options = {"data": 8, "frozen": STAGE_1, "hidden": frozenset({"data"}), "distributed_optimizer": shared}
        assert predict(LLAVA, plan(64, **options), H100, EVEN).data_traffic == 0
    assert predict(LLAVA, plan(64, data=8, frozen=ALL_FROZEN), H100, EVEN).data_traffic == 0


def test_a_single_stage_has_no_bubble_and_many_micro_batches_have_little() -> None:
    assert predict(LLAVA, plan(64), H100, EVEN).pipeline_bubble == 0
    shares = []
    for global_batch in (4, 16, 64, 1024):
        step = predict(LLAVA, plan(global_batch, pipeline=4), H100, EVEN)
        work = step.decoder + step.tower + step.projector + step.head + step.pipeline_traffic + step.uneven_stages
        shares.append(step.pipeline_bubble / work)
    assert shares == sorted(shares, reverse=True)
    # (p - 1) / m of the work where stages are equal; the stage with the head is longer than the others
    assert shares[0] == pytest.approx(3 / 4, rel=0.05) and shares[-1] == pytest.approx(3 / 1024, rel=0.05)
    virtual = predict(LLAVA, plan(64, pipeline=4, virtual_stages=2), H100, EVEN)
    whole = predict(LLAVA, plan(64, pipeline=4), H100, EVEN)
    assert virtual.pipeline_bubble == pytest.approx(whole.pipeline_bubble / 2, rel=0.02)


def test_tensor_parallelism_pays_in_traffic_by_layer() -> None:
    step = predict(LLAVA, plan(64, tensor=2, frozen=STAGE_1), H100, even(40))
    alone = predict(LLAVA, plan(64, frozen=STAGE_1), H100, even(40))
    assert step.decoder == pytest.approx(alone.decoder / 2)
    hidden, features = 616 * 4096 * 2, 577 * 1024 * 2
    # frozen layers gather no inputs for gradients of weights
    moved = 64 * ((32 * 8 + 2) * hidden + 23 * 2 * 2 * features) / 2
    hops = 64 * (32 * 8 + 2 + 23 * 2 * 2) * H100.node_latency_s
    assert step.tensor_traffic == pytest.approx(moved / H100.node_bandwidth + hops, rel=1e-6)
    hidden_traffic = predict(LLAVA, plan(64, tensor=2, frozen=STAGE_1, hidden=frozenset({"tensor"})), H100, even(40))
    assert hidden_traffic.tensor_traffic < step.tensor_traffic


def test_trained_and_recomputed_layers_pay_for_more_traffic() -> None:
    """Of a trained layer 6 gathers and scatters backward, of one computed again 4 forward once more; sums of a trained
    tower backward too; all of it in four bytes.
    """
    trained = plan(64, tensor=2, frozen=NOTHING_FROZEN, recompute="full", precision="fp32")
    hidden, features = 616 * 4096 * 4, 577 * 1024 * 4
    passes, sums = 32 * (4 + 6 + 4) + 2, 23 * 4 * 2
    moved = 64 * (passes * hidden + sums * features) / 2
    hops = 64 * (passes + sums) * H100.node_latency_s
    step = predict(LLAVA, trained, H100, even(40))
    assert step.tensor_traffic == pytest.approx(moved / H100.node_bandwidth + hops, rel=1e-6)


def test_what_each_stage_trains_is_updated_there() -> None:
    """AdamW's bytes over those of memory: 32 for each weight of the stage that has most, and 2 in 16 bits."""
    bandwidth = H100.memory_bandwidth * MEMORY_SHARE
    language, tower, table = LLAVA.language, LLAVA.tower, 32000 * 4096
    block = 4 * 1024**2 + 2 * 1024 * 4096
    of_tower = 23 * block + 3 * 14**2 * 1024
    assert (tower.running_layers, tower.patch_px, language.tied_embeddings) == (23, 14, False)
    alone = predict(LLAVA, plan(64, frozen=NOTHING_FROZEN, precision="fp32"), H100, EVEN)
    assert alone.optimizer * bandwidth / 32 == pytest.approx(language.parameters + of_tower + PROJECTOR, rel=1e-6)
    cut = predict(LLAVA, plan(64, pipeline=2, frozen=NOTHING_FROZEN), H100, EVEN)
    first = (language.parameters - 2 * table) / 2 + table + of_tower + PROJECTOR
    assert cut.optimizer * bandwidth / 34 == pytest.approx(first, rel=1e-6)
    # an embedding that is the head, too, is held once by one stage, and by the first and the last of several
    tied = dataclasses.replace(LLAVA, language=dataclasses.replace(language, tied_embeddings=True))
    assert language.parameters - tied.language.parameters == table
    for stages, precision, bytes_each, untied, fewer in ((1, "fp32", 32, alone, table), (2, "bf16", 34, cut, 0)):
        step = predict(tied, plan(64, pipeline=stages, frozen=NOTHING_FROZEN, precision=precision), H100, EVEN)
        assert (untied.optimizer - step.optimizer) * bandwidth / bytes_each == pytest.approx(fewer, abs=1e3)


def test_context_parallelism_moves_keys_and_values() -> None:
    step = predict(LLAVA, plan(64, context=2, hidden=frozenset(), frozen=STAGE_1), H100, EVEN)
    states = 2 * 876 * 4096 * 2
    assert step.context_traffic == pytest.approx(64 * 32 * 3 * (states / 2 / H100.node_bandwidth + 10e-6), rel=1e-6)
    assert step.tower == predict(LLAVA, plan(64), H100, EVEN).tower, "every rank runs the tower"


def test_keys_and_values_pass_again_for_recomputed_layers_and_hide_behind_attention() -> None:
    of_ring = 64 * 32 * (2 * 876 * 4096 * 2 / 2 / H100.node_bandwidth + 10e-6)
    for passes, options in (
        (1, {"frozen": ALL_FROZEN}),
        (3, {"frozen": STAGE_1}),
        (4, {"frozen": STAGE_1, "recompute": "sel"}),
        (4, {"frozen": STAGE_1, "recompute": "full"}),
    ):
        step = predict(LLAVA, plan(64, context=2, hidden=frozenset(), **options), H100, EVEN)
        assert step.context_traffic == pytest.approx(passes * of_ring, rel=1e-6)
    attention = 64 * step_flop(LLAVA, STAGE_1, Work(pairs=876 * 877 // 2)) / H100.rate("bf16") / 2
    hidden = predict(LLAVA, plan(64, context=2, frozen=STAGE_1), H100, EVEN)
    assert hidden.context_traffic == pytest.approx(3 * of_ring - attention, rel=1e-6)


def test_hidden_states_pass_from_stage_to_stage() -> None:
    """Forward, and their gradients back; to another node by one adapter, each rank of TP its part."""
    states = 876 * 4096 * 2
    within = states / H100.node_bandwidth + H100.node_latency_s
    between = states / 8 / H100.network_bandwidth + H100.network_latency_s
    for seconds, options in (
        (2 * within, {"frozen": STAGE_1}),
        (within, {"frozen": ALL_FROZEN}),
        (2 * between, {"frozen": STAGE_1, "tensor": 8}),
        (0, {"frozen": STAGE_1, "virtual_stages": 2}),
    ):
        step = predict(LLAVA, plan(64, pipeline=2, **options), H100, EVEN)
        assert step.pipeline_traffic == pytest.approx(64 * seconds, rel=1e-6)


def test_a_ring_between_nodes_uses_the_adapters_of_its_devices() -> None:
    for data, tensor, adapters in ((16, 1, 8), (2, 8, 1), (4, 4, 2)):
        step = predict(LLAVA, plan(64, data=data, tensor=tensor, frozen=STAGE_1), H100, EVEN)
        ring = (data - 1) / data * 4 * PROJECTOR / tensor / (adapters * H100.network_bandwidth)
        hops = 2 * (data - 1) * H100.network_latency_s
        assert step.data_traffic == pytest.approx(2 * ring + hops, rel=1e-6)


def test_shared_out_weights_are_gathered_for_every_micro_batch() -> None:
    """Twice, and their gradients scattered, all in 16 bits: 8 micro-batches of each of 8 ranks."""
    once = 7 / 8 * 2 * PROJECTOR / H100.node_bandwidth + 7 * H100.node_latency_s
    options = {"data": 8, "fully_sharded": 8, "frozen": STAGE_1}
    step = predict(LLAVA, plan(64, **options), H100, EVEN)
    assert step.data_traffic == pytest.approx(8 * 3 * once, rel=1e-6)
    assert predict(LLAVA, plan(64, **options, hidden=frozenset({"data"})), H100, EVEN).data_traffic == 0


def test_images_are_read_by_the_workers_that_have_a_core() -> None:
    """Of a machine that does nothing else for long: 64 images at 4.4 ms."""
    reading = dataclasses.replace(H100, cores=3, peak={"bf16": 1e18})
    for readers, options in ((1, {"workers": 0}), (2, {}), (3, {"workers": 8}), (6, {"workers": 8, "pipeline": 2})):
        step = predict(LLAVA, plan(64, frozen=ALL_FROZEN, **options), reading, EVEN)
        assert step.seconds == pytest.approx(64 * 4.4e-3 / readers, rel=1e-6) and step.loading > 0
    two = predict(LLAVA, plan(64, data=2, frozen=ALL_FROZEN), reading, EVEN)
    assert two.seconds == pytest.approx(32 * 4.4e-3 / 2, rel=1e-6)


def test_recompute_is_a_second_forward_pass() -> None:
    kept, full, selective = (predict(LLAVA, plan(64, recompute=name), H100, EVEN) for name in ("false", "full", "sel"))
    assert kept.recompute == 0
    assert full.recompute == pytest.approx(full.decoder / 3)
    assert 0 < selective.recompute < 0.1 * full.recompute
    assert full.flop == kept.flop, "recomputed work is not useful work"
    forward_only = plan(64, recompute="full", frozen=ALL_FROZEN)
    assert predict(LLAVA, forward_only, H100, EVEN).recompute == 0


def test_fp8_is_for_the_decoder_alone() -> None:
    fp8, bf16 = (predict(LLAVA, plan(64, precision=name), H100, EVEN) for name in ("fp8", "bf16"))
    assert fp8.decoder < 0.6 * bf16.decoder
    assert (fp8.tower, fp8.head, fp8.projector) == (bf16.tower, bf16.head, bf16.projector)


def test_equal_records_wait_for_nobody_and_unequal_ones_less_when_balanced() -> None:
    even_lengths = look_at(LLAVA, plan(256, data=8, micro_batch=4), EVEN)
    assert even_lengths.padding == pytest.approx(0) and even_lengths.imbalance == pytest.approx(0)
    turn, balanced = (
        predict(LLAVA, plan(256, data=8, micro_batch=4, balanced=balanced), H100, MIX665K) for balanced in (False, True)
    )
    assert turn.imbalance / turn.seconds > 0.1 > 0.001 > balanced.imbalance / balanced.seconds
    assert balanced.padding < 0.3 * turn.padding
    assert balanced.seconds < 0.8 * turn.seconds
    assert (turn.flop, turn.tokens) == (balanced.flop, balanced.tokens), "the same records"
    packed = predict(LLAVA, plan(256, data=8, packed=True), H100, MIX665K)
    assert packed.padding == packed.imbalance == 0


def test_padding_is_what_the_longest_of_a_micro_batch_costs() -> None:
    """Useful FLOP of the same records, as long as the longest beside them, over those of their own lengths."""
    asked = plan(64, micro_batch=4)
    records = MIX665K.sample(SAMPLED_STEPS * 64, 576, asked.longest, 0, 1)

    def flop(tokens: int, images: int) -> int:
        return step_flop(LLAVA, STAGE_2, Work(tokens=tokens, images=images, pairs=tokens * (tokens + 1) // 2))

    batches = [records[start : start + 4] for start in range(0, len(records), 4)]
    padded = sum(flop(max(one.tokens for one in batch), one.images) for batch in batches for one in batch)
    useful = sum(flop(record.tokens, record.images) for record in records)
    found = look_at(LLAVA, asked, MIX665K)
    assert found.padding == pytest.approx(padded / useful - 1, rel=1e-6) and found.imbalance == 0
    longest = sum(max(one.tokens for one in batch) for batch in batches) / len(batches)
    assert found.micro_batch_tokens == pytest.approx(4 * longest)


def test_processes_share_the_cores_of_a_cpu() -> None:
    """Four processes on two cores take twice as long as on four, but for what they wait anyway."""
    few, many = (cpu_card(1e11, 1e10, 1e9, 1e-4, cores) for cores in (2, 4))
    four = plan(64, data=4, precision="fp32")
    slow, fast = (predict(LLAVA, four, card, EVEN) for card in (few, many))
    assert fast.shared_cores == 0
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    pipeline = plan(64, pipeline=2, precision="fp32")
    assert predict(LLAVA, pipeline, few, EVEN).shared_cores == 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_rows(row) -> None:
    """Megatron's own runs on 64 and 1,024 GPUs within 15%, LLaVA's on A100 and NeVA's within 25%; others reach less."""
    ratio = row.predicted() / row.published
    if row.calibrates:
        assert ratio == pytest.approx(1, abs=0.02)
    elif row.source.startswith("Megatron-Bridge"):
        assert ratio == pytest.approx(1, abs=0.15)
    elif row.source.startswith("LLaVA") or (row.share_of and row.card != "H800"):
        assert ratio == pytest.approx(1, abs=0.25)
    else:
        assert 1 <= ratio <= 2.3


def test_a_programs_share_is_set_by_its_first_row() -> None:
    first, *others = (row for row in ROWS if row.name.startswith("NeVA"))
    share = first.published / first.predicted()
    assert 0.5 < share < 0.8 and others
    for row in others:
        alone = dataclasses.replace(row, share_of="")
        assert row.predicted() == pytest.approx(share * alone.predicted())


def test_efficiency_is_set_by_two_rows() -> None:
    assert [row.plan.precision for row in ROWS if row.calibrates] == ["bf16", "fp8"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": 3}, "a global batch of 64 cannot be shared out over 3"),
        ({"image": whole_image(2340)}, "an image takes 2340 tokens, which leaves no room for text within 2048"),
        ({"tensor": 0}, "tensor is 0, wanted at least 1"),
        ({"recompute": "true"}, "recompute is 'true', wanted one of false, sel, full"),
        ({"virtual_stages": 2}, "2 virtual stages need more than one pipeline stage"),
        ({"pipeline": 4, "virtual_stages": 2, "data": 32}, "micro-batches in multiples of their number"),
        ({"tensor": 3}, "TP 3 cannot cut this model"),
        ({"pipeline": 5}, "PP 5 does not divide the 32 layers"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        predict(LLAVA, plan(64, **changes), H100, EVEN)


def test_a_precision_that_a_card_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="A100-80 has no fp8; it has bf16, fp16, fp32"):
        predict(LLAVA, plan(64, precision="fp8"), CARDS["A100-80"], EVEN)


def test_mixes_are_the_same_for_ever_and_fit() -> None:
    for mix in MIXES.values():
        records = mix.sample(500, 576, 1024, seed=3)
        assert records == mix.sample(500, 576, 1024, seed=3) != mix.sample(500, 576, 1024, seed=4)
        assert all(576 * record.images < record.tokens <= 1024 and record.labels >= 1 for record in records)
    share = sum(record.images == 0 for record in MIX665K.sample(20_000, 576, 2048)) / 20_000
    assert share == pytest.approx(40 / 664, abs=0.005)


def test_it_imports_nothing_beyond_the_standard_library_and_the_models_figures() -> None:
    """The launcher asks it before anything has started: what is imported says how long that takes on any machine."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import megatron_patch.step_time\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    rooms = {name.partition(".")[0] for name in imported}
    assert rooms <= sys.stdlib_module_names | {"megatron_patch"}, rooms - sys.stdlib_module_names
    assert {name.split(".")[1] for name in imported if name.startswith("megatron_patch.")} <= {
        "device_cards",
        "errors",
        "geometry",
        "language_models",
        "length_mix",
        "llava_kinds",
        "step_balance",
        "step_flop",
        "step_time",
        "tile_plan",
        "vision_towers",
    }


def command(*words: str) -> subprocess.CompletedProcess:
    script = ROOT / "toolkits/benchmark/step_time.py"
    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)


def test_the_command_prints_tables_and_json() -> None:
    began = time.monotonic()
    done = command("--gpus", "1..1024", "--micro-batch", "4", "--global-batch", "256")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows[2:]] == [f"| {2**power}" for power in range(11)]
    assert rows[2][1] == "256" and rows[-1][1] == "4096"
    assert time.monotonic() - began < 30
    done = command("--gpus", "8", "--tp", "2", "--mix", "300", "--json")
    (told,) = json.loads(done.stdout)
    assert told["seconds"] == pytest.approx(sum(told["parts"].values())) and told["parts"]["tensor_traffic"] > 0
    assert "Llama-3.1-405B" in command("--published").stdout


def test_the_command_refuses_in_one_sentence() -> None:
    done = command("--gpus", "6", "--tp", "4")
    assert (done.returncode, done.stderr) == (2, "error: TP x PP x CP = 4 does not divide 6 GPUs\n")
