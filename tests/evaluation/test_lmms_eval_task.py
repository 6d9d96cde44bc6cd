"""The task for lmms-eval asks what evaluate_llava.sh asks: its functions, on the quickstart's own records.

And the model that lmms-eval is given reads a chat, written out and then tokenized, as it was trained.
"""

import importlib.util
from pathlib import Path

import pytest
import yaml
from PIL import Image
from transformers import AutoProcessor

from examples.llava_mcore.lmms_eval import model_folder
from examples.llava_mcore.quickstart.make_digits import make_digits
from megatron_patch.evaluation.benchmarks import find_benchmark, read_questions
from megatron_patch.evaluation.source import Source
from tests.conversion.test_exports import exported

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
    from datasets import load_dataset  # two seconds, which no other test needs to wait for

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


def test_a_chat_written_out_and_then_tokenized_has_one_bos(tmp_path, monkeypatch):
    folder = exported(tmp_path, "hub_llama")
    monkeypatch.setattr("sys.argv", ["model_folder.py", str(folder), str(tmp_path / "given")])
    assert model_folder.main() == 0
    own, given = AutoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(tmp_path / "given")
    image = Image.new("RGB", (28, 28))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Which digit is this?"}]
    chat = [{"role": "user", "content": content}]
    (trained,) = own.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    text = given.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert own(text=[text], images=[image])["input_ids"] == [[own.tokenizer.bos_token_id, *trained]]
    assert given(text=[text], images=[image])["input_ids"] == [trained]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["chat_template.jinja"], "has no tokenizer.json"),
        (["tokenizer.json"], "has no chat_template.jinja"),
        (["tokenizer.json", "chat_template.jinja", "out"], "which exists"),
    ],
)
def test_what_lmms_eval_cannot_be_given_is_refused(there, said, tmp_path, monkeypatch, capsys):
    for name in there:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr("sys.argv", ["model_folder.py", str(tmp_path), str(tmp_path / "out")])
    assert model_folder.main() == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(there)
