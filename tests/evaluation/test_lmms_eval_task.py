"""The task for lmms-eval asks what evaluate_llava.sh asks: its functions, on the quickstart's own records."""

import importlib.util
from pathlib import Path

import yaml
from datasets import load_dataset

from examples.llava_mcore.quickstart.make_digits import make_digits
from megatron_patch.evaluation.benchmarks import find_benchmark, read_questions
from megatron_patch.evaluation.source import Source

TASK = Path(__file__).parents[2] / "examples/llava_mcore/lmms_eval/digits.yaml"


class Loader(yaml.SafeLoader):
    """`!function digits.name`, as lmms-eval reads it, is the function of this name in the file beside the task."""


def _function(loader: Loader, node: yaml.Node) -> object:
    file, name = loader.construct_scalar(node).split(".")
    spec = importlib.util.spec_from_file_location(file, TASK.with_name(f"{file}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


Loader.add_constructor("!function", _function)


def test_the_task_asks_the_same_questions(tmp_path, monkeypatch):
    make_digits(tmp_path / "data", copies=1)
    monkeypatch.chdir(tmp_path)
    task = yaml.load(TASK.read_text(), Loader)
    table = load_dataset(task["dataset_path"], cache_dir=str(tmp_path / "cache"), **task["dataset_kwargs"])["test"]
    rows = list(task["process_docs"](table))
    questions = read_questions(find_benchmark("llava"), Source(tmp_path / "data/heldout"))
    assert len(rows) == len(questions) == 5 * 359
    for row, question in zip(rows, questions, strict=True):
        assert task["doc_to_text"](row) == question.prompt
        assert (task["doc_to_target"](row),) == question.references
        assert row["image"] == question.images[0].name
    (image,) = task["doc_to_visual"](rows[0])
    assert (image.size, image.mode) == ((28, 28), "RGB")
