"""Training of LLaVA-NeXT and LLaVA-OneVision models on images of many shapes, several of them in some records, and of
LLaVA-OneVision on videos, too, alone and beside images.

The same run under every parallelism, and resumed; tolerances as in test_parallelism.py.  That logits, loss and
gradients are transformers' is shown in tests/model/test_any_resolution.py; here the first loss of a run is looked up
there once more, from the bytes of the records on.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.data.conversation import Exchange
from megatron_patch.data.loading.config import DataConfig
from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.loader import build_train_loader
from megatron_patch.data.record import cook
from megatron_patch.inference import Request, Sampling, open_engine
from megatron_patch.llava_folder import LlavaFolder
from tests import tiny_models
from tests.model.test_any_resolution import judges_features
from tests.training.launching import ROOT, Workspace, losses, run, run_and_kill

KINDS = {"llava_next": ("mistral", "clip", "mistral"), "llava_onevision": ("qwen2", "siglip_last", "qwen")}
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "white": (240, 240, 240)}
ITERATIONS = 12
WITHOUT = {"TRAIN_ITERS": ITERATIONS, "DECODER_SEQ_LEN": 384, "PADDING_FREE": "false"}
ROWS = {
    "TP2 + SP": {"TP": 2},
    "PP2": {"PP": 2},
    "CP2": {"CP": 2},
    "DP2 + distributed optimizer": {"NPROC_PER_NODE": 2, "DO": "true"},
    "TP2 x PP2": {"TP": 2, "PP": 2},
    "recompute full": {"AC": "full"},
    "rows without padding": {"PADDING_FREE": "true"},
}
# LLaVA-OneVision's head is its embedding, which FSDP refuses
ROWS_OF_NEXT = {"FSDP": {"NPROC_PER_NODE": 2, "FSDP": "full"}}
# before and after a resume, with the distributed optimizer, whose state other layouts can load
CHANGES = {
    "one process to PP2": ({}, {"PP": 2}),
    "TP2 to DP2": ({"TP": 2}, {"NPROC_PER_NODE": 2}),
    "PP2 to CP2": ({"PP": 2}, {"CP": 2}),
}
DEFAULT = []  # that of one process is in tests/model, stage 1 from shards is below


def write_frames(folder: Path, count: int, colour: tuple[int, int, int], size: tuple[int, int]) -> None:
    """A square of a colour that goes from left to right."""
    folder.mkdir(parents=True)
    for number in range(count):
        image, left = Image.new("RGB", size, (90, 90, 90)), number * size[0] // count
        ImageDraw.Draw(image).rectangle((left, 0, left + size[0] // 2, size[1]), fill=colour)
        image.save(folder / f"{number}.png")


def write_records(folder: Path, videos: bool) -> None:
    """One to three images of odd sizes in a record, or none; the answer names the colour of each right half.

    videos: a folder of frames beside the images of every second record, and the answer ends with its colour.
    """
    draw, of_videos = random.Random(11), random.Random(12)
    (folder / "images").mkdir(parents=True)
    found = []
    for number in range(96):
        count, names, files = draw.choice((0, 1, 1, 1, 2, 3)), [], []
        for place in range(count):
            name = draw.choice(list(COLOURS))
            size = draw.choice(((20, 90), (100, 30), (56, 56), (70, 44), (29, 31), (130, 8)))
            image = Image.new("RGB", size, (0, 0, 0))
            ImageDraw.Draw(image).rectangle((size[0] // 2, 0, *size), fill=COLOURS[name])
            image.save(folder / "images" / f"{number}_{place}.png")
            names.append(name)
            files.append(f"{number}_{place}.png")
        turns = [
            {"from": "human", "value": "<image>\n" * count + "What colours?"},
            {"from": "gpt", "value": ", ".join(names) or "none"},
        ]
        found.append({"id": f"r{number}", "image": files, "conversations": turns})
        if videos and number % 2:
            name = of_videos.choice(list(COLOURS))
            size = of_videos.choice(((40, 30), (9, 50), (28, 28)))
            write_frames(folder / f"videos/v{number}", of_videos.choice((1, 3, 6)), COLOURS[name], size)
            turns[0]["value"] += " <video>"
            turns[1]["value"] += f"; {name}"
            found[-1]["video"] = f"v{number}"
    for record in found:
        if not record["image"]:
            del record["image"]
    (folder / "records.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    """Of each kind, with its dataset."""
    folder = tmp_path_factory.mktemp("any_resolution")
    converters = {
        "llava_next": ("convert_llava_pretrain_to_wds.py", "records"),
        "llava_onevision": ("convert_llava_video_to_wds.py", "records/records.json"),
    }
    for kind, (family, tower, _) in KINDS.items():
        write_records(folder / kind / "records", videos=kind == "llava_onevision")
        script, source = converters[kind]
        converter = ROOT / "toolkits/multimodal_data_preprocessing" / script
        words = [str(folder / kind / source), "--split", "9,1,0", "--samples-per-shard", "8"]
        subprocess.run([sys.executable, str(converter), *words], check=True, capture_output=True)
        tiny_models.make_tiny_llava(folder / kind / "hf", family, tower=tower, kind=kind)
        hub, checkpoint = folder / kind / "hf", folder / kind / "checkpoint"
        convert_to_megatron(hub, None, checkpoint, precision="fp32", model_size="tiny")
    return {kind: Workspace(folder / kind / "checkpoint", folder / kind / "records" / "wds") for kind in KINDS}


@pytest.fixture(scope="module")
def alone(workspaces: dict[str, Workspace], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """(output, losses) of one process."""
    found = {}

    def of(kind: str) -> tuple[Path, dict[int, float]]:
        if kind not in found:
            output = tmp_path_factory.mktemp(kind) / "out"
            settings = WITHOUT | {"CONVERSATION_TEMPLATE": KINDS[kind][2], "SAVE_INTERVAL": 6}
            found[kind] = output, losses(run(workspaces[kind], output, **settings))
        return found[kind]

    return of


CASES = [(kind, row) for kind in KINDS for row in ROWS] + [("llava_next", row) for row in ROWS_OF_NEXT]


@pytest.mark.parametrize(
    ("kind", "row"), [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in CASES]
)
def test_losses_equal_a_single_process(kind: str, row: str, workspaces: dict, alone, tmp_path: Path) -> None:
    _, expected = alone(kind)
    assert min(expected.values()) < 0.95 * expected[1], "a run that does not learn proves little"
    settings = WITHOUT | {"CONVERSATION_TEMPLATE": KINDS[kind][2]} | (ROWS | ROWS_OF_NEXT)[row]
    found = losses(run(workspaces[kind], tmp_path / "out", **settings))
    assert found.keys() == expected.keys()
    worst = max(abs(found[i] / expected[i] - 1) for i in expected)
    print(f"{kind}, {row}: largest relative difference {worst:.1e}")
    assert worst <= 7e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(kind: str, workspaces: dict, alone, tmp_path: Path) -> None:
    _, expected = alone(kind)
    settings = WITHOUT | {"CONVERSATION_TEMPLATE": KINDS[kind][2], "SAVE_INTERVAL": 6}
    run_and_kill(workspaces[kind], tmp_path / "out", 8, **settings)
    resumed = losses(run(workspaces[kind], tmp_path / "out", **settings))
    assert resumed == {number: expected[number] for number in range(7, ITERATIONS + 1)}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_under_another_layout(kind: str, change: str, workspaces: dict, alone, tmp_path: Path) -> None:
    _, expected = alone(kind)
    before, after = CHANGES[change]
    settings = WITHOUT | {"CONVERSATION_TEMPLATE": KINDS[kind][2], "SAVE_INTERVAL": 6, "DO": "true"}
    # the first half ends by Megatron's own limit, so that the schedule is that of the whole run
    words = ["--exit-interval", "6"]
    assert len(losses(run(workspaces[kind], tmp_path / "out", words=words, **settings | before))) == 6
    rest = losses(run(workspaces[kind], tmp_path / "out", **settings | after))
    assert sorted(rest) == list(range(7, ITERATIONS + 1))
    worst = max(abs(rest[i] / expected[i] - 1) for i in rest)
    print(f"{kind}, {change}: largest relative difference {worst:.1e}")
    assert worst <= 7e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_equal_however_they_are_cut(kind: str, workspaces: dict, tmp_path: Path) -> None:
    settings = WITHOUT | {"CONVERSATION_TEMPLATE": KINDS[kind][2], "PACKING": "true", "BATCH_SIZE": 1}
    settings |= {"GLOBAL_BATCH_SIZE": 4}
    expected, *others = (
        losses(run(workspaces[kind], tmp_path / str(number), **settings | layout))
        for number, layout in enumerate(({}, {"TP": 2}, {"CP": 2}))
    )
    for found in others:
        worst = max(abs(found[i] / expected[i] - 1) for i in expected)
        print(f"{kind}, packed: largest relative difference {worst:.1e}")
        assert worst <= 7e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_answers_during_training_are_those_of_the_export(kind: str, workspaces: dict, tmp_path: Path) -> None:
    """Of the first records of the validation split, at PP2; the export answers through transformers."""
    workspace, output = workspaces[kind], tmp_path / "out"
    settings = WITHOUT | {"CONVERSATION_TEMPLATE": KINDS[kind][2], "TRAIN_ITERS": 3, "PP": 2}
    run(workspace, output, **settings, EVAL_INTERVAL=3, SAMPLE_ANSWERS=9)
    told = [json.loads(line) for line in (output / "answers/iter_0000003.jsonl").read_text().splitlines()]
    convert_to_huggingface(output / "checkpoint", tmp_path / "exported", precision="fp32", model_size="tiny")
    dataset = Dataset(str(workspace.dataset), "val")
    records = [cook(dataset[index]) for index in range(9)]
    asked = [
        Request(record.record_id, (Exchange(record.exchanges[0].question, None),), record.images, videos=record.videos)
        for record in records
    ]
    assert len({len(record.images) for record in records}) >= 3, "records of one kind prove little"
    assert any(record.videos for record in records) == (kind == "llava_onevision")
    with open_engine(tmp_path / "exported") as engine:
        answers = [engine.answer([one], Sampling(max_new_tokens=32))[0].text for one in asked]
    assert [line["answer"].strip() for line in told] == answers


@pytest.mark.slow
def test_inspection_shows_grids_and_tiles(workspaces: dict, tmp_path: Path) -> None:
    workspace = workspaces["llava_next"]
    script = ROOT / "toolkits/multimodal_data_preprocessing/inspect_dataset.py"
    words = [
        str(workspace.dataset),
        "--checkpoint",
        str(workspace.checkpoint),
        "--template",
        "mistral",
        "--count",
        "12",
    ]
    done = subprocess.run(
        [sys.executable, str(script), *words, "--output", str(tmp_path / "report")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report/report.html").read_text()
    grids = set(re.findall(r"\((\d x \d) tiles\)", page))
    assert {"1 x 3", "3 x 1"} <= grids, grids
    assert page.count("data:image/png") > 30, "tiles are not shown"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aspect", "longest"),
    [("anyres", 384), ("crop", 128)],
    ids=["grids", "one tile"],
)
def test_stage_1_trains_the_projector_alone(aspect: str, longest: int, workspaces: dict, tmp_path: Path) -> None:
    """image_newline is frozen with the LLM; with crop there is one tile of each image, as in the original stage 1."""
    workspace, output = workspaces["llava_next"], tmp_path / "out"
    frozen = {"FREEZE_LANGUAGE_MODEL": "true", "FREEZE_VISION_TOWER": "true", "IMAGE_ASPECT_RATIO": aspect}
    settings = {"TRAIN_ITERS": 3, "DECODER_SEQ_LEN": longest, "CONVERSATION_TEMPLATE": "mistral", **frozen}
    run(workspace, output, **settings)
    exported = tmp_path / "exported"
    convert_to_huggingface(output / "checkpoint", exported, precision="fp32", model_size="tiny")
    before, after = (load_file(f / "model.safetensors") for f in (workspace.checkpoint.parent / "hf", exported))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector"}
    assert LlavaFolder(exported).settings.image_aspect_ratio == aspect
    # three images of 16 tokens each fit into 128, where a grid may take 88 for one: none is left out as too long
    summary = json.loads((output / "summary.json").read_text())
    assert summary["records"]["kept"] == 3 * 8 and not summary["records"].get("skipped")


def next_loss_by_transformers(exported: Path, workspace: Workspace, template: str) -> float:
    """Loss of the batch after ITERATIONS iterations, of pixels that transformers' own processor makes of the files."""
    import transformers

    folder = LlavaFolder.of(workspace.checkpoint)
    geometry, images = folder.geometry(), folder.image_processing(tiny_models.IMAGE_SIDE_PX)
    del images["image_std"]
    config = DataConfig(
        tokenizer_path=str(folder.tokenizer),
        template=template,
        image_token_id=geometry.image_token_id,
        video_token_id=geometry.video_token_id,
        image_tokens=geometry.tower.image_tokens,
        side_px=geometry.tower.side_px,
        any_resolution=geometry.any_resolution,
        decoder_seq_len=384,
        **{"micro_batch_size": 8, "length_multiple": 1, "seed": 1234, "num_workers": 0},
        **images,
        **folder.settings.for_data(),
    )
    loader = build_train_loader(str(workspace.dataset), config, 0, 1)
    for _ in range(ITERATIONS):
        next(loader)
    batch, source = next(loader), workspace.dataset.parent
    records = [
        [Image.open(file).convert("RGB") for file in sorted(source.glob(f"images/{name[1:]}_*.png"))]
        for name in batch["record_ids"]
    ]
    frames = [sorted(source.glob(f"videos/v{name[1:]}/*.png")) for name in batch["record_ids"]]
    videos = [[Image.open(file).convert("RGB") for file in files] for files in frames if files]
    assert bool(videos) == (geometry.model_type == "llava_onevision")
    model = getattr(transformers, geometry.kind.architecture).from_pretrained(exported, dtype=torch.float32)
    unshifted = torch.full_like(batch["labels"], -100)
    unshifted[:, 1:] = batch["labels"][:, :-1]
    with torch.no_grad():
        found = model(
            input_ids=batch["tokens"],
            labels=unshifted,
            **judges_features(exported, model, records, videos, geometry.model_type),
        )
    return found.loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_finds_the_next_loss(kind: str, workspaces: dict, tmp_path: Path) -> None:
    """What was trained at TP2 is what is exported: image_newline has learnt, and the judge's loss is the run's next."""
    workspace, template = workspaces[kind], KINDS[kind][2]
    settings = WITHOUT | {"CONVERSATION_TEMPLATE": template, "TP": 2}
    run(workspace, tmp_path / "out", **settings)
    exported = tmp_path / "exported"
    convert_to_huggingface(tmp_path / "out/checkpoint", exported, precision="fp32", model_size="tiny")
    before = load_file(workspace.checkpoint.parent / "hf/model.safetensors")["image_newline"]
    assert not torch.equal(load_file(exported / "model.safetensors")["image_newline"], before)
    expected = next_loss_by_transformers(exported, workspace, template)
    printed = losses(run(workspace, tmp_path / "out", **settings | {"TRAIN_ITERS": ITERATIONS + 1}))
    assert printed[ITERATIONS + 1] == pytest.approx(expected, rel=1e-5)
