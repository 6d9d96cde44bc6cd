"""How fast, and in how much memory, is a LLaVA converted?  Both directions beside `cp` + `sync` of the same bytes.

    python benchmark_conversion.py --size 7B [--work FOLDER]

Makes a LLaVA of random bf16 weights, converts it to a Megatron checkpoint and back with the public command, each time
right after copying the same files, all from a disk cache emptied of them; at the end every byte of the export is
compared with the source.  The peak is the resident memory of the
converting process as the kernel counts it (VmHWM, imports included).  Needs three times the size on the disk;
everything is deleted at the end, also after a failure.  Exit code 0: both targets are met; 1: not; 2: no room.
"""

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY))

import toolkits.environment  # noqa: E402, F401

# isort: split
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_patch.conversion.hub_weights import row_blocks, write_hub_weights  # noqa: E402
from megatron_patch.conversion.output import check_disk  # noqa: E402
from megatron_patch.conversion.plan import wanted_tensors  # noqa: E402
from megatron_patch.conversion.table import HubTensor, table_of_weights  # noqa: E402
from megatron_patch.geometry import read_geometry  # noqa: E402
from toolkits.model_checkpoints_convertor.llava.command_line import exit_code  # noqa: E402

PEAK_MIB = 1536
SHARE_OF_COPY = 0.6
# name: layers, hidden, ffn, heads of the LLM; layers, width of the tower.  7B is Llama-2-7B with CLIP-L/14-336.
SIZES = {
    "7B": ((32, 4096, 11008, 32), (24, 1024)),
    "1B": ((22, 2048, 5632, 32), (24, 1024)),
    "tiny": ((2, 64, 176, 4), (2, 64)),
}
ROOM = {"7B": 14_200_000_000, "1B": 3_000_000_000, "tiny": 10_000_000}  # bytes of the source, rounded up
VOCABULARY = 32064
IMAGE_TOKEN = 32000


@dataclass(frozen=True)
class Measured:
    """One run: seconds, and MiB of resident memory at most."""

    seconds: float
    peak_mib: float


def config_of(size: str) -> dict:
    """A full LLaVA config of that size."""
    (layers, hidden, ffn, heads), (tower_layers, tower) = SIZES[size]
    import transformers

    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=tower,
            intermediate_size=4 * tower,
            num_hidden_layers=tower_layers,
            num_attention_heads=tower // 16,
            image_size=336,
            patch_size=14,
        ),
        image_token_index=IMAGE_TOKEN,
        architectures=["LlavaForConditionalGeneration"],
    ).to_dict()


def make_source(folder: Path, size: str) -> int:
    """Write a hub folder of random bf16 weights; returns their bytes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    config = config_of(size)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, default=str))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, IMAGE_TOKEN)}
    vocabulary["<image>"] = IMAGE_TOKEN
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"},
        additional_special_tokens=["<image>"],
    )
    tokenizer.save_pretrained(str(folder))
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "CLIPImageProcessor"}
    pixels |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))

    noise = torch.randn(48 * 2**20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    used = 0

    def blocks(tensor: HubTensor) -> Iterator[Tensor]:
        nonlocal used
        for first, last in row_blocks(tensor.shape, torch.bfloat16):
            shape = (last - first, *tensor.shape[1:])
            count = torch.Size(shape).numel()
            begin = used % (len(noise) - count)  # another piece each time, so that no two tensors are alike
            used += count + 1
            yield noise[begin : begin + count].reshape(shape)

    geometry = read_geometry(config)
    tensors = wanted_tensors(table_of_weights(geometry), geometry)
    write_hub_weights(folder, tensors, torch.bfloat16, blocks, lambda count: None)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop a folder's files from the disk cache, so that every run reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measured(command: list[str], log: Path) -> Measured:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    began, peak_kib = time.monotonic(), 0
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            # not ru_maxrss, which counts this process too, from which the other was forked
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
            peak_kib = max(peak_kib, int(found[1]) if found else 0)
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{command[:2]} failed ({process.returncode}): {log.read_text(errors='replace')[-2000:]}")
    return Measured(time.monotonic() - began, peak_kib / 1024)


def copy_of(source: Path, target: Path, log: Path) -> Measured:
    """cp and sync of a folder; the copy is removed again."""
    forget(source)
    command = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
    result = measured(["sh", "-c", command, "sh", str(source), str(target)], log)
    shutil.rmtree(target)
    return result


def conversion(source: Path, target: Path, size: str, back: bool, log: Path) -> Measured:
    forget(source)
    script = Path(__file__).with_name("hf2mcore_convertor_llava.py")
    command = ["--model-size", size, "--source-llm", str(source), "--target", str(target), "--precision", "bf16"]
    return measured([sys.executable, str(script), *command, "--no-progress", *(["--mg2hf"] if back else [])], log)


def same_bytes(one: Path, other: Path) -> bool:
    """Are both folders' weight files equal, every byte of them?"""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in other.glob("*.safetensors")):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def benchmark(size: str, work: Path) -> bool:
    """Run everything below `work`; True when the targets are met."""
    source, checkpoint, copy, exported, log = (
        work / name for name in ("source", "checkpoint", "copy", "exported", "log")
    )
    began = time.monotonic()
    nbytes = make_source(source, size)
    print(f"{size}: {nbytes / 1e9:.2f} GB of bf16 weights made in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{'direction':<18} {'seconds':>8} {'GB/s':>6} {'cp + sync':>10} {'GB/s':>6} {'share':>6} {'peak MiB':>9}")
    good = True
    for title, begin, end, back in (
        ("hub -> Megatron", source, checkpoint, False),
        ("Megatron -> hub", checkpoint, exported, True),
    ):
        plain = copy_of(begin, copy, log)
        ours = conversion(begin, end, size, back, log)
        share = plain.seconds / ours.seconds
        good &= share >= SHARE_OF_COPY and ours.peak_mib <= PEAK_MIB
        print(
            f"{title:<18} {ours.seconds:>8.1f} {nbytes / 1e9 / ours.seconds:>6.2f} {plain.seconds:>10.1f} "
            f"{nbytes / 1e9 / plain.seconds:>6.2f} {share:>6.0%} {ours.peak_mib:>9.0f}",
            flush=True,
        )
    if not same_bytes(source, exported):
        print("NOT EQUAL: the export differs from the source")
        return False
    goal = f"at least {SHARE_OF_COPY:.0%} of the speed of cp + sync, at most {PEAK_MIB} MiB"
    print(f"{'GOOD' if good else 'MISSED'}: {goal}; the export equals the source")
    return good


def run(arguments: argparse.Namespace) -> int:
    check_disk(arguments.work / "x", 3 * ROOM[arguments.size])
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.work) as folder:
        return 0 if benchmark(arguments.size, Path(folder)) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="a folder on the disk to measure; default: here")
    arguments = parser.parse_args()
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
