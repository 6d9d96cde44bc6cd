"""--config, --from and OUTPUT_BASEPATH/run.json; an output folder that belongs to another run."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_patch.launch import run_file
from tests.launchers.launching import ROOT, STAGE_1, STAGE_2, TINY, Inputs, start, tree, value_after


def values(inputs: Inputs, **changes: object) -> dict[str, object]:
    """The guide's arguments by name."""
    names = "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN DECODER_SEQ_LEN PR TP PP CP DO FL AC "
    names += "OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS "
    names += "LR_WARMUP_ITERS OUTPUT_BASEPATH"
    return dict(zip(names.split(), inputs.training(AC="sel"), strict=True)) | changes


def words_of(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    found = result.stdout.splitlines()
    changing = ("--log-dir", "--master_port")
    return [word for before, word in zip(["", *found], found, strict=False) if before not in changing]


EXAMPLE = ROOT / "examples/llava_mcore/stage1.yaml"
FORMS = {
    "run.json": json.dumps,
    "run.yaml": lambda found: "".join(f"{name}: {json.dumps(value)}\n" for name, value in found.items()),
    "run.toml": lambda found: "".join(f"{name} = {json.dumps(value)}\n" for name, value in found.items()),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_values_is_the_23_arguments(inputs: Inputs, name: str):
    typed = values(inputs, GLOBAL_BATCH_SIZE=256, DO=True, WEIGHT_DECAY=0.1, MEGATRON=["--log-throughput"])
    (inputs.folder / name).write_text(FORMS[name](typed))
    made = words_of(start(STAGE_1, ["--config", name], cwd=inputs.folder, DRY_RUN="1"))
    words = [*inputs.training(AC="sel"), "--log-throughput"]
    assert made == words_of(start(STAGE_1, words, cwd=inputs.folder, DRY_RUN="1", WEIGHT_DECAY="0.1"))


def test_the_command_line_wins_then_the_environment(inputs: Inputs):
    (inputs.folder / "run.json").write_text(json.dumps(values(inputs, SEED=1, WEIGHT_DECAY="0.1", ADAM_BETA2="0.9")))
    words = ["--config", "run.json", "LR=0.5", "SEED=3", "--log-throughput"]
    environment = {"DRY_RUN": "1", "SEED": "2", "WEIGHT_DECAY": "0.2"}
    made = start(STAGE_1, words, cwd=inputs.folder, **environment).stdout.splitlines()
    expected = {"--lr": "0.5", "--seed": "3", "--weight-decay": "0.2", "--adam-beta2": "0.9"}
    assert {name: value_after(made, name) for name in expected} == expected
    assert made[-1] == "--log-throughput"


def test_the_example_with_its_preset(inputs: Inputs):
    given = {"PRETRAIN_CHECKPOINT_PATH": "checkpoint", "DATASET_PATH": "wds", "VALID_DATASET_PATH": "wds", "AC": "sel"}
    words = ["--config", str(EXAMPLE), *(f"{name}={value}" for name, value in given.items()), "TRAIN_ITERS=100"]
    made = start(STAGE_1, words, cwd=inputs.folder, DRY_RUN="1").stdout.splitlines()
    assert (value_after(made, "--lr"), value_after(made, "--global-batch-size")) == ("1e-3", "256")
    assert (value_after(made, "--train-iters"), value_after(made, "--save")) == (
        "100",
        f"{inputs.folder}/stage1/checkpoint",
    )


@pytest.mark.parametrize(
    ("changes", "words", "line"),
    [
        ({"LERNING_RATE": "1"}, [], "run.json: LERNING_RATE is no argument or option"),
        ({"WEIGHT_DECAI": "1"}, [], "run.json: WEIGHT_DECAI is no argument or option; WEIGHT_DECAY?"),
        ({"LR": [1]}, [], "run.json: LR must be a text, a number or true or false, not [1]"),
        ({"dataset_param": {"basic_parameters": {}}}, [], "run.json: is a file of MindSpeed-MM; a run here takes its"),
        ({"text_decoder": {"num_layers": 32}}, [], "stage1.yaml: DATASET_PATH, BATCH_SIZE, ..."),
        ({"use_im_start_end": True}, [], "use_im_start_end is no argument or option; IMAGE_START_END?"),
        ({}, ["SEEED=1"], "command line: SEEED is no argument or option; SEED?"),
        (
            {"launcher": "run_sft_mcore_llava.sh"},
            [],
            "run.json: is a run of run_sft_mcore_llava.sh; start it with that",
        ),
        ({"MEGATRON": "--x"}, [], "run.json: MEGATRON must be a list of words"),
        ({"LR": "fast"}, [], "argument 5 LR='fast' must be a number above 0"),
        ({"SEED": 0}, [], "environment SEED='0' must be a whole number"),
        ({}, ["x"], "argument 24 'x' must begin with --"),
    ],
)
def test_what_is_wrong_with_a_file_is_refused(inputs: Inputs, changes: dict, words: list[str], line: str):
    (inputs.folder / "run.json").write_text(json.dumps(values(inputs, **changes)))
    before = tree(inputs.folder)
    result = start(STAGE_1, ["--config", "run.json", *words], cwd=inputs.folder)
    assert result.returncode == 2 and line in result.stderr and result.stdout == ""
    assert tree(inputs.folder) == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config"], "--config is missing its file"),
        (["--config", "absent.json"], "absent.json: No such file or directory"),
        (["--config", "list.txt"], "must be a .yaml, .json or .toml file"),
        (["--config", "bad.json"], "'bad.json' cannot be read: "),
        (["--config", "bad.yaml"], "'bad.yaml' cannot be read: "),
        (["--config", "list.yaml"], "'list.yaml' must hold NAME: value"),
        (["--from", "output"], "output/run.json: No such file or directory"),
    ],
)
def test_what_is_no_file_of_values_is_refused(inputs: Inputs, words: list[str], line: str):
    for name, text in {"bad.json": "{", "bad.yaml": "a: [", "list.yaml": "- 1\n", "list.txt": ""}.items():
        (inputs.folder / name).write_text(text)
    result = start(STAGE_1, words, cwd=inputs.folder)
    assert result.returncode == 2 and line in result.stderr, result.stderr


def written(inputs: Inputs, script, **changes: str) -> dict:
    """run.json as a run writes it, and a checkpoint with which it goes on."""
    words = inputs.training(AC="sel", **changes)
    lines = start(script, words, cwd=inputs.folder, DRY_RUN="1", SEED="7").stdout.splitlines()
    text = next(line for line in lines if line.startswith(f"{run_file.VARIABLE}=")).partition("=")[2]
    (inputs.output / "checkpoint").mkdir(parents=True, exist_ok=True)
    (inputs.output / "checkpoint/latest_checkpointed_iteration.txt").write_text("10")
    (inputs.output / run_file.FILE).write_text(text)
    return json.loads(text)


def test_a_run_starts_again_from_its_folder(inputs: Inputs):
    relative = {"DATASET_PATH": "wds", "PRETRAIN_CHECKPOINT_PATH": "checkpoint", "OUTPUT_BASEPATH": "output"}
    found = written(inputs, STAGE_2, LR="3e-5", **relative)
    assert found["SEED"] == "7" and found["launcher"] == "run_sft_mcore_llava.sh" and "DRY_RUN" not in found
    again = words_of(start(STAGE_2, ["--from", str(inputs.output)], DRY_RUN="1"))
    assert again == words_of(start(STAGE_2, inputs.training(AC="sel", LR="3e-5"), DRY_RUN="1", SEED="7"))
    more = start(STAGE_2, ["--from", str(inputs.output), "TRAIN_ITERS=30000"], DRY_RUN="1").stdout.splitlines()
    assert value_after(more, "--train-iters") == "30000"


def test_another_run_in_the_output_folder_is_not_continued(inputs: Inputs):
    written(inputs, STAGE_1)
    assert start(STAGE_1, inputs.training(AC="sel", TRAIN_ITERS="30000"), DRY_RUN="1").returncode == 0
    refused = start(STAGE_2, inputs.training(AC="sel"), DRY_RUN="1")
    assert refused.returncode == 2 and "holds another run, with launcher=run_mcore_llava.sh" in refused.stderr
    other = Path(shutil.copytree(inputs.checkpoint, inputs.folder / "other"))
    words = inputs.training(AC="sel", PRETRAIN_CHECKPOINT_PATH=str(other))
    refused = start(STAGE_1, words, DRY_RUN="1")
    assert refused.returncode == 2 and f"PRETRAIN_CHECKPOINT_PATH={inputs.checkpoint}" in refused.stderr
    shutil.rmtree(inputs.checkpoint)  # it has moved
    assert start(STAGE_1, words, DRY_RUN="1").returncode == 0
    shutil.rmtree(inputs.output / "checkpoint")  # nothing to go on with
    assert start(STAGE_2, words, DRY_RUN="1").returncode == 0


def test_a_full_disk_is_refused_before_the_start(tmp_path: Path):
    """Of 64 billion parameters a checkpoint is 769 GB; a dry run may be for another machine."""
    if shutil.disk_usage(tmp_path).free > 7e11:
        pytest.skip("this disk holds checkpoints of the test's model")
    large = TINY | {"text_config": TINY["text_config"] | {"vocab_size": 30 * 10**9}}
    inputs = Inputs(tmp_path / "inputs", large)
    words = inputs.training(AC="sel", TP="1", MODEL_SIZE="14B")
    result = start(STAGE_1, words)
    assert result.returncode == 2 and "must be that of the checkpoint" in result.stderr
    assert "room for two checkpoints" not in result.stderr, "what is wrong comes first"
    inputs = Inputs(tmp_path / "seventy", TINY | {"text_config": TINY["text_config"] | {"vocab_size": 5 * 10**8}})
    words = inputs.training(AC="sel", TP="1", MODEL_SIZE="72B", PR="fp32")
    result = start(STAGE_2, words)
    assert result.returncode == 2, result.stderr
    # 64.0 billion weights of 4 bytes, and two moments of as many for those that are trained
    assert "must have room for two checkpoints, 1538." in result.stderr
    assert start(STAGE_2, words, DRY_RUN="1").returncode == 0
    (inputs.output / "checkpoint").mkdir(parents=True)
    (inputs.output / "checkpoint/latest_checkpointed_iteration.txt").write_text("10")
    assert "must have room for a checkpoint, 769." in start(STAGE_2, words).stderr, "it goes on: one is there"
