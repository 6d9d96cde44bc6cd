"""The Megatron engine gives transformers' own greedy tokens, at any TP and PP, in batches, streamed, with a cache."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_patch import device
from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.conversation import Exchange
from megatron_patch.inference import Engine, Request, Sampling, open_engine
from tests import tiny_models
from tests.inference.conftest import Folders
from tests.warm import interpreter

WORKER = Path(__file__).with_name("engine_worker.py")
NEW_TOKENS = 24
GREEDY = {"max_new_tokens": NEW_TOKENS}
SAMPLED = {"max_new_tokens": NEW_TOKENS, "temperature": 1.2, "top_p": 0.8, "seed": 5}


def requests(folders: Folders) -> list[Request]:
    """None, one and two images, and prompts of different lengths."""
    image = [folders.images / f"{number}.png" for number in range(4)]
    talk = (Exchange("<image>\nWhat is this?", "It is a nine."), Exchange("What colour is the ink?", None))
    return [
        Request("one image", (Exchange("<image>\nWhat is this?", None),), (image[0],)),
        Request("none", (Exchange("What?", None),)),
        Request("two images", (Exchange("Which is red, <image> or <image>?", None),), (image[1], image[2])),
        Request("turns", talk, (image[3],)),
    ]


def batches(folders: Folders) -> list[list[Request]]:
    """All together, each alone, and two of a kind."""
    asked = requests(folders)
    return [asked, *([request] for request in asked), [asked[1], asked[0]]]


def of_workers(tensor: int, pipeline: int, cases: list[dict], folder: Path, uncached: bool = False) -> list[dict]:
    """What TP x PP processes answer."""
    plan = {"tensor": tensor, "pipeline": pipeline, "result": str(folder / "result.json"), "uncached": uncached}
    (folder / "plan.json").write_text(json.dumps(plan | {"cases": cases}))
    done = subprocess.run(
        [
            *(interpreter.python(), "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(tensor * pipeline), str(WORKER), str(folder / "plan.json")),
        ],
        env=os.environ | interpreter.ENVIRONMENT | device.backend().environment(nodes=1),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


def case(model: Path, asked: list[list[Request]], sampling: dict) -> dict:
    def spelled(request: Request) -> dict:
        turns = [[turn.question, turn.answer] for turn in request.turns]
        return {"id": request.id, "turns": turns, "images": [str(image) for image in request.images]}

    return {"model": str(model), "sampling": sampling, "batches": [[spelled(one) for one in batch] for batch in asked]}


@torch.no_grad()
def judged(exported: Path, engine: Engine, asked: list[Request]) -> dict[str, list[int]]:
    """id -> greedy ids of transformers' own generate(), one prompt at a time."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    statistics = json.loads((exported / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(statistics[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    found = {}
    for request in asked:
        prompt = engine.prepare(request)
        tokens = torch.from_numpy(prompt.tokens)[None]
        images = {"pixel_values": (torch.from_numpy(prompt.pixels) / 255 - mean) / std} if len(prompt.pixels) else {}
        output = model.generate(
            **images,
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        found[request.id] = output[0, tokens.shape[1] :].tolist()
    assert len({tuple(ids) for ids in found.values()}) == len(asked), "equal answers prove nothing"
    return found


def check(got: dict, right: dict[str, list[int]]) -> None:
    """Every batch has these tokens, and the stream is the answer."""
    for batch in got["answers"]:
        for answer in batch:
            assert answer["token_ids"] == right[answer["id"]], answer["id"]
            assert answer["finish_reason"] == ("stop" if answer["token_ids"][-1] == 2 else "length")
            assert answer["completion_tokens"] == len(answer["token_ids"])
    first = got["answers"][0][0]
    assert "".join(got["pieces"]) == first["text"] and len(got["pieces"]) > 5
    assert got["after"] == first


@pytest.fixture(scope="module")
def right(folders: Folders, engine: Engine) -> dict[str, list[int]]:
    return judged(folders.exported, engine, requests(folders))


def test_the_engine_on_transformers_gives_its_tokens(folders: Folders, engine: Engine, right: dict):
    for batch in batches(folders):
        for answer in engine.answer(batch, Sampling(**GREEDY)):
            assert list(answer.token_ids) == right[answer.id]
    stream = engine.stream(requests(folders)[0], Sampling(**GREEDY))
    pieces = list(stream)
    assert "".join(pieces) == engine.answer(requests(folders)[:1], Sampling(**GREEDY))[0].text and len(pieces) > 5


def test_one_process(folders: Folders, engine: Engine, right: dict, tmp_path: Path):
    """Greedy and sampled; every token equals that of a forward pass without a cache."""
    cases = [case(folders.checkpoint, batches(folders), sampling) for sampling in (GREEDY, SAMPLED)]
    greedy, sampled = of_workers(1, 1, cases, tmp_path, uncached=True)
    check(greedy, right)
    for request, ids in zip(requests(folders), greedy["uncached"], strict=True):
        assert ids == right[request.id][: len(ids)]
    by_transformers = {
        answer.id: list(answer.token_ids) for answer in engine.answer(requests(folders), Sampling(**SAMPLED))
    }
    assert by_transformers != right
    check(sampled, by_transformers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [(2, 1), (1, 2), (2, 2)],
    ids=["TP2", "PP2", "TP2xPP2"],
)
def test_more_processes(folders: Folders, engine: Engine, right: dict, tmp_path: Path, tensor: int, pipeline: int):
    together, alone, *_ = batches(folders)
    cases = [case(folders.checkpoint, [together, alone], sampling) for sampling in (GREEDY, SAMPLED)]
    greedy, sampled = of_workers(tensor, pipeline, cases, tmp_path)
    check(greedy, right)
    by_transformers = engine.answer(requests(folders), Sampling(**SAMPLED))
    check(sampled, {answer.id: list(answer.token_ids) for answer in by_transformers})


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)], ids=["one process", "TP2", "PP2"])
def test_every_family(folders: Folders, tmp_path: Path, tensor: int, pipeline: int):
    families = [name for name in (*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES) if name != "mistral_window"]
    families = [name for name in families if tensor == 1 or name != "smollm2"]  # three groups
    cases, rights = [], []
    for number, family in enumerate(families):
        exported = tiny_models.make_tiny_llava(tmp_path / f"{family}_hf", family)
        made = tmp_path / family
        words = {"model_size": "tiny", "precision": "fp32"}
        if number % 3 == 0:  # per-rank files
            words |= {"checkpoint_format": "torch", "tensor_parallel": tensor, "pipeline_parallel": pipeline}
        convert_to_megatron(exported, None, made, **words)
        template = "chatml" if family.startswith("qwen") else "mistral"
        with open_engine(exported, template=template) as engine:
            rights.append(judged(exported, engine, requests(folders)))
        cases.append(case(made, batches(folders), GREEDY) | {"template": template})
    for got, right in zip(of_workers(tensor, pipeline, cases, tmp_path), rights, strict=True):
        check(got, right)
