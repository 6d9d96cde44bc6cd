"""Memory as planned and as measured, of real runs on the CPU."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from megatron_patch.geometry import read_geometry_of
from megatron_patch.memory import Sizes, rank_memory
from megatron_patch.model_sizes import size_name
from megatron_patch.step_flop import Frozen
from tests.training.launching import Workspace, run

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
