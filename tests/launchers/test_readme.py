"""The README says what --help says, and its commands are accepted."""

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launchers.launching import CONVERTER, LLAVA_7B, NEXT, ROOT, STAGE_1, STAGE_2, Inputs, value_after
from tests.launchers.parse_commands import LIST_OPTIONS
from tests.launchers.readme_tables import readme_tables, rows_of_help
from tests.warm import interpreter

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


# The Chinese one repeats blocks of the recipe, which is tested below.
READMES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *ROOT.glob("examples/**/README.md"), *ROOT.glob("toolkits/**/README.md"))
)
LAUNCHERS = (
    STAGE_1,
    STAGE_2,
    CONVERTER,
    *(ROOT / f"examples/llava_mcore/{name}_llava.sh" for name in ("chat", "plan")),
)
LAUNCHERS += tuple(ROOT / f"examples/llava_mcore/{name}_llava.sh" for name in ("rehearse", "run_inference", "serve"))
# Scripts that set up and do a whole job: their syntax is looked at, and no README gives them a word.
WHOLE_JOBS = ("examples/doctor.sh", "examples/llava_mcore/quickstart.sh", "tests/run_tests.sh")
# Programs that are not ours.  A README names no other, or it is put down here.
FOREIGN = ("hf", "unzip")
# Leaves what it was called with: words, and the environment, in files of the next number.
RECORDER = """#!/bin/bash
shopt -s nullglob
made=("$RECORDS"/*.words)
printf '%s\\0' "${0##*/}" "$@" >"$RECORDS/$(printf %03d ${#made[@]}).words"
command -p env -0 >"$RECORDS/$(printf %03d ${#made[@]}).environment"
"""
# As SLURM starts a job's script on the second of two nodes.
SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "12345"}
SLURM |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(ROOT)}


class Place:
    """A folder in which the commands of a README find what they speak of, all of them with stand-ins of a few bytes.

    MODELS, DATA and OUT of the recipe are this folder, so that it serves the relative paths of other READMEs as well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ready = folder / "repository", Inputs(folder / "ready")
        self._programs, self._records = folder / "programs", folder / "records"
        for made in (self.folder, self._programs, self._records):
            made.mkdir()
        for name in ("examples", "toolkits", "tests"):
            (self.folder / name).symlink_to(ROOT / name)
        for program in ("bash", "python", "sbatch", *FOREIGN):
            (self._programs / program).write_text(RECORDER)
            (self._programs / program).chmod(0o755)
        shutil.copytree(self.ready.llm, self.folder / "Mistral-7B-Instruct-v0.3")
        shutil.copytree(self.ready.clip, self.folder / "clip-vit-large-patch14-336")
        for dataset in ("LLaVA-Pretrain", "LLaVA-Instruct"):
            shutil.copytree(self.ready.dataset, self.folder / dataset / "wds")
        (self.folder / "images").mkdir()
        for name in ("prompts.jsonl", "cat.jpg"):
            (self.folder / name).touch()
        self._srun = folder / "srun"
        self._srun.mkdir()
        (self._srun / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
        (self._srun / "srun").chmod(0o755)

    def commands(self, block: str) -> list[tuple[list[str], dict[str, str]]]:
        """Words and environment of each command of a block, as bash makes them; nothing of it is run.

        A program that is neither ours nor in FOREIGN is an error: none is found.
        """
        roots = dict.fromkeys(("MODELS", "DATA", "OUT"), str(self.folder))
        around = {"PATH": str(self._programs), "RECORDS": str(self._records)} | roots
        for record in self._records.iterdir():
            record.unlink()
        words = [shutil.which("bash"), "-euc", block]
        done = subprocess.run(words, cwd=self.folder, env=around, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        found = []
        for record in sorted(self._records.glob("*.words")):
            told = record.with_suffix(".environment").read_text().split("\0")[:-1]
            own = dict(one.split("=", 1) for one in told if one.partition("=")[0] not in around)
            found.append((record.read_text().split("\0")[:-1], own | roots))
        return found

    def start(self, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        """A dry run of a launcher, or of a job's script that starts one; what it would have left is put in place."""
        path = f"{self._srun}:{os.environ['PATH']}"
        around = environment | {"PATH": path, "ACCELERATOR": "cpu", "DRY_RUN": "1"}
        done = subprocess.run(["bash", *words], cwd=self.folder, env=around, capture_output=True, text=True)
        if done.returncode == 0:
            self._leave(words, environment, done.stdout.splitlines())
        return done

    def _leave(self, words: list[str], environment: dict[str, str], made: list[str]) -> None:
        if words[0].endswith(CONVERTER.name):
            target = self.folder / words[4]
            shutil.copytree(self.ready.llm if words[7] == "true" else self.ready.checkpoint, target)
            if environment.get("MODEL_KIND") == "llava_next":
                (target / "llava/config.json").write_text(json.dumps(LLAVA_7B | NEXT))
        elif words[0].endswith((STAGE_1.name, STAGE_2.name)):
            output = Path(value_after(made, "--save")).parent
            if not output.exists():
                shutil.copytree(value_after(made, "--init-from"), output / "checkpoint")
            (run,) = (word.removeprefix("LLAVA_RUN=") for word in made if word.startswith("LLAVA_RUN="))
            (output / "run.json").write_text(run)


def blocks_of(readme: str) -> list[str]:
    return re.findall(r"^ *```bash\n(.*?)^ *```", (ROOT / readme).read_text(), re.S | re.M)


def parse(commands: list[list[str]], folder: Path) -> list[list[str] | str]:
    """What parse_commands.py says of Python commands, in their order."""
    listed = folder / "commands.json"
    listed.write_text(json.dumps(commands))
    words = [interpreter.python(), str(ROOT / "tests/launchers/parse_commands.py"), str(listed)]
    environment = os.environ | interpreter.ENVIRONMENT
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("readme", READMES)
def test_launchers_of_a_readme_are_accepted(readme: str, tmp_path: Path):
    """On stand-ins, in their order, each with what the one before would have left."""
    place = Place(tmp_path)
    for block in blocks_of(readme):
        for words, environment in place.commands(block):
            if words[0] == "sbatch":
                job = list(itertools.dropwhile(lambda word: word.startswith("--"), words[1:]))
                done = place.start(job, environment | SLURM)
                assert done.returncode == 0, f"{words}\n{done.stderr}"
                of_second_node = "--nnodes\n2\n--node_rank\n1\n--master_addr\nn1\n--master_port\n22345\n"
                assert of_second_node in done.stdout
            elif words[0] == "bash" and words[1] in WHOLE_JOBS:
                assert words[2:] == []
                subprocess.run(["bash", "-n", place.folder / words[1]], check=True)
            elif words[0] == "bash":
                assert place.folder.joinpath(words[1]).resolve() in LAUNCHERS
                done = place.start(words[1:], environment)
                assert done.returncode == 0, f"{words}\n{done.stderr}"


PROGRAM = r"(?:[\w./-]+/)?(\w+\.(?:py|sh))\b"
SCRIPTS = [path for folder in ("examples", "toolkits") for path in (ROOT / folder).rglob("*.py")]


def test_programs_of_the_readmes_have_the_options_that_are_named(tmp_path: Path):
    """Commands are read by the programs' own parsers; forms, and words in the text, name options that there are.

    The commands of the data converters are also run, in tests/data/preparation/test_readme.py.
    """
    place, wanted, named = Place(tmp_path), [], {}
    for readme in READMES:
        for block in blocks_of(readme):
            wanted += [words[1:] for words, _ in place.commands(block) if words[0] == "python"]
        for program, options in named_options(readme):
            named.setdefault(program, set()).update(options)
    forms = [path for path in SCRIPTS if named.get(path.name)]
    said = parse([*wanted, *([str(path.relative_to(ROOT)), LIST_OPTIONS] for path in forms)], tmp_path)
    for words, of_words in zip(wanted, said, strict=False):
        assert isinstance(of_words, list), f"{words}\n{of_words}"
    there: dict[str, set[str]] = {}
    for path, of_program in zip(forms, said[len(wanted) :], strict=True):
        there.setdefault(path.name, set()).update(of_program)
    assert {name: named[name] - options for name, options in there.items() if named[name] - options} == {}
    assert len(wanted) > 25 and len(there) > 7


def named_options(readme: str) -> list[tuple[str, set[str]]]:
    """Python programs (a launcher's, for a launcher) and options that a README names outside of its bash blocks."""
    text = re.sub(r"^ *```bash\n.*?^ *```", "", (ROOT / readme).read_text(), flags=re.S | re.M)
    spans = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.S | re.M)
    spans += re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M))
    lines = [line for span in spans for line in span.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        for one in re.split(r"[;&|]", line):
            if program := re.search(PROGRAM, one):
                name = program[1].replace(".sh", ".py")
                found.append((name, set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", one[program.end() :]))))
    return found


def test_commands_of_the_short_version_are_those_of_the_recipe():
    short = (ROOT / "examples/llava_mcore/README.zh.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", short, re.S)
    assert len(blocks) == 9
    for block in blocks:
        assert f"```bash\n{block}```" in README


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r"(?:examples|toolkits)/[\w/]+\.(?:sh|py)", README)):
        assert (ROOT / name).is_file(), name
