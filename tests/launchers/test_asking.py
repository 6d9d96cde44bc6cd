"""The commands that use a model: what is refused before a model is loaded, all at once."""

from pathlib import Path

import pytest

from megatron_patch.evaluation.metrics import METRICS
from megatron_patch.inference.engine import DTYPES
from megatron_patch.launch import asking
from tests.launchers.launching import ROOT, Inputs, start, tree

RIGHT = {
    "run_inference_llava": ["--model", "checkpoint", "--prompts", "p.jsonl", "--output", "a.jsonl"],
    "chat_llava": ["llm", "cat.png"],
    "serve_llava": ["checkpoint"],
    "evaluate_llava": ["--model", "checkpoint", "--benchmark", "pope", "--data", "wds", "--output", "results"],
}
ONE = ["--model", "checkpoint", "--prompt", "x"]
RAY = ["--ray-address", "head:6379"]


@pytest.fixture
def folder(inputs: Inputs) -> Path:
    for name in ("p.jsonl", "cat.png", "there.jsonl"):
        (inputs.folder / name).touch()
    return inputs.folder


def call(name: str, words: list[str], folder: Path, **environment: str):
    return start(ROOT / f"examples/llava_mcore/{name}.sh", words, cwd=folder, **environment)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_call_is_handed_over(name: str, folder: Path):
    result = call(name, RIGHT[name], folder, DRY_RUN="1")
    assert result.returncode == 0 and result.stdout.splitlines()[-len(RIGHT[name]) :] == RIGHT[name], result.stderr


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("chat_llava", [], "the following arguments are required: DIR"),
        ("chat_llava", ["none"], "error: none is no model: wanted an exported Hugging Face folder (with config.json)"),
        ("chat_llava", ["llm", "dog.png"], "error: dog.png: no such image"),
        ("chat_llava", ["llm", "--tensor-parallel", "2"], "llm is answered by transformers in one process, got tensor"),
        (
            "chat_llava",
            ["llm", "--engine", "megatron"],
            "--engine megatron does not read llm, which is for transformers",
        ),
        ("chat_llava", ["checkpoint", "--engine", "transformers"], "does not read checkpoint, which is for megatron"),
        ("chat_llava", ["llm", "--engine", "vllm"], "argument --engine: invalid choice: 'vllm'"),
        ("chat_llava", ["llm", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ("chat_llava", ["llm", "--template", "v9"], "--template 'v9' must be auto, a built-in template"),
        ("chat_llava", ["llm", "--temperature", "-1"], "error: temperature is -1.0, wanted 0 (most likely token)"),
        ("chat_llava", ["llm", "--temperature", "inf"], "error: temperature is inf, wanted 0"),
        ("chat_llava", ["llm", "--top-p", "0"], "error: top_p is 0.0, wanted a number above 0, at most 1"),
        ("chat_llava", ["llm", "--max-new-tokens", "0"], "error: max_new_tokens is 0, wanted at least 1"),
        (
            "chat_llava",
            ["llm", "--pipeline-parallel", "0"],
            "argument --pipeline-parallel: invalid positive value: '0'",
        ),
        ("serve_llava", ["llm", "--port", "65536"], "error: --port is 65536, wanted a whole number from 0"),
        ("serve_llava", ["llm", "--port", "http"], "argument --port: invalid int value: 'http'"),
        ("serve_llava", ["llm", "--max-request-mb", "0"], "argument --max-request-mb: invalid positive value"),
        ("serve_llava", ["wds"], "error: wds is no model"),
        ("run_inference_llava", ["--model", "checkpoint"], "wanted --prompts with a file, or --prompt with a text"),
        (
            "run_inference_llava",
            [*ONE, "--prompts", "p.jsonl"],
            "wanted --prompts with a file, or --prompt with a text",
        ),
        ("run_inference_llava", [*ONE, "--output", "a"], "--output and --image-root belong to --prompts"),
        ("run_inference_llava", [*ONE, "--image", "dog.png"], "error: dog.png: no such image"),
        (
            "run_inference_llava",
            [*ONE, "--video", "dog.mp4"],
            "error: dog.mp4: no such video; wanted a file, or a folder",
        ),
        ("run_inference_llava", ["--model", "llm", "--prompts", "p.jsonl"], "--prompts wants --output, and no --image"),
        (
            "run_inference_llava",
            ["--model", "llm", "--prompts", "none.jsonl", "--output", "a"],
            "none.jsonl: no such file; wanted the prompts",
        ),
        (
            "run_inference_llava",
            ["--model", "llm", "--prompts", "p.jsonl", "--output", "there.jsonl"],
            "there.jsonl exists; name another file, or remove it",
        ),
        (
            "run_inference_llava",
            ["--model", "llm", "--prompts", "p.jsonl", "--output", "no/a.jsonl"],
            "no: no such folder; make it, or name another file",
        ),
        (
            "run_inference_llava",
            ["--model", "llm", "--prompts", "p.jsonl", "--output", "a", "--image-root", "none"],
            "none: no such folder; wanted the one that the prompts' image names start from",
        ),
        ("evaluate_llava", [*RIGHT["evaluate_llava"], "--benchmark", "vqa"], "benchmark is 'vqa'; wanted one of ai2d"),
        ("evaluate_llava", [*RIGHT["evaluate_llava"], "--metric", "f1"], "metric is 'f1'; wanted one of exact_match, "),
        (
            "evaluate_llava",
            [*RIGHT["evaluate_llava"], "--data", "none"],
            "none: no such file or folder; wanted the ben",
        ),
        (
            "evaluate_llava",
            [*RIGHT["evaluate_llava"], "--images", "none"],
            "none: no such folder; wanted the benchmark",
        ),
        (
            "evaluate_llava",
            [*RIGHT["evaluate_llava"], "--output", "p.jsonl"],
            "p.jsonl: exists and is not the folder of",
        ),
        ("evaluate_llava", [*RIGHT["evaluate_llava"], "--part", "3/2"], "argument --part: invalid part value: '3/2'"),
        ("evaluate_llava", [*RIGHT["evaluate_llava"], "--part", "1/2", "--merge"], "not allowed with argument --part"),
        ("evaluate_llava", [*RIGHT["evaluate_llava"], "--batch-size", "0"], "argument --batch-size: invalid positive"),
        (
            "evaluate_llava",
            [*RIGHT["evaluate_llava"], "--ray-workers", "2"],
            "error: --ray-workers 2 has no meaning without --ray-address",
        ),
        (
            "evaluate_llava",
            [*RIGHT["evaluate_llava"], *RAY, "--merge"],
            "--ray-address head:6379 excludes --part and --merge, which need no cluster",
        ),
        (
            "run_inference_llava",
            [*RIGHT["run_inference_llava"], *RAY, "--tensor-parallel", "2"],
            "a model is in one process there, got tensor parallel 2 x pipeline parallel 1; leave them out",
        ),
        ("run_inference_llava", [*ONE, *RAY], "--ray-address belongs to --prompts; a single prompt is answered here"),
    ],
)
def test_a_wrong_call_is_refused(name: str, words: list[str], line: str, folder: Path):
    before = tree(folder)
    result = call(name, words, folder)
    assert result.returncode == 2 and line in result.stderr and result.stdout == ""
    assert tree(folder) == before


def test_all_that_is_wrong_is_said_at_once(folder: Path):
    result = call("serve_llava", ["none", "--port", "-1", "--top-p", "2"], folder, DRY_RUN="2")
    assert result.returncode == 2
    said = ["environment DRY_RUN='2' must be one of 0 1", "none is no model", "--port is -1", "top_p is 2.0"]
    assert all(line.startswith(f"error: {text}") for line, text in zip(result.stderr.splitlines(), said, strict=True))


def test_the_names_of_the_launchers_are_those_of_the_rooms():
    assert tuple(METRICS) == asking.METRICS and tuple(DTYPES) == asking.DTYPES


def test_help_tells_of_every_benchmark(folder: Path):
    told = call("evaluate_llava", ["--help"], folder).stdout
    assert "textvqa (vqa_accuracy)\n  TextVQA: {data: [{question_id" in told and "\npope (pope)\n" in told
