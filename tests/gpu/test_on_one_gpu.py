"""What the script for one GPU would start passes Megatron's parser, and its runs are those it speaks of."""

import subprocess
from pathlib import Path

import pytest

from tests.gpu.on_one_gpu import MICRO_BATCHES, SPEEDS, changes_of, command_of, write_model_folder
from tests.launchers.test_megatron_arguments import megatron_reads
from tests.training.launching import Workspace


@pytest.mark.slow
def test_the_throughput_runs_pass_the_parser(tmp_path: Path) -> None:
    (tmp_path / "wds/.nv-meta").mkdir(parents=True)
    lines = []
    for number, speed in enumerate(SPEEDS):
        model = write_model_folder(tmp_path / f"model{number}", "7B", speed.side_px)
        changes = changes_of(speed, "7B", "cuda", 7, model)
        line, environment = command_of(Workspace(model, tmp_path / "wds"), tmp_path / "out", **changes)
        dry = subprocess.run(line, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
        lines.append(dry.stdout.splitlines())
    for speed, args in zip(SPEEDS, megatron_reads(lines, 1), strict=True):
        assert "error" not in args, (speed.title, args)
        assert args["no_save_optim"] and args["global_batch_size"] == MICRO_BATCHES * args["micro_batch_size"]
        assert (args["fp8"] is not None, args["packing"]) == ("fp8" in speed.title, "packed" in speed.title)
