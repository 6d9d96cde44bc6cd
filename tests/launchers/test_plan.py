"""plan_llava.sh, rehearse_llava.sh and doctor.sh, as a user calls them."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.lora import LoraConfig
from megatron_patch.memory import Sizes, rank_memory
from megatron_patch.step_flop import Frozen
from tests.launchers.launching import LLAVA_7B, NEXT, ROOT, STAGE_2, Inputs, start, tree
from tests.training.launching import Workspace, command
from toolkits.benchmark.known_models import llava

EXAMPLES = ROOT / "examples"
PLAN, REHEARSE = (EXAMPLES / f"llava_mcore/{name}_llava.sh" for name in ("plan", "rehearse"))
DOCTOR = EXAMPLES / "doctor.sh"


def stage_2(inputs: Inputs, **changes: str) -> list[str]:
    return [
        "run_sft_mcore_llava.sh",
        *inputs.training(**{"TP": "1", "AC": "false", "GLOBAL_BATCH_SIZE": "128"} | changes),
    ]


def test_a_run_that_fits_is_planned(inputs: Inputs):
    """The numbers of parameters are those of Mistral-7B, CLIP-L/14-336 (23 layers) and the projector."""
    before = tree(inputs.folder)
    result = start(PLAN, ["--card", "H200x8", *stage_2(inputs)], cwd=inputs.folder)
    assert result.returncode == 0, result.stderr
    assert "7,241,740,288 + 290,909,184 (tower) + 20,979,712 (projector) parameters" in result.stdout
    assert "TP 1  PP 1  CP 1  DP 8  BATCH_SIZE 1  AC false  DO true, on 8 x H200" in result.stdout
    assert "fits: 129.7 of 141.0 GB are usable" in result.stdout and tree(inputs.folder) == before
    assert "memory      each rank: " in result.stdout
    # 2 bytes of each weight, and 12 of Adam for a trained one
    size = 2 * (7241740288 + 290909184 + 20979712) + 12 * (7241740288 + 20979712)
    assert f"checkpoint  {size / 1e9:.1f} GB on disk\n" in result.stdout
    seconds = float(re.search(r"step +([\d.]+) s", result.stdout)[1])
    hours = float(re.search(r"whole run   20000 iterations: ([\d.]+) h,", result.stdout)[1])
    assert hours == pytest.approx(20000 * seconds / 3600, rel=0.01)


def test_long_runs_and_stages_are_told_as_such(inputs: Inputs):
    """Days from 48 hours on; memory of the first and the last stage, where these differ."""
    words = ["--card", "H200x8", *stage_2(inputs, PP="2", TRAIN_ITERS="200000")]
    told = start(PLAN, words, cwd=inputs.folder).stdout
    assert re.search(r"memory      first stage: .*\nmemory      last stage: ", told), told
    seconds = float(re.search(r"step +([\d.]+) s", told)[1])
    days = float(re.search(r"iterations: ([\d.]+) days,", told)[1])
    assert days == pytest.approx(200000 * seconds / 86400, rel=0.01)


def test_one_that_does_not_fit_ends_with_1_and_what_would(inputs: Inputs):
    words = ["--card", "A100-40GBx8", "--json", *stage_2(inputs)]
    result = start(PLAN, words, cwd=inputs.folder)
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    assert not found["run"]["fits"] and found["proposals"]
    assert all(max(rank["total"] for rank in one["memory_bytes"]) < 0.92 * 40e9 for one in found["proposals"])
    seconds = [one["step_seconds"] for one in found["proposals"]]
    assert seconds == sorted(seconds)
    result = start(PLAN, ["--card", "4090x1", *stage_2(inputs)], cwd=inputs.folder)
    assert result.returncode == 1 and "DOES NOT FIT: 22.1 of 24.0 GB" in result.stdout
    assert "no layout fits 1 x RTX4090" in result.stdout


def memory(inputs: Inputs, *words: str, **changes: str) -> dict[str, int]:
    result = start(PLAN, ["--card", "H200x8", "--json", *words, *stage_2(inputs, **changes)], cwd=inputs.folder)
    return json.loads(result.stdout)["run"]["memory_bytes"][0]


def test_what_shares_memory_out_is_seen(inputs: Inputs):
    """Per parameter 2 bytes of weights, 4 of gradients, 12 of Adam; TP cuts all, DO Adam's, AC=full activations."""
    trained = 7241740288 + 20979712
    plain = memory(inputs, DO="false")
    assert plain["weights"] == 2 * (trained + 290909184)
    assert (plain["gradients"], plain["optimizer"]) == (4 * trained, 12 * trained)
    in_32_bits = memory(inputs, DO="false", PR="fp32")  # which is its own copy in 32 bits
    assert in_32_bits["weights"] == 4 * (trained + 290909184)
    assert (in_32_bits["gradients"], in_32_bits["optimizer"]) == (4 * trained, 8 * trained)
    assert memory(inputs)["optimizer"] == pytest.approx(12 * trained / 8, rel=1e-6)
    cut = memory(inputs, TP="4")
    assert cut["weights"] == pytest.approx(plain["weights"] / 4, rel=1e-6)
    assert memory(inputs, AC="full")["activations"] < plain["activations"] / 8
    short = memory(inputs, "--mix", "40", DECODER_SEQ_LEN="4096")
    assert short["activations"] < memory(inputs, DECODER_SEQ_LEN="4096")["activations"]


def test_adapters_are_planned(inputs: Inputs):
    """Of each layer of Mistral-7B: rank x (inputs + outputs) of seven matrices; TP cuts one matrix of each."""
    options = {"LORA_RANK": "128", "LORA_ALPHA": "256"}
    result = start(PLAN, ["--card", "A100-80GBx1", *stage_2(inputs, AC="full")], **options)
    assert result.returncode == 0, result.stderr
    widths = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    adapters = 32 * 128 * widths
    assert f"adapters    {adapters:,} of them, rank 128, in language_model" in result.stdout
    assert f"{adapters + 20979712:,} trained" in result.stdout
    found = json.loads(start(PLAN, ["--card", "H200x8", "--json", *stage_2(inputs, TP="4")], **options).stdout)
    rank = found["run"]["memory_bytes"][0]
    whole = 32 * 128 * (2 * 4096 + 2 * 4096 + 3 * 4096)  # A of column-parallel layers, B of row-parallel ones
    cut = (adapters - whole + 20979712) / 4 + whole
    assert rank["gradients"] == pytest.approx(4 * cut, rel=1e-6)
    assert rank["weights"] == pytest.approx(2 * ((7241740288 + 290909184) / 4 + cut), rel=1e-6)


@pytest.fixture
def of_next(tmp_path: Path) -> Inputs:
    """Of a LLaVA-NeXT."""
    return Inputs(tmp_path / "next", LLAVA_7B | NEXT)


def test_tiles_of_any_resolution_are_planned(of_next: Inputs):
    """Of a photograph, or of the size that is given: 5 tiles and 2,340 tokens, 3 tiles and 1,464; or one."""
    words = ["--card", "H200x8", *stage_2(of_next, AC="full", DECODER_SEQ_LEN="4096")]
    assert "images      of 480 x 640 pixels: 5 tiles, 2,340 tokens\n" in start(PLAN, words).stdout
    found = {}
    for name, options, aspect in (
        ("photo", [], "anyres"),
        ("wide", ["--image-size", "300x600"], "anyres"),
        ("one tile", [], "pad"),
    ):
        more = ["--json", "--mix", "100", *options]
        result = start(PLAN, [*words[:2], *more, *words[2:]], IMAGE_ASPECT_RATIO=aspect)
        assert result.returncode == 0, result.stderr
        found[name] = json.loads(result.stdout)["run"]
    image = {name: one["layout"]["image"] for name, one in found.items()}
    assert [(image[name]["tiles"], image[name]["tokens"]) for name in image] == [(5, 2340), (3, 1752), (1, 576)]
    of_images = {name: one["memory_bytes"][0]["images"] for name, one in found.items()}
    assert [of_images[name] / of_images["one tile"] for name in of_images] == [5, 3, 1]
    activations = {name: one["memory_bytes"][0]["activations"] for name, one in found.items()}
    assert activations["photo"] / activations["one tile"] == pytest.approx(min(4096, 2 * 2440) / (2 * 676), rel=1e-3)
    assert found["photo"]["step_seconds"] > found["wide"]["step_seconds"] > found["one tile"]["step_seconds"]


def test_fixed_tiles_are_planned(inputs: Inputs):
    words = ["--card", "H200x8", *stage_2(inputs, AC="full", DECODER_SEQ_LEN="4096")]
    planned = start(PLAN, words, IMAGE_TILES="2x2").stdout
    assert "images      of 480 x 640 pixels: 5 tiles, 2,880 tokens\n" in planned


def test_an_image_that_leaves_no_room_is_told_before_a_run(of_next: Inputs):
    words = stage_2(of_next, DECODER_SEQ_LEN="2048")
    refused = start(PLAN, ["--card", "H200x8", *words])
    assert refused.returncode == 2 and refused.stderr == (
        "error: an image takes 2340 tokens, which leaves no room for text within 2048; raise DECODER_SEQ_LEN, or plan "
        "with smaller images (--image-size)\n"
    )
    assert start(PLAN, ["--card", "H200x8", "--image-size", "300x300", *words]).returncode == 0
    told = "note: an image of 480 x 640 pixels takes 2340 tokens, and DECODER_SEQ_LEN is 2048: records with images"
    launched = [
        start(STAGE_2, stage_2(of_next, DECODER_SEQ_LEN=longest)[1:], DRY_RUN="1") for longest in ("2048", "4096")
    ]
    assert [(done.returncode, told in done.stderr) for done in launched] == [(0, True), (0, False)]


def test_a_frozen_tower_of_any_resolution_sees_32_tiles_at_once():
    """Beside them wait features, twice as wide as the tower's, and pixels of 8 bits."""
    geometry = llava(kind="llava_next")
    tower = geometry.tower

    def images(count: int, frozen: Frozen) -> int:
        return rank_memory(geometry, frozen, Sizes(images=count)).images

    waiting = 577 * 2 * 2 * 1024 + 3 * 336**2
    frozen = Frozen(vision_tower=True)
    assert images(64, frozen) - images(32, frozen) == 32 * waiting
    at_once = 4 * 3 * 336**2 + 577 * 2 * (9 * 1024 + 3 * 4096)
    assert images(32, frozen) == 32 * (577 * 2 * 2 * 1024 + at_once)
    assert images(64, Frozen()) == 2 * images(32, Frozen()) and tower.running_layers == 23


def test_local_layers_keep_no_inputs_of_their_matrices():
    geometry, sizes = llava("llama-7b"), Sizes(tokens=100, precision="fp32")
    inputs_of_layer = 100 * 4 * (2 * 4096 + 11008)
    for frozen, less in ((Frozen(), 32 * inputs_of_layer), (Frozen(language_model=True), 0)):
        of_gpu, of_cpu = (rank_memory(geometry, frozen, sizes, device=device).activations for device in ("gpu", "cpu"))
        assert of_gpu - of_cpu == less


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
def test_an_embedding_is_held_by_the_stages_that_use_it(tied: bool):
    whole = llava("llama-7b")
    geometry = dataclasses.replace(whole, language=dataclasses.replace(whole.language, tied_embeddings=tied))
    every = geometry.language.parameters + geometry.tower.parameters + geometry.projector_parameters
    for stages, copies in ((1, 0), (4, geometry.language.vocabulary * geometry.language.hidden if tied else 0)):
        sizes = Sizes(pipeline=stages)
        found = sum(rank_memory(geometry, Frozen(), sizes, stage).weights for stage in range(stages))
        assert found == pytest.approx(2 * (every + copies), rel=1e-6)


OF_TRAINED_LAYER = 8 * 4096 + 3 * 11008  # elements a token: 2 H for norms, 2 Q, 2 K, 2 F; 2 H + F of matrices' inputs


@pytest.mark.parametrize(
    ("changes", "stage", "elements"),
    [
        ({}, 0, 32 * OF_TRAINED_LAYER),
        ({"recompute": "sel"}, 0, 32 * (OF_TRAINED_LAYER - 4096)),
        ({"tensor": 2}, 0, 32 * OF_TRAINED_LAYER / 2),
        ({"context": 4}, 0, 32 * OF_TRAINED_LAYER / 4),
        ({"pipeline": 4, "micro_batches": 8}, 0, 4 * 8 * OF_TRAINED_LAYER),
        ({"pipeline": 4, "micro_batches": 8}, 3, 8 * OF_TRAINED_LAYER),
        ({"pipeline": 4, "micro_batches": 2}, 1, 2 * 8 * OF_TRAINED_LAYER),
        ({"pipeline": 4, "micro_batches": 8, "recompute": "full"}, 2, 2 * 8 * 4096 + OF_TRAINED_LAYER),
    ],
)
def test_activations_are_of_the_layers_and_micro_batches_of_a_stage(changes: dict, stage: int, elements: float):
    found = rank_memory(llava("llama-7b"), Frozen(vision_tower=True), Sizes(tokens=100, **changes), stage)
    assert found.activations == 100 * 2 * elements


def test_frozen_layers_keep_what_gradients_pass_through():
    """None pass where nothing below learns; every later stage hands them on."""
    geometry, sizes = llava("llama-7b"), Sizes(tokens=100, pipeline=2)
    for frozen, stages in (
        (Frozen(True, True, False), (0, 1)),  # stage 1
        (Frozen(True, False, True), (0, 1)),
        (Frozen(True, True, True), (1,)),
    ):
        kept = [stage for stage in (0, 1) if rank_memory(geometry, frozen, sizes, stage).activations]
        assert kept == list(stages)


def test_logits_are_the_last_stages():
    """In 32 bits those of the labels, their softmax and its gradient."""
    whole, cut = Sizes(labels=60), Sizes(labels=60, tensor=2, context=3, pipeline=2)
    geometry, frozen = llava("llama-7b"), Frozen(vision_tower=True)
    assert rank_memory(geometry, frozen, whole).logits == 3 * 60 * 32000 * 4
    assert rank_memory(geometry, frozen, cut, 0).logits == 0
    assert rank_memory(geometry, frozen, cut, 1).logits == 3 * 60 * 32000 * 4 / 6


def test_fully_sharded_weights_are_whole_two_layers_at_a_time():
    geometry = llava("llama-7b")
    tables, projector = 2 * 32000 * 4096, geometry.projector_parameters
    body, tower = geometry.language.parameters - tables, geometry.tower.parameters
    found = rank_memory(geometry, Frozen(vision_tower=True), Sizes(data=8, fully_sharded=8))
    whole = tables + 2 * body / 32 + projector + 2 * tower / 23
    assert found.weights == pytest.approx(2 * ((tables + body + tower + projector) / 8 + whole), rel=1e-6)
    trained = tables + body + projector
    assert (found.gradients, found.optimizer) == (round(2 * trained / 8), round(12 * trained / 8))


@pytest.mark.parametrize(("device", "each"), [("gpu", 0), ("cpu", 4)])
def test_a_cpus_allocator_keeps_what_is_freed(device: str, each: int):
    geometry, frozen = llava("llama-7b"), Frozen(True, True, False)
    found = rank_memory(geometry, frozen, Sizes(data=2, distributed_optimizer=True), device=device)
    assert found.freed == each * geometry.projector_parameters


def test_recomputed_layers_keep_their_inputs_and_one_of_them_all():
    geometry, sizes = llava("llama-7b"), Sizes(tokens=100, precision="fp32")
    kept, recomputed = (
        rank_memory(geometry, Frozen(), dataclasses.replace(sizes, recompute=recompute)).activations
        for recompute in ("false", "full")
    )
    assert recomputed == 32 * 100 * 4 * 4096 + kept / 32


def test_adapters_of_the_tower_are_the_first_stages():
    geometry, lora = llava("llama-7b"), LoraConfig(rank=8, alpha=16, parts=("language_model", "vision_tower"))
    alone = dataclasses.replace(lora, parts=("language_model",))

    def gradients(lora: LoraConfig, stage: int) -> int:
        frozen = Frozen(True, True, True).with_adapters(lora)
        return rank_memory(geometry, frozen, Sizes(pipeline=2), stage).gradients

    assert gradients(lora, 1) == gradients(alone, 1) == gradients(alone, 0) > 0
    assert gradients(lora, 0) > gradients(alone, 0)


# NeVA's best-practice notes: decoder layers of LLaMA-7B -> MiB of a GPU at TP2, micro-batch 4, global batch 32.
PUBLISHED_MIB = {16: 34687, 20: 42359, 24: 49945, 30: 61433}


@pytest.mark.parametrize("image_tokens", [256, 576])
def test_memory_is_that_of_a_published_table(image_tokens: int):
    """Its records are not named: 40 tokens of text beside either image.  Figures within 4%, MiB a layer in 6%."""
    whole = llava("llama-7b")
    sizes = Sizes(tensor=2, data=4, tokens=4 * (image_tokens + 40), labels=4 * 40, images=4)
    planned = {}
    for layers in PUBLISHED_MIB:
        geometry = dataclasses.replace(whole, language=dataclasses.replace(whole.language, layers=layers))
        planned[layers] = rank_memory(geometry, Frozen(vision_tower=True), sizes).total / 2**20
    assert planned == pytest.approx(PUBLISHED_MIB, rel=0.04)
    of_layer = [(found[30] - found[16]) / 14 for found in (planned, PUBLISHED_MIB)]
    print(f"{image_tokens} tokens of an image: {of_layer[0]:.0f} MiB a layer planned, {of_layer[1]:.0f} published")
    assert of_layer[0] == pytest.approx(of_layer[1], rel=0.06)


def test_a_run_of_this_machine_hinders_no_plan(inputs: Inputs):
    """It may have the port that torch takes by default."""
    with contextlib.suppress(OSError), socket.create_server(("", 29500)):
        assert start(PLAN, ["--card", "H200x8", *stage_2(inputs)], cwd=inputs.folder).returncode == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--card", "H9000x8"], "'H9000x8': wanted CARDxCOUNT, as H200x8; cards: H200"),
        (["--card", "H200x0"], "'H200x0': wanted CARDxCOUNT"),
        (["--card", "H200x8", "--mix", "short"], "'short': wanted "),
        (["--card", "H200x8", "--image-size", "480x0"], "'480x0': wanted HEIGHTxWIDTH in pixels, as 480x640"),
        (["--card", "H200x8", "train.sh"], "wanted a launcher and its arguments behind the options"),
        (["--card", "H200x8"], "wanted a launcher and its arguments behind the options"),
        (["--card", "H200x8", "run_mcore_llava.sh", "dsw"], "argument 2 MODEL_SIZE is missing"),
    ],
)
def test_a_wrong_plan_is_refused(inputs: Inputs, words: list[str], line: str):
    result = start(PLAN, words, cwd=inputs.folder)
    assert result.returncode == 2 and line in result.stderr


def test_rules_hold_for_jobs_that_are_planned_and_rehearsed(inputs: Inputs):
    for script, of_job in ((PLAN, ["--card", "H100x16"]), (REHEARSE, ["--of", "16"])):
        result = start(script, [*of_job, *stage_2(inputs, TP="16")], cwd=inputs.folder)
        assert result.returncode == 2 and "TP='16' cannot cut this model" in result.stderr
        result = start(script, [*of_job, *stage_2(inputs, GLOBAL_BATCH_SIZE="100")], cwd=inputs.folder)
        assert result.returncode == 2 and "must be divisible by 16: BATCH_SIZE=1 x data-parallel" in result.stderr


# ---------------------------------------------------------------- rehearsal


def job(workspace: Workspace, output: Path, **changes: object) -> tuple[list[str], dict[str, str]]:
    """A launcher's name and arguments, and its environment."""
    words, environment = command(workspace, output, **changes)
    return [Path(words[1]).name, *words[2:]], environment


def rehearse(options: list[str], words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", REHEARSE, *options, *words], env=environment, capture_output=True, text=True)


def test_ranks_of_a_job_are_rehearsed(workspace: Workspace, tmp_path: Path):
    """Of 8: the last of the first stage, and the last; each with its part of the model and its slice of the data."""
    words, environment = job(workspace, tmp_path / "out", TP=2, PP=2, PACKING="false", PADDING_FREE="false")
    done = rehearse(["--ranks", "0,3,7", "--of", "8"], words, environment)
    assert done.returncode == 0, done.stderr
    zero, three, seven = re.findall(r"^rank .*(?:\n  .*)*", done.stdout, re.M)
    assert zero.startswith("rank 0 of 8: TP 0 of 2, PP 0 of 2, CP 0 of 1, DP 0 of 2\n")
    assert three.startswith(
        "rank 3 of 8: TP 1 of 2, PP 0 of 2, CP 0 of 1, DP 1 of 2\n  layers      0 to 1 of the decoder"
    )
    assert seven.startswith(
        "rank 7 of 8: TP 1 of 2, PP 1 of 2, CP 0 of 1, DP 1 of 2\n  layers      2 to 3 of the decoder"
    )

    def reads(text: str) -> str:
        return next(line for line in text.splitlines() if line.startswith("  reads"))

    def parameters(text: str) -> int:
        return int(re.search(r"parameters +([\d,]+),", text)[1].replace(",", ""))

    assert reads(three) == reads(seven) != reads(zero)
    # embedding and tower are the first stage's, the head, of half as many rows, is the last one's
    assert parameters(zero) == parameters(three) > parameters(seven)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_job_of_1024_is_rehearsed_and_its_planted_errors_are_found(workspace: Workspace, tmp_path: Path):
    """TP8 x PP4 x DP32; heads that TP does not divide, a missing shard and a batch that is too small are found."""
    folder = Path(shutil.copytree(workspace.checkpoint / "llava", tmp_path / "llava"))
    config = json.loads((folder / "config.json").read_text())
    numbers = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "hidden_size": 64}
    config["text_config"] |= numbers | {"intermediate_size": 176}
    config["vision_config"] |= {"num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    dataset = Path(shutil.copytree(workspace.dataset, tmp_path / "wds"))
    changes = {"TP": 8, "PP": 4, "GLOBAL_BATCH_SIZE": 64, "TOKENIZER_PATH": folder}
    of_job = Workspace(Path("none"), dataset)
    ranks = ["--ranks", "0,31,1023", "--of", "1024"]
    words, environment = job(of_job, tmp_path / "out", **changes)
    done = rehearse(ranks, words, environment)
    assert done.returncode == 0, done.stderr
    assert "rank 31 of 1024: TP 7 of 8, PP 0 of 4, CP 0 of 1, DP 3 of 32" in done.stdout
    assert "rank 1023 of 1024: TP 7 of 8, PP 3 of 4, CP 0 of 1, DP 31 of 32" in done.stdout
    refused = rehearse(ranks, *job(of_job, tmp_path / "out", **changes | {"GLOBAL_BATCH_SIZE": 32}))
    assert refused.returncode == 2 and "must be divisible by 64" in refused.stderr
    config["text_config"] |= {"num_attention_heads": 12, "num_key_value_heads": 12}
    (folder / "config.json").write_text(json.dumps(config))
    refused = rehearse(ranks, *job(of_job, tmp_path / "out", **changes))
    assert refused.returncode == 2 and "TP='8' cannot cut this model: num_attention_heads" in refused.stderr
    config["text_config"] |= numbers
    (folder / "config.json").write_text(json.dumps(config))
    next(dataset.rglob("*.tar")).unlink()
    refused = rehearse(ranks, *job(of_job, tmp_path / "out", **changes))
    assert refused.returncode != 0 and ".tar" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--of", "8", "--ranks", "8"], "--ranks 8: wanted whole numbers from 0 to 7"),
        (["--of", "12", "--per-node", "8"], "--of 12: wanted a multiple of the 8 processes of a node"),
        ([], "the following arguments are required: --of"),
    ],
)
def test_a_wrong_rehearsal_is_refused(inputs: Inputs, words: list[str], line: str):
    result = start(REHEARSE, [*words, *stage_2(inputs)], cwd=inputs.folder)
    assert result.returncode == 2 and line in result.stderr


# ---------------------------------------------------------------- doctor


def doctor(**environment: str) -> tuple[int, dict]:
    done = subprocess.run(
        ["bash", DOCTOR, "--json"], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.stderr == "", done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_the_doctor_shows_real_errors_of_what_does_not_import(tmp_path: Path):
    """A Transformer Engine whose library is another CUDA's, and a broken package that training needs."""
    for name, error in (
        ("transformer_engine", "libcudart.so.99 of transformer_engine: cannot open"),
        ("webdataset", "bad"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError({error!r})\n")
    code, found = doctor(PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    findings = {one["what"]: one for one in found["findings"]}
    engine = "is installed and does not import: ImportError: libcudart.so.99 of transformer_engine: cannot open"
    assert findings["transformer_engine.pytorch"]["found"] == engine
    assert findings["webdataset"]["found"] == "ImportError: bad" and findings["webdataset"]["state"] == "broken"
    # energon imports it
    assert code == 1 and found["used"] == "training cannot work here: megatron.energon, webdataset"
    assert findings["torch"]["state"] == findings["megatron.core"]["state"] == "ok"


@pytest.mark.parametrize(
    ("compiler", "told", "remedy"),
    [
        ("none", "left out by CXX=none: steps on a CPU are slower", "unset CXX"),
        (
            "/no/such",
            "there is no C++ compiler (/no/such): steps on a CPU are slower",
            "apt install g++, or name one by CXX",
        ),
        ("true --its words", "true --its words", ""),
    ],
)
def test_the_doctor_of_a_machine_without_the_environment(tmp_path: Path, compiler: str, told: str, remedy: str):
    empty = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    code, found = doctor(PYTHON=str(empty / "bin/python"), CXX=compiler)
    findings = {one["what"]: one for one in found["findings"]}
    torch = findings["torch"]
    assert code == 1 and torch["found"] == "ModuleNotFoundError: No module named 'torch'"
    assert torch["remedy"] == "bash examples/setup_environment.sh"
    assert (findings["compiler"]["found"], findings["compiler"]["remedy"]) == (told, remedy)
