"""Host memory of a save and of a load with the distributed optimizer: no rank gathers its state.

The model has about 64 million trained elements, so its optimizer state (weights and two moments in fp32) takes 0.77 GB.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests import tiny_models
from tests.training.launching import ROOT, Workspace, command

STATE_BYTES = 3 * 4 * 63e6


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


def peak(workspace: Workspace, wide: Path, output: Path, ranks: int, iterations: int, saving: bool = True) -> float:
    """Most bytes that a rank held in a run up to an iteration, which goes on with what lies in `output`."""
    changes = {"PRETRAIN_CHECKPOINT_PATH": "none", "TOKENIZER_PATH": wide, "EVAL_ITERS": 0, "LR_WARMUP_ITERS": 0}
    changes |= {"DO": "true", "NPROC_PER_NODE": ranks, "GLOBAL_BATCH_SIZE": 2 * ranks, "TRAIN_ITERS": 3}
    words, environment = command(workspace, output, **changes)
    words += ["--exit-interval", str(iterations)]
    dry = subprocess.run(words, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    line = dry.stdout.splitlines()
    if not saving:
        place = line.index("--save")
        del line[place : place + 2]
    script = next(number for number, word in enumerate(line) if word.endswith("pretrain_llava.py"))
    line[script : script + 1] = [str(ROOT / "tests/training/peak_memory.py"), str(output), line[script]]
    output.mkdir(exist_ok=True)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return max(float((output / str(rank)).read_text()) for rank in range(ranks))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_holds_anothers_optimizer_state(ranks: int, workspace: Workspace, wide: Path, tmp_path: Path) -> None:
    without = peak(workspace, wide, tmp_path / "without", ranks, 1, saving=False)
    saved = peak(workspace, wide, tmp_path / "out", ranks, 1)
    loaded = peak(workspace, wide, tmp_path / "out", ranks, 2)
    print(f"DP{ranks}, GB of a rank:", *(f"{held / 1e9:.2f}" for held in (without, saved, loaded)))
    assert saved < without + 0.1 * STATE_BYTES
    # halves of gated MLPs are joined, and a rank's own weights are there once more, to be compared
    assert loaded < saved + 0.6 * STATE_BYTES
