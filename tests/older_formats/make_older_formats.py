"""Makes tests/older_formats/data with the public commands of the commit that is checked out.

    python -m tests.older_formats.make_older_formats

Run it at an older commit only: made with the code under test, the data would prove nothing.  What it makes lies below
one folder, which test_older_formats.py unpacks:

    hf/                    the LLaVA that all began with
    checkpoint/            its converted release checkpoint
    records/               source of the conversion, with pictures
    records/wds/           the finished energon folder, with the lengths that the packed run left in it
    records/again.partial/ the same conversion, killed
    plain/, packed/        OUTPUT_BASEPATH of two runs that ended before their last iteration
    exported/              the checkpoint of plain/ as a Hugging Face folder
"""

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.training.launching import ROOT, Workspace, losses, run

DATA = Path(__file__).parent / "data"
ARCHIVES = {  # archive -> folders
    "checkpoint": ("hf", "checkpoint"),
    "records": ("records",),
    "plain": ("plain", "exported"),
    "packed": ("packed",),
}
# The journal of a conversion and the particulars of a missing picture hold absolute paths: this stands for the folder.
FOLDER_MARK = "@FOLDER@"
WITH_FOLDER = ("records/again.partial/journal.jsonl", "records/wds/rejected.jsonl")
RECORDS = 72
CONVERSION = ("--split", "7,2,0", "--samples-per-shard", "4", "--keep-going", "--workers", "0")
SAVED_AT, LAST = 10, 18  # iterations
ROLLED_BACK = 75  # exit code
COMMON = {
    "TRAIN_ITERS": LAST,
    "SAVE_INTERVAL": SAVED_AT,
    "BATCH_SIZE": 4,
    "GLOBAL_BATCH_SIZE": 4,  # one micro-batch: those are what is judged
    "LR": "2e-4",  # so low that some later step is above the median of those before
    "MIN_LR": "1e-5",
    "EVAL_INTERVAL": 10,
    "MAX_SKIPPED": 0.2,
}
# One step above the median of those before ends the run and is left out when it goes on.
PLAIN = {**COMMON, "EMA_DECAY": 0.95, "KEEP_BEST": "true", "KEEP_LAST": 1, "ON_BAD_LOSS": "rollback"}
# The distributed optimizer's state, rows of several records; a step above the median, judged by the losses in the
# notes beside the checkpoint, is dropped after the resume.
PACKED = {**COMMON, "LR": "2e-5", "PACKING": "true", "DO": "true", "ON_BAD_LOSS": "skip"}
STAGE_2 = "run_sft_mcore_llava.sh"
PROBED = "multi_modal_projector.linear_2.weight"


# ------------------------------------------------------------------------------------------------ the commands


def workspace(folder: Path) -> Workspace:
    """Checkpoint and dataset below the unpacked folder."""
    return Workspace(folder / "checkpoint", folder / "records/wds")


def convert_records(folder: Path, output: str, *words: str) -> list[str]:
    """The command that converts records/ into records/OUTPUT."""
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    records = folder / "records"
    return [sys.executable, str(converter), str(records), "--output", str(records / output), *CONVERSION, *words]


def convert_checkpoint(folder: Path, source: str | Path, target: str | Path, to_hub: bool = False) -> None:
    """Run the launcher of the checkpoint converter."""
    script = ROOT / "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh"
    line = ["bash", script, "tiny", folder / source, "none", folder / target, 1, 1, str(to_hub).lower(), "fp32"]
    line += [folder / "hf"] if to_hub else []
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def inspect(folder: Path) -> list[float]:
    """The figures that inspect_dataset.py prints of the whole train split, in their order."""
    script = ROOT / "toolkits/multimodal_data_preprocessing/inspect_dataset.py"
    line = [script, folder / "records/wds", "--checkpoint", folder / "checkpoint", "--all"]
    line += ["--max-length", "128", "--count", "1", "--output", folder / "inspected"]
    done = subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    title, _, figures = done.stdout.rpartition("\n== ")[2].partition("report: ")[0].partition("\n")
    count = title.rpartition(", ")[2]
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", f"{count}\n{figures}")]


def conversion_report(printed: str) -> list[str]:
    """The lines of a converter's report that hold counts of records."""
    lines = [line.strip() for line in printed.splitlines()]
    return [line for line in lines if " records in = " in line or line.startswith("rejected: ")]


def unpack(folder: Path) -> None:
    """Unpack the archives into an empty folder."""
    for name in ARCHIVES:
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    for name in WITH_FOLDER:
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(FOLDER_MARK, os.path.realpath(folder)))


def after_the_save(printed: str) -> dict[str, float]:
    """Losses of the steps after the save; a dropped one prints 0, or nothing where a start begins with it."""
    return {str(number): loss for number, loss in losses(printed).items() if number > SAVED_AT and loss}


def probe_of_average(folder: Path, output: str) -> list[float]:
    """Some numbers of the exported moving average of a run's newest checkpoint."""
    target = f"{output}_average"
    convert_checkpoint(folder, f"{output}/checkpoint/average", target, to_hub=True)
    tensors = load_file(folder / target / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith(PROBED))
    return tensors[name].flatten()[:16].tolist()


def account_of(output: Path) -> dict[str, int]:
    """Record counters of the whole run, from its summary."""
    return json.loads((output / "summary.json").read_text())["records"]


# ------------------------------------------------------------------------------------------------ making


def make_model(folder: Path) -> None:
    """A LLaVA of 23 000 parameters: tiny_models' own would not stay below half a megabyte."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    tiny_models.make_tiny_llava(folder, "mistral")
    config = AutoConfig.from_pretrained(folder)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = 16, 32, 2
    config.text_config.head_dim = 4
    model = LlavaForConditionalGeneration(config)
    tiny_models.randomize(model, seed=3)
    model.float().save_pretrained(folder)
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as source:  # transformers 5 writes names that no hub file has
        tensors = {name: source.get_tensor(name).clone() for name in source.keys()}  # noqa: SIM118
    hub = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensors[name] for name in tensors}
    save_file(hub, path, metadata={"format": "pt"})


def make_records(folder: Path) -> None:
    """LLaVA-Pretrain's layout with every kind of record that a converter leaves out and one that training does."""
    generator = random.Random(7)
    (folder / "images").mkdir(parents=True)
    records: list[object] = []
    for number in range(RECORDS):
        colour = generator.choice(("red", "green", "blue", "white"))
        answer = f"It is {colour}, " + "very " * generator.randint(0, 4) + colour
        turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": answer}]
        record: dict[str, object] = {"id": f"r{number}", "image": f"{number}.png", "conversations": turns}
        picture = folder / "images" / f"{number}.png"
        if number % 5 != 4:
            Image.new("RGB", (generator.randint(24, 40), generator.randint(24, 40)), colour).save(picture)
        else:
            del record["image"]
            turns[0]["value"] = "What is three plus four?"
        records.append(record)
        if number == 8:  # early, so that the killed conversion has them in its journal
            picture.write_bytes(picture.read_bytes()[:60])
        elif number == 10:
            picture.unlink()
        elif number == 11:
            picture.write_text("no picture")
        elif number == 12:
            turns[1]["value"] = ""
        elif number == 13:
            turns[0]["value"] = "no mark"
        elif number == 15:
            turns[1]["from"] = "human"
        elif number == 16:
            records.append(dict(record))
        elif number == 17:
            records.append({"id": "r17", "conversations": [*turns, *turns]})
        elif number == 18:
            records.append("text")
        elif number in (29, 34, 39):
            turns[0]["value"] = "q" * 400  # longer than DECODER_SEQ_LEN: training skips it
    (folder / "records.json").write_text(json.dumps(records))


def kill_a_conversion(folder: Path) -> None:
    """Leave records/again.partial behind: a conversion killed between its second and its last shard."""
    partial = folder / "records/again.partial"
    for _ in range(50):
        shutil.rmtree(folder / "records/again", ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        process = subprocess.Popen(convert_records(folder, "again"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            journal = partial / "journal.jsonl"
            if journal.is_file() and journal.read_bytes().count(b"\n") > 5:
                process.kill()
                break
            time.sleep(0.0002)
        process.wait()
        if process.returncode < 0 and partial.is_dir():
            return
    raise RuntimeError("the conversion was always over before it was killed")


def first_spike(found: dict[int, float]) -> tuple[float, int]:
    """(factor, iteration): the first step after the save that is above factor times the median of those before."""
    highest = 1.0
    for number in range(SAVED_AT + 1, LAST):
        ratio = found[number] / statistics.median(found[earlier] for earlier in range(1, number))
        if ratio > highest + 0.002:
            return round((highest + ratio) / 2, 4), number
        highest = max(highest, ratio)
    raise RuntimeError(f"no step is above the median of those before, choose another LR: {found}")


def train_plain(folder: Path) -> dict[str, object]:
    """The plain run, once whole and once ended early; returns what the test expects."""
    data, output = workspace(folder), folder / "plain_whole"
    factor, spike = first_spike(losses(run(data, folder / "plain_calm", **PLAIN)))
    whole = run(data, output, words=["--skip-train-iteration-range", f"{spike}-{spike}"], **PLAIN)
    # It goes back to the save once too often, which ends it, and has written down the step that is to be left out.
    run(data, folder / "plain", expected_exit=ROLLED_BACK, MAX_ROLLBACKS=0, SPIKE_FACTOR=factor, **PLAIN)
    return {
        "losses": after_the_save(whole),
        "records": account_of(output),
        "best": json.loads((output / "checkpoint/best.json").read_text()),
        "average": probe_of_average(folder, "plain_whole"),
    }


def train_packed(folder: Path) -> dict[str, object]:
    """The same of the packed run."""
    data, output = workspace(folder), folder / "packed_whole"
    factor, _ = first_spike(losses(run(data, folder / "packed_calm", **PACKED)))
    settings = PACKED | {"SPIKE_FACTOR": factor}
    whole = run(data, output, **settings)
    run(data, folder / "packed", words=["--exit-interval", str(SAVED_AT)], **settings)
    return {
        "SPIKE_FACTOR": factor,
        "dropped": whole.count("is dropped"),
        "losses": after_the_save(whole),
        "records": account_of(output),
    }


def first_loss(folder: Path, output: str, checkpoint: str, **changes: object) -> float:
    """Loss of the first iteration of a run that starts from a checkpoint below the folder."""
    start = Workspace(folder / checkpoint, folder / "records/wds")
    words = {"TRAIN_ITERS": 1, "LR_WARMUP_ITERS": 0, "EVAL_ITERS": 0, "GLOBAL_BATCH_SIZE": 4}
    return losses(run(start, folder / output, **words, MAX_SKIPPED=0.2, **changes))[1]


def pack(folder: Path) -> None:
    """Write the archives, with nothing in them that depends on who made them and when."""
    for name in ("plain", "packed"):
        tracker = folder / name / "checkpoint/latest_checkpointed_iteration.txt"
        assert tracker.read_text() == str(SAVED_AT), tracker

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if Path(member.name).name in ("tensorboard", "log"):
            return None
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    for name in WITH_FOLDER:
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(os.path.realpath(folder), FOLDER_MARK))
    DATA.mkdir(exist_ok=True)
    for name, folders in ARCHIVES.items():
        with tarfile.open(DATA / f"{name}.tar.xz", "w:xz", preset=9) as archive:
            for part in folders:
                archive.add(folder / part, part, filter=plain)


def main() -> None:
    """Make everything anew."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="older_formats_"))
    make_model(folder / "hf")
    convert_checkpoint(folder, "hf", "checkpoint")
    make_records(folder / "records")
    done = subprocess.run(convert_records(folder, "wds"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kill_a_conversion(folder)
    expected = {
        "conversion": conversion_report(done.stdout),
        "inspect": inspect(folder),
        "plain": train_plain(folder),
        "packed": train_packed(folder),
    }
    convert_checkpoint(folder, "plain/checkpoint", "exported", to_hub=True)
    expected["first loss from release"] = first_loss(folder, "from_release", "checkpoint")
    expected["first loss of stage 2"] = first_loss(folder, "stage_2", "plain/checkpoint", script=STAGE_2)
    pack(folder)
    (DATA / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    print(f"made {DATA} from {folder}, which can be removed")


if __name__ == "__main__":
    main()
