"""TAB behind a launcher, as bash asks: the function that completion.bash registers, with bash's own variables."""

import subprocess

import pytest

from megatron_patch.launch.presets import presets_of
from megatron_patch.launch.rules import MODEL_SIZE, files_of
from tests.launchers.launching import ROOT

STAGE_1, STAGE_2 = "examples/llava_mcore/run_mcore_llava.sh", "examples/llava_mcore/run_sft_mcore_llava.sh"
# `$1` and what follows are the words of the line, the last one unfinished.
ASK = """
source examples/completion.bash
[[ $(complete -p bash) == *_llava_complete* ]] || exit 3
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_llava_complete
((${#COMPREPLY[@]} == 0)) || printf '%s\\n' "${COMPREPLY[@]}"
"""


def complete(*words: str) -> list[str]:
    """What bash would show behind the words."""
    done = subprocess.run(["bash", "-c", ASK, "bash", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("bash", STAGE_1, ""), ["--config", "--from", "--help", "dsw", "dlc", "multinode", "slurm"]),
        (("bash", STAGE_1, "d"), ["dsw", "dlc"]),
        (("sh", STAGE_2, "dsw", ""), list(MODEL_SIZE.choices)),
        (("bash", STAGE_2, "dsw", "7B", "1", "256", "1e-3", "0", "576", "1024", "b"), ["bf16"]),
        (("bash", STAGE_1, "dsw", "7B", ""), []),  # a number
        (("bash", STAGE_1, "--config", "examples/"), []),  # a file, which bash completes
        (("bash", STAGE_1, "--config", "a.yaml", "LOAD"), ["LOAD_OPTIM="]),
        (("bash", STAGE_1, "--config", "a.yaml", "FSDP", "=", "h"), ["hybrid"]),
        (("bash", STAGE_2, "--from", "out", "PRESET", "="), list(presets_of(2))),
        (
            ("bash", STAGE_2, "--from", "out", "CONVERSATION_TEMPLATE", "=", "v"),
            [name for name in files_of("data/conversation_templates", ".yaml") if name.startswith("v")],
        ),
        (("bash", "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh", "1"), None),
        (("bash", "examples/llava_mcore/serve_llava.sh", "folder", "--po"), ["--port"]),
        (("bash", "examples/llava_mcore/serve_llava.sh", "folder", "--engine", "t"), ["transformers"]),
        (("bash", "examples/llava_mcore/plan_llava.sh", "--card", "H200x8", "run_s"), ["run_sft_mcore_llava.sh"]),
        (("bash", "examples/llava_mcore/plan_llava.sh", "run_sft_mcore_llava.sh", "dsw", "7"), ["7B", "72B"]),
        (("bash", "tests/run_tests.sh", "d"), []),
    ],
)
def test_what_may_stand_there(words: tuple[str, ...], expected: list[str] | None):
    if expected is None:
        expected = [size for size in MODEL_SIZE.choices if size.startswith(words[-1])]
    assert complete(*words) == expected
