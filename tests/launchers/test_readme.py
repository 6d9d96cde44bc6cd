"""The README says what --help says, and its commands are accepted."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.launchers.launching import CONVERTER, LLAVA_7B, NEXT, ROOT, STAGE_1, STAGE_2, Inputs
from tests.launchers.readme_tables import readme_tables, rows_of_help

README = (ROOT / "examples/llava_mcore/README.md").read_text()
TRAINING_NAMES = """ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN DECODER_SEQ_LEN PR TP PP CP DO FL AC
OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS LR_WARMUP_ITERS
OUTPUT_BASEPATH"""
CONVERSION_NAMES = """MODEL_SIZE SOURCE_LLM_CKPT_PATH SOURCE_CLIP_CKPT_PATH TARGET_CKPT_PATH TP PP mg2hf PR
HF_CKPT_PATH"""


def test_tables_of_the_readme_are_those_of_help():
    for table in readme_tables():
        assert table in README, f"run `python -m tests.launchers.readme_tables` and paste:\n{table}"


def test_arguments_keep_the_order_of_the_guide():
    for script in (STAGE_1, STAGE_2):
        assert [row.name for row in rows_of_help(script).arguments] == TRAINING_NAMES.split()
    assert [row.name for row in rows_of_help(CONVERTER).arguments] == CONVERSION_NAMES.split()


def test_commands_of_the_readme_are_accepted(tmp_path: Path):
    """In their order, with what each leaves behind put in its place."""
    ready = Inputs(tmp_path / "ready")
    models, data, out, fake = (tmp_path / name for name in ("models", "data", "out", "fake"))
    shutil.copytree(ready.llm, models / "Mistral-7B-Instruct-v0.3")
    shutil.copytree(ready.clip, models / "clip-vit-large-patch14-336")
    for dataset in ("LLaVA-Pretrain", "LLaVA-Instruct"):
        shutil.copytree(ready.dataset, data / dataset / "wds")
    (data / "images").mkdir()
    (data / "prompts.jsonl").touch()
    fake.mkdir()
    # sbatch starts the script, srun the launcher, as SLURM does on the second of two nodes
    for program, text in {"sbatch": 'exec bash "$@"', "srun": 'exec "$@"'}.items():
        (fake / program).write_text(f"#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n{text}\n")
        (fake / program).chmod(0o755)
    results = [out / "llava-7b", out / "stage1/checkpoint", out / "stage2/checkpoint", out / "llava-7b-hf"]
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "12345"}
    slurm |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(ROOT)}
    environment = {
        "PATH": f"{fake}:{os.environ['PATH']}",
        "ACCELERATOR": "cpu",
        "DRY_RUN": "1",
        "MODELS": str(models),
        "DATA": str(data),
        "OUT": str(out),
    }
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", README, re.S) if ".sh \\" in block]
    assert len(blocks) == 13
    made = dict(enumerate(results)) | {8: out / "llava-next-7b", 9: out / "next-stage1/checkpoint"}
    for number, block in enumerate(blocks):
        result = made.get(number)
        of_block = environment | (slurm if "sbatch" in block else {})
        done = subprocess.run(["bash", "-c", block], cwd=ROOT, env=of_block, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        if result is not None:
            shutil.copytree(ready.checkpoint, result)
            if "next" in str(result):
                (result / "llava/config.json").write_text(json.dumps(LLAVA_7B | NEXT))
        if "sbatch" in block:
            of_second_node = done.stdout
    assert "--nnodes\n2\n--node_rank\n1\n--master_addr\nn1\n--master_port\n22345\n" in of_second_node


def test_commands_of_the_short_version_are_those_of_the_recipe():
    short = (ROOT / "examples/llava_mcore/README.zh.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", short, re.S)
    assert len(blocks) == 9
    for block in blocks:
        assert f"```bash\n{block}```" in README


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r"(?:examples|toolkits)/[\w/]+\.(?:sh|py)", README)):
        assert (ROOT / name).is_file(), name
