"""What can be proven on one GPU, in one call: the same losses as on the CPU, then the throughput of a 7B LLaVA.

    python tests/gpu/on_one_gpu.py OUT                                     all of it, about eight minutes
    python tests/gpu/on_one_gpu.py OUT --accelerator cpu --size tiny       the script itself, tried without a GPU

The machine needs requirements.txt with a CUDA build of torch; Transformer Engine is used where it imports.  Nothing is
downloaded: models have random weights, images are made here.  Results go to the console and to OUT/results.json.

Losses: 20 iterations of a tiny model under each setting, against fp32 on the CPU; largest relative difference.
Throughput: samples per second from the run's own log (median of the last iterations), as a share of the limit of an
H100 or H200, 989 TFLOP/s of dense bf16 over the useful work of a sample: 8.05 and 17.01 TFLOP in stage 1 (256 or 576
image tokens and 40 of text), 35.8 in stage 2 (576 + 300).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from megatron_patch.conversion import convert_to_megatron
from tests import tiny_models
from tests.training.conftest import write_dataset
from tests.training.launching import ROOT, Workspace, command, losses

CONVERTER = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
RATE = re.compile(r"samples/s: ([0-9.]+)")
PEAK_FLOP = 989e12  # per second: dense bf16 of an H100 or H200, from NVIDIA's datasheet


@dataclass(frozen=True)
class Speed:
    """One throughput run of a 7B model."""

    title: str
    script: str
    side_px: int  # of images, cut into patches of 14 px
    text_tokens: int
    micro_batch: int
    tflop_per_sample: float
    options: dict[str, str]


STAGE_2 = {"FREEZE_LANGUAGE_MODEL": "false"}
SPEEDS = (
    Speed("stage 1, 256 + 40", "run_mcore_llava.sh", 224, 40, 32, 8.05, {}),
    Speed("stage 1, 576 + 40", "run_mcore_llava.sh", 336, 40, 16, 17.01, {}),
    Speed("stage 2, 576 + 300", "run_sft_mcore_llava.sh", 336, 300, 4, 35.8, STAGE_2),
)
SETTINGS = {
    "fp32": {"PR": "fp32"},
    "fp32, packed": {"PR": "fp32", "PACKING": "true", "BATCH_SIZE": 1},
    "bf16": {"PR": "bf16"},
    "bf16, distributed optimizer": {"PR": "bf16", "DO": "true"},
    "bf16, recompute selective": {"PR": "bf16", "AC": "sel"},
    "bf16, recompute full": {"PR": "bf16", "AC": "full"},
}


def launch(workspace: Workspace, output: Path, **changes: object) -> tuple[int, str]:
    """Run a launcher; returns exit code and everything it printed."""
    words, environment = command(workspace, output, **changes)
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def compare_losses(folder: Path, accelerator: str) -> list[dict]:
    """The table of losses; each row: setting, largest difference, or why there is none."""
    tiny_models.make_tiny_llava(folder / "hf", "mistral")
    convert_to_megatron(folder / "hf", None, folder / "checkpoint", precision="fp32", model_size="tiny")
    write_dataset(folder / "records")
    subprocess.run([sys.executable, str(CONVERTER), str(folder / "records")], check=True, capture_output=True)
    workspace = Workspace(folder / "checkpoint", folder / "records/wds")
    judges: dict[bool, dict[int, float]] = {}
    rows = []
    for number, (title, options) in enumerate(SETTINGS.items()):
        packed = "PACKING" in options
        if packed not in judges:
            kept = {name: value for name, value in options.items() if name in ("PACKING", "BATCH_SIZE")}
            code, printed = launch(workspace, folder / f"judge{packed}", PR="fp32", **kept)
            assert code == 0, printed[-3000:]
            judges[packed] = losses(printed)
        code, printed = launch(
            workspace, folder / f"run{number}", ACCELERATOR=accelerator, NPROC_PER_NODE=1, **{"PR": "fp32", **options}
        )
        row: dict[str, object] = {"setting": title, "exit": code}
        if code == 0:
            found = losses(printed)
            row["largest difference"] = max(abs(found[i] / loss - 1) for i, loss in judges[packed].items())
        else:
            row["said"] = printed[-1500:]
        rows.append(row)
        shown = f"{row['largest difference']:.1e}" if code == 0 else f"exit {code}: {printed.strip()[-300:]}"
        print(f"{title:32s} {shown}", flush=True)
    return rows


def write_model_folder(folder: Path, size: str, side_px: int) -> Path:
    """Configuration, processor and tokenizer of a LLaVA of this size; no weights."""
    tiny_models.make_tiny_llava(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    if size == "7B":
        config["text_config"] |= {
            **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064, "max_position_embeddings": 4096},
        }
        config["vision_config"] |= {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
            **{"image_size": side_px, "patch_size": 14},
        }
        config["image_seq_length"] = (side_px // 14) ** 2
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        processor |= {"size": {"shortest_edge": side_px}, "crop_size": {"height": side_px, "width": side_px}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_images(folder: Path, side_px: int, text_tokens: int, records: int = 512) -> Path:
    """Records of one image and about so many tokens of text; returns the energon folder."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    found = []
    for number in range(records):
        small = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side_px, side_px)).save(folder / f"images/{number}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"{number} " + "x " * (text_tokens // 2)},
        ]
        found.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(found))
    subprocess.run([sys.executable, str(CONVERTER), str(folder)], check=True, capture_output=True)
    return folder / "wds"


def measure_speed(folder: Path, size: str, accelerator: str, iterations: int) -> list[dict]:
    """Samples per second of each stage."""
    rows = []
    for number, speed in enumerate(SPEEDS):
        side_px = speed.side_px if size == "7B" else tiny_models.IMAGE_SIDE_PX
        image_tokens = (side_px // 14) ** 2 if size == "7B" else tiny_models.IMAGE_TOKENS
        model = write_model_folder(folder / f"model{number}", size, side_px)
        micro_batch = speed.micro_batch if size == "7B" else 2
        changes = {
            **{"MODEL_SIZE": size, "BATCH_SIZE": micro_batch, "GLOBAL_BATCH_SIZE": micro_batch},
            **{"SEQ_LEN": image_tokens, "DECODER_SEQ_LEN": image_tokens + speed.text_tokens + 120},
            **{"PR": "bf16" if size == "7B" else "fp32", "TRAIN_ITERS": iterations, "SAVE_INTERVAL": 10**6},
            **{"PRETRAIN_CHECKPOINT_PATH": "none", "TOKENIZER_PATH": model, "EVAL_ITERS": 0, "script": speed.script},
            **{"FREEZE_LANGUAGE_MODEL": "true", "FREEZE_VISION_TOWER": "true", "CONVERSATION_TEMPLATE": "plain"},
            **{"ACCELERATOR": accelerator, "NPROC_PER_NODE": 1, "NUM_WORKERS": 8 if size == "7B" else 0},
            **{"FL": "true", "DO": "true"},
        } | speed.options
        wds = write_images(folder / f"data{number}", side_px, speed.text_tokens, 512 if size == "7B" else 48)
        # The run ends before it would save 14 GB: what counts is in its log by then.
        code, printed = launch(Workspace(model, wds), folder / f"speed{number}", **changes)
        rates = [float(rate) for rate in RATE.findall(printed)]
        row: dict[str, object] = {"run": speed.title, "exit": code}
        if len(rates) >= 4:
            row["samples per second"] = statistics.median(rates[len(rates) // 2 :])
            shown = f"{row['samples per second']:8.2f} samples/s"
            if size == "7B":
                row["share of the bf16 limit"] = row["samples per second"] * speed.tflop_per_sample * 1e12 / PEAK_FLOP
                shown += f", {row['share of the bf16 limit']:.0%} of the limit"
        else:
            row["said"] = printed[-1500:]
            shown = f"exit {code}: {printed.strip()[-300:]}"
        rows.append(row)
        print(f"{speed.title:32s} {shown}", flush=True)
    return rows


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("7B", "tiny"), default="7B", help="of the throughput runs")
    parser.add_argument("--iterations", type=int, default=12, help="of each throughput run")
    words = parser.parse_args()
    words.output.mkdir(parents=True)
    results = {
        "losses": compare_losses(words.output / "losses", words.accelerator),
        "throughput": measure_speed(words.output / "speed", words.size, words.accelerator, words.iterations),
    }
    (words.output / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
