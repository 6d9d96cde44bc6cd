"""The README of the converters: its commands run as they stand, its options and reasons are those of the program."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megatron_patch.data.preparation.verification import reopen
from megatron_patch.data.rejection import REASONS
from tests.data.factories import image_bytes, make_records
from tests.data.torture import turns

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "toolkits/multimodal_data_preprocessing"
README = (FOLDER / "README.md").read_text()


def make_sources(root: Path) -> None:
    """The data that the commands speak of."""
    make_records(root / "LLaVA-Pretrain", 30)
    (root / "LLaVA-Pretrain/data.json").rename(root / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json")
    shutil.copytree(root / "LLaVA-Pretrain/images", root / "images")
    cc3m = make_records(root / "LLaVA-CC3M-Pretrain-595K", 30)
    for image in (cc3m / "images").iterdir():  # beside the JSON
        image.rename(cc3m / image.name)
    (cc3m / "images").rmdir()
    (cc3m / "data.json").rename(cc3m / "chat.json")
    (cc3m / "metadata.json").write_text("[]")
    (root / "LLaVA-Instruct").mkdir()
    shutil.copy(cc3m / "chat.json", root / "LLaVA-Instruct/llava_v1_5_mix665k.json")
    (root / "more_images").mkdir()
    (root / "images/7.png").rename(root / "more_images/7.png")
    for number in range(3):
        (root / f"LLaVA-Video/videos/{number}").mkdir(parents=True)
        for frame in range(12):
            (root / f"LLaVA-Video/videos/{number}/{frame}.png").write_bytes(image_bytes(frame))
    videos = [{"id": k, "video": str(k), "conversations": turns("<image>\nq", f"a{k}")} for k in range(3)]
    (root / "LLaVA-Video/videos.json").write_text(json.dumps(videos))
    (root / "questions").mkdir()
    for number in range(12):
        for suffix, data in (("jpg", image_bytes(number)), ("txt", b"a"), ("json", b'{"question": "q"}')):
            (root / f"questions/{number}.{suffix}").write_bytes(data)
    for number in range(2):
        with tarfile.open(root / f"part-00{number}.tar", "w") as archive:
            for path in sorted((root / "questions").glob(f"*{number}.*")):
                archive.add(path, path.name)
    (root / "chats/images").mkdir(parents=True)
    (root / "chats/images/a.png").write_bytes(image_bytes(0))
    chat = [{"from": "system", "value": "s"}, *turns("<image>", "a")]
    (root / "chats/sharegpt.jsonl").write_text(json.dumps({"conversations": chat, "image": "a.png"}) + "\n")
    from datasets import Dataset, DatasetDict

    image = {"bytes": image_bytes(1), "path": None}
    rows = {"image": [image] * 12, "question": [f"q{row}" for row in range(12)], "answer": ["a"] * 12}
    table = Dataset.from_dict(rows)
    DatasetDict({"train": table, "test": table}).save_to_disk(str(root / "vqa-dataset"))
    named = table.rename_columns({"image": "photo", "question": "alt_text"}).remove_columns("answer")
    named.save_to_disk(str(root / "captions-dataset"))


def test_commands_of_the_readme(tmp_path) -> None:
    make_sources(tmp_path)
    (tmp_path / "toolkits").symlink_to(ROOT / "toolkits")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert len(blocks) == 10
    for block in blocks:
        if "benchmark" in block:
            continue  # below, in small
        done = subprocess.run(
            ["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        if "s3://bucket" in block:  # which is nobody's: the words are right, and that is said
            assert done.returncode == 2 and "no credentials found" in done.stderr, f"{block}\n{done.stderr}"
            continue
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    expected = {
        "LLaVA-Pretrain/wds": 30,
        "LLaVA-CC3M-Pretrain-595K/wds": 30,
        "LLaVA-Instruct/wds": 30,
        "LLaVA-Video/wds": 3,
        "questions-wds": 12,
        "questions-of-tars": 4,
        "chats/wds": 1,
        "vqa-dataset-wds": 12,
        "captions-dataset-wds": 12,
        "mix665k": 30,
        "in-parts": 30,
    }
    assert {name: sum(reopen(tmp_path / name).values()) for name in expected} == expected


def test_options_and_reasons_of_the_readme_exist() -> None:
    helps = "".join(
        subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True).stdout
        for path in [
            *FOLDER.glob("convert_*.py"),
            *(FOLDER / f"{name}.py" for name in ("benchmark_conversion", "cache_tower_features", "inspect_dataset")),
        ]
    )
    own = "".join(line for line in README.splitlines(True) if not re.search(r"sbatch|ray start|Megatron's", line))
    named = set(re.findall(r"--[a-z][a-z-]+", own))
    assert named <= set(re.findall(r"--[a-z][a-z-]+", helps)), named
    rows = README.split("| reason | meaning |")[1].split("\n\n")[0].splitlines()[2:]
    assert {reason.strip() for row in rows for reason in row.split("|")[1].split(",")} == REASONS.keys() - {"excluded"}


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_of_data", FOLDER / "benchmark_conversion.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_benchmark_measures_all_three_and_leaves_nothing(benchmark, tmp_path, capsys) -> None:
    benchmark.race(tmp_path / "work", 40, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 records, 1 MB")
    assert [line.split()[0] for line in lines[2:5]] == ["copy", "ShardWriter", "conversion"]
    conversion = lines[4].split()
    assert 0 < float(conversion[1]) < float(conversion[4]) and 10 < float(conversion[5]) < 500
    assert not (tmp_path / "work/output").exists()
    images = [path.stat().st_size for path in (tmp_path / "work/source/images").rglob("*.jpg")]
    assert len(images) == 40 and 25_000 < sum(images) / 40 < 45_000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(benchmark, tmp_path) -> None:
    """145 MB of JSON, 40,000 records."""
    with (tmp_path / "data.json").open("w") as file:
        for number in range(40_000):
            file.write(json.dumps({"id": number, "conversations": turns("q " * 900, f"a {number}")}) + "\n")
    assert benchmark.peak_mib(benchmark.conversion(tmp_path, tmp_path / "wds"), tmp_path / "wds") < 110
