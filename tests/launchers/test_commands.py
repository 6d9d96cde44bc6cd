"""The commands that the launchers make: the guide's own lines, odd paths, machines and clusters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.device import cpu
from megatron_patch.llava_folder import LlavaFolder, TrainingSettings
from tests.launchers.launching import CONVERTER, ROOT, STAGE_1, STAGE_2, Inputs, start, tree, value_after

AC_LINE = "AC=true means AC=sel: attention is recomputed in the backward pass\n"
NOTES = "".join(f"note: {value}: {what}\n" for value, what in cpu.notes().items())  # of PR=bf16, on a CPU
DASH = shutil.which("dash") or "sh"


def dry_run(script, words: list[str], shell: str = "bash", cwd: Path = ROOT, **environment: str) -> list[str]:
    """The words a launcher would start; it must accept its arguments and write nothing on stderr but a note."""
    result = start(script, words, shell, cwd, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr in ("", NOTES)
    return result.stdout.splitlines()


@pytest.mark.parametrize("flags", ["avx2", "avx2 avx512_bf16"])
def test_a_note_says_what_this_machine_lacks(inputs: Inputs, tmp_path: Path, flags: str):
    """Of a machine whose processor says so of itself: what the launcher's Python does, with another /proc/cpuinfo."""
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    program = """
import sys
from megatron_patch.device import cpu
cpu.CPUINFO, command, script, *words = sys.argv[1:]
from megatron_patch.launch.__main__ import main
main(command, script, words)
"""
    words = [str(tmp_path / "cpuinfo"), "stage1", str(STAGE_1), *inputs.training(AC="sel")]
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", program, *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0
    told = "note: PR=bf16: this CPU has no instructions for it, so a step takes longer than with PR=fp32\n"
    assert result.stderr == ("" if "bf16" in flags else told)


@pytest.mark.parametrize("shell", ["bash", "sh", DASH])
@pytest.mark.parametrize(("script", "frozen_llm", "template"), [(STAGE_1, True, "plain"), (STAGE_2, False, "auto")])
def test_the_guides_training_line(inputs: Inputs, shell: str, script, frozen_llm: bool, template: str):
    before = tree(inputs.folder)
    result = start(script, inputs.training(), shell, cwd=inputs.folder, DRY_RUN="1")
    assert result.returncode == 0 and result.stderr in (AC_LINE, NOTES + AC_LINE)
    assert tree(inputs.folder) == before
    words = result.stdout.splitlines()
    first = words.index("-m")
    assert words[0] == "env" and words[first + 1] == "megatron_patch.launch.processes"
    place = "--nproc_per_node 4 --nnodes 1 --node_rank 0 --master_addr 127.0.0.1"
    assert words[first + 2] == "--check"
    assert words[first + 5 : first + 13] == place.split()
    assert {"CUDA_VISIBLE_DEVICES=", "TORCHDYNAMO_DISABLE=1", "GLOO_SOCKET_IFNAME=lo"} <= set(words[:first])
    assert {"MALLOC_ARENA_MAX=1", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"} <= set(words[:first])
    assert words.count(f"{ROOT}/examples/llava_mcore/pretrain_llava.py") == 1
    expected = {
        "--micro-batch-size": "1",
        "--global-batch-size": "256",
        "--lr": "0.00015",
        "--min-lr": "1e-5",
        "--image-tokens": "576",
        "--seq-length": "1024",
        "--tensor-model-parallel-size": "4",
        "--save-interval": "100000",
        "--train-iters": "20000",
        "--lr-decay-iters": "20000",
        "--lr-warmup-iters": "200",
        "--recompute-granularity": "selective",
        "--train-dataset-path": str(inputs.dataset),
        "--valid-dataset-path": str(inputs.dataset),
        "--init-from": str(inputs.checkpoint),
        "--save": f"{inputs.output}/checkpoint",
        "--load": f"{inputs.output}/checkpoint",
        "--tensorboard-dir": f"{inputs.output}/tensorboard",
        "--conversation-template": template,
        "--model-size": "7B",
    }
    assert {name: value_after(words, name) for name in expected} == expected
    assert {"--bf16", "--sequence-parallel", "--use-distributed-optimizer", "--freeze-vision-tower"} <= set(words)
    assert ("--freeze-language-model" in words) == frozen_llm
    assert "--freeze-projector" not in words and "--num-layers" not in words


@pytest.mark.parametrize("shell", ["bash", DASH])
def test_the_guides_conversion_lines(inputs: Inputs, shell: str):
    words = dry_run(CONVERTER, inputs.conversion(), shell)
    program = f"{ROOT}/toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.py"
    assert words[words.index(program) + 1 :] == [
        *("--model-size", "7B", "--source-llm", str(inputs.llm), "--source-clip", str(inputs.clip)),
        *("--target", str(inputs.output), "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "1"),
        *("--precision", "bf16"),
    ]
    back = {"mg2hf": "true", "SOURCE_LLM_CKPT_PATH": str(inputs.checkpoint), "SOURCE_CLIP_CKPT_PATH": "none"}
    words = dry_run(CONVERTER, inputs.conversion(**back, HF_CKPT_PATH=str(inputs.llm)), shell)
    assert words[-5:] == ["--mg2hf", "--precision", "bf16", "--hf-checkpoint", str(inputs.llm)]
    assert "--source-clip" not in words
    unused = back | {"SOURCE_CLIP_CKPT_PATH": str(inputs.clip), "HF_CKPT_PATH": str(inputs.llm)}
    told = start(CONVERTER, inputs.conversion(**unused), DRY_RUN="1")
    assert told.stdout.splitlines() == words and "SOURCE_CLIP_CKPT_PATH is not used with mg2hf=true" in told.stderr
    (inputs.llm / "config.json").write_text('{\n  "model_type" : "llava"}')
    assert value_after(dry_run(CONVERTER, inputs.conversion(SOURCE_CLIP_CKPT_PATH="none")), "--source-clip") == "none"


def test_openais_file_is_a_tower(inputs: Inputs):
    archive = inputs.folder / "ViT-L-14-336px.pt"
    refusal = start(CONVERTER, inputs.conversion(SOURCE_CLIP_CKPT_PATH=str(archive)))
    assert refusal.returncode == 2 and "a .pt file, or none (it does not exist)" in refusal.stderr
    archive.touch()
    words = dry_run(CONVERTER, inputs.conversion(SOURCE_CLIP_CKPT_PATH=archive.name), cwd=inputs.folder)
    assert value_after(words, "--source-clip") == str(archive)


def test_options_of_the_conversion(inputs: Inputs):
    """Tokens are split at white space and are plain text; paths become absolute."""
    words = dry_run(CONVERTER, inputs.conversion(), VISION_FEATURE_LAYER="-1")
    assert value_after(words, "--vision-feature-layer") == "-1"
    tokens = {"ADD_TOKENS": "<extra_id_0>..<extra_id_7> *\n$(touch x)", "PROJECTOR_PATH": "llm/config.json"}
    words = dry_run(CONVERTER, inputs.conversion(), cwd=inputs.folder, **tokens)
    assert value_after(words, "--mm-projector") == str(inputs.llm / "config.json")
    first = words.index("--add-tokens") + 1
    assert words[first : first + 4] == ["<extra_id_0>..<extra_id_7>", "*", "$(touch", "x)"]
    back = {"mg2hf": "true", "SOURCE_LLM_CKPT_PATH": str(inputs.checkpoint), "HF_CKPT_PATH": str(inputs.llm)}
    back["SOURCE_CLIP_CKPT_PATH"] = "none"
    layout = {"EXPORT_LAYOUT": "original_without_tower", "VISION_TOWER_NAME": "openai/clip-vit-large-patch14-336"}
    words = dry_run(CONVERTER, inputs.conversion(**back), **layout)
    assert value_after(words, "--layout") == "original_without_tower"
    assert value_after(words, "--vision-tower-name") == layout["VISION_TOWER_NAME"]
    for kind in ("llava_llama", "llava_mistral", "llava_qwen"):
        (inputs.llm / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        words = dry_run(CONVERTER, inputs.conversion(SOURCE_CLIP_CKPT_PATH="none"))
        assert value_after(words, "--source-clip") == "none"


@pytest.mark.parametrize("name", ["a b", ";touch x", "$(touch x)", "`touch x`", "-rf", "*", "a'b\"c", "x&y|z>w", "é"])
def test_odd_paths_are_plain_text(tmp_path: Path, name: str):
    inputs = Inputs(tmp_path / name)
    before = tree(tmp_path)
    for words in (inputs.training(AC="sel"), inputs.conversion()):
        relative = [word.removeprefix(f"{tmp_path}/") for word in words]
        script, flag = (STAGE_1, "--train-dataset-path") if len(words) == 23 else (CONVERTER, "--source-llm")
        path = inputs.dataset if len(words) == 23 else inputs.llm
        for form in (words, relative):
            assert value_after(dry_run(script, form, "sh", cwd=tmp_path), flag) == str(path)
    assert tree(tmp_path) == before


def test_a_launcher_starts_from_anywhere(inputs: Inputs, tmp_path: Path):
    words = inputs.training(AC="sel")
    (tmp_path / "-link to it.sh").symlink_to(STAGE_1)
    (tmp_path / "folder").symlink_to(ROOT / "examples")
    entry = f"{ROOT}/examples/llava_mcore/pretrain_llava.py"
    relative = os.path.relpath(STAGE_1, tmp_path)
    for script in (relative, "./-link to it.sh", "folder/llava_mcore/run_mcore_llava.sh", str(STAGE_1)):
        for shell in ("bash", "sh"):
            assert entry in dry_run(script, words, shell, cwd=tmp_path, CDPATH="/tmp:/usr")
    result = subprocess.run([STAGE_1, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage: bash ")


def test_the_scripts_move_with_their_folder(inputs: Inputs, tmp_path: Path):
    moved = tmp_path / "my copy; of=it"
    shutil.copytree(ROOT / "examples", moved / "examples")
    (moved / "megatron_patch").symlink_to(ROOT / "megatron_patch")
    words = dry_run(moved / "examples/llava_mcore/run_sft_mcore_llava.sh", inputs.training(AC="sel"), DASH)
    assert f"{moved}/examples/llava_mcore/pretrain_llava.py" in words and f"PYTHONPATH={moved}" in words
    assert "python3" in words  # no .venv beside it


def test_options_from_the_environment(inputs: Inputs):
    options = {
        "FREEZE_LANGUAGE_MODEL": "false",
        "FREEZE_VISION_TOWER": "false",
        "FREEZE_PROJECTOR": "true",
        "CONVERSATION_TEMPLATE": "v1",
        "IMAGE_ASPECT_RATIO": "pad",
        "NUM_WORKERS": "0",
        "SEED": "7",
        "LOG_INTERVAL": "5",
        "EVAL_INTERVAL": "50",
        "EVAL_ITERS": "0",
        "WEIGHT_DECAY": "0.1",
        "ADAM_BETA2": ".999",
        "CLIP_GRAD": "0",
        "NPROC_PER_NODE": "8",
        "MASTER_PORT": "29511",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "3",
    }
    words = dry_run(STAGE_1, inputs.training(AC="false"), **options)
    expected = {
        "--conversation-template": "v1",
        "--image-aspect-ratio": "pad",
        "--num-workers": "0",
        "--seed": "7",
        "--log-interval": "5",
        "--eval-interval": "50",
        "--eval-iters": "0",
        "--weight-decay": "0.1",
        "--adam-beta2": ".999",
        "--clip-grad": "0",
        "--nproc_per_node": "8",
        "--master_port": "29511",
    }
    assert {name: value_after(words, name) for name in expected} == expected
    assert "--freeze-projector" in words and "--freeze-language-model" not in words and sys.executable in words
    assert "--freeze-vision-tower" not in words and "--recompute-granularity" not in words
    assert "OMP_NUM_THREADS=3" in words


def test_start_from_nothing_takes_the_tokenizer_from_its_option(inputs: Inputs):
    folder = inputs.checkpoint / "llava"
    words = inputs.training(AC="sel", PRETRAIN_CHECKPOINT_PATH="none")
    words = dry_run(STAGE_1, words, TOKENIZER_PATH=str(folder))
    assert value_after(words, "--init-from") == "none" and value_after(words, "--tokenizer-path") == str(folder)
    result = start(STAGE_1, inputs.training(), TOKENIZER_PATH=str(folder))
    assert result.returncode == 2 and f"environment TOKENIZER_PATH='{folder}' is only for" in result.stderr


def fake_nvidia_smi(folder: Path, gpus: int) -> str:
    """A PATH on which nvidia-smi -L lists so many GPUs: what the launcher asks on a machine that has them."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    lines = [f"GPU {index}: H200 (UUID: GPU-{index})" for index in range(gpus)] or ["No devices found."]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_auto_takes_the_gpus_that_are_visible(inputs: Inputs, tmp_path: Path):
    words = inputs.training(AC="sel")
    machine = {"ACCELERATOR": "auto", "PATH": fake_nvidia_smi(tmp_path / "eight", 8)}
    made = dry_run(STAGE_1, words, **machine)
    assert value_after(made, "--nproc_per_node") == "8" and "CUDA_DEVICE_MAX_CONNECTIONS=1" in made
    assert value_after(made, "--attention-backend") == "auto" and "CUDA_VISIBLE_DEVICES=" not in made
    made = dry_run(STAGE_1, words, CUDA_VISIBLE_DEVICES="4,5,6,7", **machine)
    assert value_after(made, "--nproc_per_node") == "4"
    for hidden in ("", "-1"):
        made = dry_run(STAGE_1, words, CUDA_VISIBLE_DEVICES=hidden, **machine)
        assert "CUDA_VISIBLE_DEVICES=" in made and "--attention-backend" not in made
    made = dry_run(STAGE_1, words, ACCELERATOR="auto", PATH=fake_nvidia_smi(tmp_path / "none", 0))
    assert "TORCHDYNAMO_DISABLE=1" in made and value_after(made, "--nproc_per_node") == "4"
    result = start(STAGE_1, words, NPROC_PER_NODE="16", **machine)
    assert result.returncode == 2 and "NPROC_PER_NODE='16' is more than the 8 GPUs seen here" in result.stderr
    result = start(STAGE_1, words, CUDA_VISIBLE_DEVICES="4,5", **machine)
    assert result.returncode == 2 and "TP='4' x PP=1 x CP=1 = 4 must divide the 2 processes" in result.stderr


def test_a_job_takes_the_gpus_that_it_is_given(inputs: Inputs, tmp_path: Path):
    """Numbers are nvidia-smi's; what CUDA would leave out without a word is refused."""
    words = inputs.training(AC="sel", TP="1", GLOBAL_BATCH_SIZE="252")
    machine = {"ACCELERATOR": "auto", "PATH": fake_nvidia_smi(tmp_path / "eight", 8)}
    for chosen in ("0,2,3", "GPU-1,GPU-2,GPU-7"):
        made = dry_run(STAGE_1, words, GPUS=chosen, **machine)
        assert f"CUDA_VISIBLE_DEVICES={chosen}" in made and "CUDA_DEVICE_ORDER=PCI_BUS_ID" in made
        assert value_after(made, "--nproc_per_node") == "3"
        assert not any('"GPUS"' in word for word in made), "another start may take others"
    assert not any(
        word.startswith("CUDA_DEVICE_ORDER") for word in dry_run(STAGE_1, words, NPROC_PER_NODE="3", **machine)
    )
    for changes, line in (
        ({"GPUS": "0,2,x"}, "GPUS='0,2,x' must be GPUs by number or UUID, as 0,2,3"),
        (
            {"GPUS": "0,2,8"},
            "GPUS='0,2,8' must name GPUs of this machine, 0 to 7 or their UUIDs (nvidia-smi -L); 8 is none",
        ),
        ({"GPUS": "GPU-9"}, "(nvidia-smi -L); GPU-9 is none"),
        ({"GPUS": "2,0,2"}, "GPUS='2,0,2' must name each GPU once; 2 stands there 2 times"),
        ({"GPUS": "0,2", "CUDA_VISIBLE_DEVICES": "4,5"}, "must be left out, or CUDA_VISIBLE_DEVICES='4,5' be unset"),
        ({"GPUS": "0,2,3", "NPROC_PER_NODE": "2"}, "GPUS='0,2,3' names 3 GPUs, and NPROC_PER_NODE says 2 processes"),
        (
            {"GPUS": "0,2,3", "NPROC_PER_NODE": "4"},
            "NPROC_PER_NODE='4' is more than the 3 GPUs seen here (GPUS, CUDA_V",
        ),
        ({"GPUS": "0", "ACCELERATOR": "cpu"}, "GPUS='0' needs GPUs, and this run is on CPU"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,9"}, "environment CUDA_VISIBLE_DEVICES='0,1,9' must name GPUs of this machine"),
    ):
        result = start(STAGE_1, words, DRY_RUN="1", **machine | changes)
        assert result.returncode == 2 and line in result.stderr, f"{changes}\n{result.stderr}"
    of_job = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "n0", "MASTER_PORT": "23456"}
    of_job |= {"KUBERNETES_CONTAINER_RESOURCE_GPU": "8", "GPUS": "0,1"}
    result = start(STAGE_1, ["dlc", *words[1:]], DRY_RUN="1", **machine, **of_job)
    assert "names 2 GPUs, and KUBERNETES_CONTAINER_RESOURCE_GPU says 8 processes" in result.stderr


def test_debug_tells_more_and_where(inputs: Inputs):
    told = start(STAGE_1, inputs.training(AC="sel", PR="fp32"), DRY_RUN="1", DEBUG="true", NCCL_DEBUG="WARN")
    asked = {"TORCH_DISTRIBUTED_DEBUG=DETAIL", "TORCH_SHOW_CPP_STACKTRACES=1", "PYTHONFAULTHANDLER=1"}
    assert asked | {"NCCL_DEBUG=WARN"} <= set(told.stdout.splitlines()), "what is set by hand stays"
    folder = value_after(told.stdout.splitlines(), "--log-dir")
    assert told.stderr == (
        f"DEBUG=true: what each process says is in {folder}/attempt_0/PROCESS/stdout.log and stderr.log\n"
    )
    words = dry_run(STAGE_1, inputs.training(AC="sel", PR="fp32"))
    assert not any(word.startswith(("TORCH_DISTRIBUTED_DEBUG", "PYTHONFAULTHANDLER")) for word in words)


def test_fp8_scales_by_the_present_tensor_unless_told_otherwise(inputs: Inputs):
    """Transformer Engine refuses the saved state of the other recipe, which is said before the run begins."""
    eight_gpus = {"ACCELERATOR": "cuda", "NPROC_PER_NODE": "8"}
    words = inputs.training(AC="sel", PR="fp8")
    made = dry_run(STAGE_1, words, **eight_gpus)
    assert value_after(made, "--fp8-recipe") == "tensorwise" and "--fp8-margin" not in made
    told = start(STAGE_1, words, DRY_RUN="1", FP8_RECIPE="delayed", **eight_gpus)
    assert told.returncode == 0 and value_after(told.stdout.splitlines(), "--fp8-recipe") == "delayed"
    assert "no run can resume" in told.stderr and told.stderr.count("\n") == 1


def test_fp16_sums_gradients_in_32_bits(inputs: Inputs):
    assert "--accumulate-allreduce-grads-in-fp32" in dry_run(STAGE_1, inputs.training(AC="sel", PR="fp16"))


def test_a_cluster_job_takes_its_layout_from_the_cluster(inputs: Inputs):
    cluster = {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "MASTER_ADDR": "node-0.svc",
        "MASTER_PORT": "23456",
        "KUBERNETES_CONTAINER_RESOURCE_GPU": "8",
        "ACCELERATOR": "cuda",
    }
    words = dry_run(STAGE_1, inputs.training(ENV="dlc", AC="full"), **cluster)
    first = words.index("--nproc_per_node")
    expected = "--nproc_per_node 8 --nnodes 4 --node_rank 3 --master_addr node-0.svc --master_port 23456"
    assert words[first : first + 10] == expected.split()
    assert not any(word.startswith("GLOO_SOCKET_IFNAME") for word in words)
    result = start(STAGE_1, inputs.training(ENV="dlc", BATCH_SIZE="64"), **cluster)
    assert result.returncode == 2 and "must be divisible by 512: BATCH_SIZE=64 x data-parallel size 8" in result.stderr


def test_plain_machines_count_processes(inputs: Inputs):
    """NeMo's variables: WORLD_SIZE is the number of GPUs of all machines."""
    told = {
        "WORLD_SIZE": "16",
        "NODE_RANK": "1",
        "MASTER_ADDR": "node-0",
        "MASTER_PORT": "23456",
        "NPROC_PER_NODE": "8",
    }
    words = dry_run(STAGE_1, inputs.training(ENV="multinode", AC="sel"), **told)
    first = words.index("--nproc_per_node")
    expected = "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr node-0 --master_port 23456"
    assert words[first : first + 10] == expected.split()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[1-2]", "n1"), ("gpu[07,09-12]", "gpu07"), ("login,gpu[1-2]", "login"), ("a-[003-004]-x,b1", "a-003-x")],
)
def test_slurm_tells_a_node_its_place(inputs: Inputs, nodes: str, first: str):
    told = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": nodes, "SLURM_JOB_ID": "61234"}
    words = dry_run(STAGE_1, inputs.training(ENV="slurm", AC="sel"), SLURM_GPUS_ON_NODE="8", **told)
    place = words.index("--nproc_per_node")
    expected = f"--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr {first} --master_port 11234"
    assert words[place : place + 10] == expected.split()
    assert (
        value_after(dry_run(STAGE_1, inputs.training(ENV="slurm", AC="sel"), MASTER_PORT="7", **told), "--master_port")
        == "7"
    )


def test_jobs_on_one_machine_meet_at_different_ports(inputs: Inputs):
    ports = {value_after(dry_run(STAGE_1, inputs.training(AC="sel")), "--master_port") for _ in range(4)}
    assert len(ports) >= 3 and all(10000 <= int(port) < 30000 for port in ports)


def test_images_are_the_checkpoints_unless_an_option_says_otherwise(inputs: Inputs):
    """`auto` leaves the switches to the llava/ folder; only its tiles are looked at, for the length of a record."""
    names = ("image-conv-front", "image-start-end", "exif-orientation")
    words = dry_run(STAGE_1, inputs.training(AC="sel"))
    assert (value_after(words, "--image-aspect-ratio"), value_after(words, "--image-tiles")) == ("auto", "auto")
    assert not [name for name in names if {f"--{name}", f"--no-{name}"} & set(words)]
    for value, wanted in (
        ("true", {"--image-conv-front", "--image-start-end", "--exif-orientation"}),
        ("false", {"--no-image-conv-front", "--no-image-start-end", "--no-exif-orientation"}),
    ):
        options = dict.fromkeys(("IMAGE_CONV_FRONT", "IMAGE_START_END", "EXIF_ORIENTATION"), value)
        words = dry_run(STAGE_1, inputs.training(AC="sel"), **options)
        assert {word for word in words if word.endswith(names)} == wanted
    LlavaFolder.of(inputs.checkpoint).write_training_settings(TrainingSettings("plain", image_tiles=(2, 1)))
    result = start(STAGE_2, inputs.training(AC="sel"), DRY_RUN="1")
    assert result.returncode == 2 and "must be more than 1728, SEQ_LEN=576 for each of 2 tiles" in result.stderr
    dry_run(STAGE_2, inputs.training(AC="sel"), IMAGE_TILES="1x1")


# What each command that uses a model is called with, the folder of the model left open.
ASKED = {
    "run_inference_llava": ["--model", "{}", "--prompt", "What is 'this'?\n<image>"],
    "chat_llava": ["{}", "--temperature", "0.5"],
    "serve_llava": ["{}", "--port", "0"],
    "evaluate_llava": ["--model", "{}", "--benchmark", "pope", "--data", ".", "--output", "out"],
}


@pytest.mark.parametrize("shell", ["bash", DASH])
@pytest.mark.parametrize("name", ASKED)
def test_commands_that_use_a_model_hand_their_words_over(inputs: Inputs, name: str, shell: str):
    """As they are; what is no interpreter is refused before."""
    script = ROOT / f"examples/llava_mcore/{name}.sh"
    words = [word.format(inputs.checkpoint) for word in ASKED[name]]
    result = start(script, words, shell, inputs.folder, DRY_RUN="1")
    assert result.returncode == 0 and result.stderr == ""
    made = ["-u", f"{ROOT}/examples/llava_mcore/{name}.py", *words]
    assert result.stdout.startswith("env\n") and result.stdout.endswith("\n".join(made) + "\n")
    refused = start(script, words, shell, inputs.folder, PYTHON=str(inputs.folder / "none"))
    assert refused.returncode == 2 and "PYTHON" in refused.stderr and "must be a program" in refused.stderr
