"""Host memory of a save with the distributed optimizer: one rank gathers its state, not each of them.

The model has about 64 million trained elements, so its optimizer state (weights and two moments in fp32) takes 0.77 GB.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests import tiny_models
from tests.training.launching import ROOT, Workspace, command

STATE_BYTES = 3 * 4 * 63e6
MEMORY_ARGUMENTS = "--distrib-optim-fully-reshardable-mem-efficient", "--ckpt-fully-parallel-load"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of four layers of 16 million elements, without weights."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_models.make_tiny_llava(folder, "mistral")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 20480, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peaks(workspace: Workspace, wide: Path, folder: Path, ranks: int, without: tuple[str, ...] = ()) -> list[float]:
    """Most bytes that each rank held in a run of one iteration and its save, started `without` some arguments."""
    folder.mkdir()
    changes = {"PRETRAIN_CHECKPOINT_PATH": "none", "TOKENIZER_PATH": wide, "TRAIN_ITERS": 1, "EVAL_ITERS": 0}
    changes |= {"DO": "true", "NPROC_PER_NODE": ranks, "GLOBAL_BATCH_SIZE": 2 * ranks, "LR_WARMUP_ITERS": 0}
    words, environment = command(workspace, folder / "out", **changes)
    dry = subprocess.run(words, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    line = [word for word in dry.stdout.splitlines() if word not in without]
    script = next(number for number, word in enumerate(line) if word.endswith("pretrain_llava.py"))
    line[script : script + 1] = [str(ROOT / "tests/training/peak_memory.py"), str(folder), line[script]]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float((folder / str(rank)).read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_one_rank_gathers_the_optimizer_state(ranks: int, workspace: Workspace, wide: Path, tmp_path: Path) -> None:
    before = peaks(workspace, wide, tmp_path / "before", ranks, MEMORY_ARGUMENTS)
    now = peaks(workspace, wide, tmp_path / "now", ranks)
    for title, held in {"without": before, "with": now}.items():
        print(f"DP{ranks}, {title} them: GB of each rank", *(f"{size / 1e9:.2f}" for size in held))
    assert max(now[1:]) < min(before) - STATE_BYTES
    assert sum(now) < sum(before) - (ranks - 1) * STATE_BYTES
