"""How tokens are chosen, when an answer ends, and what a folder is."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_patch.data.answer import AnswerReader
from megatron_patch.data.conversation import Exchange
from megatron_patch.errors import UserError
from megatron_patch.inference import Engine, Request, Sampling, open_engine
from megatron_patch.inference.generation import choose
from tests.inference.conftest import Folders

PROBABILITIES = [0.05, 0.4, 0.05, 0.3, 0.2]


def shares(sampling: Sampling) -> dict[int, float]:
    """Share of each token over evenly spread random numbers."""
    count = 10_000
    logits = torch.tensor(PROBABILITIES).log().expand(count, -1)
    chosen = choose(logits, sampling, [number / count for number in range(count)])
    return {token: number / count for token, number in Counter(chosen).items()}


def test_tokens_are_drawn_by_their_probabilities():
    assert shares(Sampling()) == {1: 1.0}
    assert shares(Sampling(temperature=1)) == pytest.approx(dict(enumerate(PROBABILITIES)), abs=2e-4)
    # 0.4 + 0.3 reach 0.6: the others are out, and the two share the whole
    assert shares(Sampling(temperature=1, top_p=0.6)) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=2e-4)
    assert shares(Sampling(temperature=1, top_p=0.1)) == {1: 1.0}
    squared = [share**2 for share in PROBABILITIES]
    right = {token: share / sum(squared) for token, share in enumerate(squared)}
    assert shares(Sampling(temperature=0.5)) == pytest.approx(right, abs=2e-4)


def test_random_numbers_belong_to_the_request(engine: Engine):
    """Not to its place in the batch; seed and id decide."""
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=1)

    def ask(*names: str, **changes: object) -> dict[str, tuple[int, ...]]:
        requests = [Request(name, (Exchange("What is this?", None),)) for name in names]
        return {
            answer.id: answer.token_ids for answer in engine.answer(requests, dataclasses.replace(sampling, **changes))
        }

    alone = ask("a") | ask("b") | ask("c")
    assert len(set(alone.values())) == 3
    assert ask("c", "b", "a") == alone
    assert ask("a", seed=2)["a"] != alone["a"]


def test_an_answer_ends_at_the_models_positions(engine: Engine):
    request = Request("long", (Exchange("What " * 400, None),))
    prompt = engine.prepare(request)
    left = engine.max_tokens - len(prompt.tokens)
    assert 0 < left < 200, len(prompt.tokens)
    (answer,) = engine.answer([prompt], Sampling(max_new_tokens=1000))
    assert answer.finish_reason == "stop" or answer.completion_tokens == left
    others = engine.answer([request, Request("short", (Exchange("What?", None),))], Sampling(max_new_tokens=left + 10))
    assert others[0] == answer
    assert others[1].finish_reason == "stop" or others[1].completion_tokens == left + 10


class Letters:
    """A tokenizer whose ids are code points; 0 ends a text."""

    eos_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_where_an_answer_ends():
    reader = AnswerReader(Letters(), 33)  # the template ends at "!"
    assert reader.is_complete(list(b"ab!")) and reader.is_complete(list(b"ab\0"))
    assert not reader.is_complete(list(b"a!b")) and not reader.is_complete([])
    assert reader.text(list(b" ab c !")) == "ab c"
    plain = AnswerReader(Letters(), None)
    assert not plain.is_complete(list(b"\n\n a b")) and plain.is_complete(list(b"\na b\n"))
    assert plain.text(list(b"\na b \nc")) == "a b"


def test_what_is_streamed_is_never_taken_back():
    """A character of several tokens comes when it is whole, white space when something follows it."""
    reader = AnswerReader(Letters(), 33)
    ids = list("é €  b!".encode())
    told = [reader.text_so_far(ids[:count]) for count in range(len(ids) + 1)]
    assert told[1] == "" and told[2] == "é" and told[3:6] == ["é"] * 3
    assert told[-1] == reader.text(ids) == "é €  b"
    for one, other in itertools.pairwise(told):
        assert other.startswith(one)


def test_sampling_that_means_nothing_is_refused():
    with pytest.raises(UserError, match=r"max_new_tokens is 0.*temperature is -1.*top_p is 2"):
        Sampling(max_new_tokens=0, temperature=-1, top_p=2)
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature"):
            Sampling(temperature=value)


def test_what_a_folder_is(folders: Folders, tmp_path: Path):
    with pytest.raises(UserError, match="is no model: wanted an exported"):
        open_engine(tmp_path)
    (tmp_path / "checkpoint").symlink_to(folders.checkpoint)
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/checkpoint"):
        open_engine(tmp_path)
    with pytest.raises(UserError, match="in one process, got tensor parallel 2"):
        open_engine(folders.exported, tensor=2)
    with pytest.raises(UserError, match="engine 'vllm': wanted one of"):
        open_engine(folders.exported, "vllm")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError):
        open_engine(tmp_path)
