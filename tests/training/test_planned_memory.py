"""Memory as planned and as measured, of real runs on the CPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from megatron_patch.geometry import read_geometry_of
from megatron_patch.memory import Sizes, rank_memory
from megatron_patch.model_sizes import size_name
from megatron_patch.step_flop import Frozen
from tests import tiny_models
from tests.training.launching import ROOT, Workspace, run

TOKENS, LABELS = 60, 12  # of a record of the dataset, about
DEEP = {"num_hidden_layers": 10, "hidden_size": 640, "intermediate_size": 1728, "vocab_size": 20000}
WIDE = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 16000}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
SHAPES = {
    "all is trained": (DEEP, {}, Sizes()),
    "the language model is frozen": (WIDE, {"FREEZE_LANGUAGE_MODEL": "true"}, Sizes()),
    "two stages": (DEEP, {"PP": 2}, Sizes(pipeline=2, micro_batches=4)),
    "bf16 under TP2": (WIDE, {"TP": 2, "PR": "bf16"}, Sizes(tensor=2)),
    "FSDP": (WIDE, {"NPROC_PER_NODE": 2, "FSDP": "full"}, Sizes(data=2, fully_sharded=2)),
    "shared optimizer": (WIDE, {"NPROC_PER_NODE": 2, "DO": "true"}, Sizes(data=2, distributed_optimizer=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_planned_within_15_percent(name: str, workspace: Workspace, tmp_path: Path) -> None:
    numbers, options, sizes = SHAPES[name]
    folder = Path(shutil.copytree(workspace.checkpoint / "llava", tmp_path / "llava"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= numbers | HEADS | {"head_dim": numbers["hidden_size"] // 8}
    (folder / "config.json").write_text(json.dumps(config))
    geometry = read_geometry_of(folder)
    # a start as a user's: a warm one shares pages with others
    of_run = {
        "PYTHON": sys.executable,
        "TOKENIZER_PATH": folder,
        "MODEL_SIZE": size_name(geometry.language.parameters),
        "TRAIN_ITERS": 5,
    }
    run(Workspace(Path("none"), workspace.dataset), tmp_path / "out", EVAL_ITERS=0, **of_run, **options)
    measured = json.loads((tmp_path / "out/summary.json").read_text())["memory_bytes"]
    seen = {"tokens": 2 * TOKENS, "labels": 2 * LABELS, "images": 2, "precision": options.get("PR", "fp32")}
    sizes = Sizes(**{**sizes.__dict__, **seen})
    frozen = Frozen(language_model=options.get("FREEZE_LANGUAGE_MODEL") == "true")
    planned = [rank_memory(geometry, frozen, sizes, stage, "cpu").total for stage in range(sizes.pipeline)]
    print(f"{name}: {measured / 1e6:.0f} MB measured, {max(planned) / 1e6:.0f} planned")
    assert max(planned) == pytest.approx(measured, rel=0.15)


TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 8}
SIZE = (48, 64)  # of every image: as a photograph, 2 x 2 tiles and the base tile


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny LLaVA-NeXT whose tower is not tiny, and records with one image each."""
    folder = tmp_path_factory.mktemp("photos")
    tiny_models.make_tiny_llava(folder / "hf", "mistral", kind="llava_next")
    convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
    config = json.loads((folder / "checkpoint/llava/config.json").read_text())
    config["vision_config"] |= TOWER
    (folder / "checkpoint/llava/config.json").write_text(json.dumps(config))
    (folder / "data/images").mkdir(parents=True)
    records = []
    for number in range(160):
        Image.new("RGB", SIZE[::-1], (number, 0, 0)).save(folder / f"data/images/{number}.png")
        turns = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": f"It is {number}."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data/data.json").write_text(json.dumps(records))
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    subprocess.run([sys.executable, str(converter), str(folder / "data")], check=True, capture_output=True)
    return Workspace(folder / "checkpoint", folder / "data/wds")


@pytest.mark.slow
@pytest.mark.parametrize(("records", "frozen"), [(32, False), (128, True)], ids=["trained tower", "frozen tower"])
def test_tiles_of_any_resolution_are_planned_within_15_percent(
    records: int, frozen: bool, photos: Workspace, tmp_path: Path
) -> None:
    """A frozen tower keeps little of a tile; of a trained one all layers count, and one tile an image is too few."""
    folder = photos.checkpoint / "llava"
    geometry = read_geometry_of(folder)
    options = {"PYTHON": sys.executable, "TOKENIZER_PATH": folder, "FREEZE_VISION_TOWER": str(frozen).lower()}
    options |= {"BATCH_SIZE": records, "GLOBAL_BATCH_SIZE": records, "TRAIN_ITERS": 3, "EVAL_ITERS": 0}
    run(Workspace(Path("none"), photos.dataset), tmp_path / "out", **options)
    measured = json.loads((tmp_path / "out/summary.json").read_text())["memory_bytes"]
    image = geometry.any_resolution.plan(SIZE)
    assert image.tiles == 5
    text = TOKENS - tiny_models.IMAGE_TOKENS
    numbers = {"tokens": records * (image.tokens + text), "labels": records * LABELS, "precision": "fp32"}
    planned, of_one_tile = (
        rank_memory(geometry, Frozen(vision_tower=frozen), Sizes(images=records * tiles, **numbers), 0, "cpu").total
        for tiles in (image.tiles, 1)
    )
    print(f"{measured / 1e6:.0f} MB measured, {planned / 1e6:.0f} planned, {of_one_tile / 1e6:.0f} of one tile")
    assert planned == pytest.approx(measured, rel=0.15)
    assert frozen or of_one_tile < 0.85 * measured
