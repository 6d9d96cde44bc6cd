"""Validations of a model that stands still: the same records each time, and transformers' own words as sample answers.

The learning rate is so small that no weight of 32 bits changes, so that every validation must find the same.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.data.loading import DataConfig, build_valid_loader
from megatron_patch.data.loading.prompts import Prompts, Question
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.training.config import read_config
from megatron_patch.training.generation import NEW_TOKENS
from tests.training.launching import Workspace, run
from tests.training.test_config import argv

ANSWERS, VALIDATIONS, STEP_RECORDS, EVAL_ITERS = 4, 3, 4, 2
STANDING_STILL = {"LR": "1e-30", "MIN_LR": "0", "LR_WARMUP_ITERS": 0, "WEIGHT_DECAY": 0}


class Judge:
    """transformers' model of the folder that the checkpoint was converted from."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        statistics = json.loads((folder / "preprocessor_config.json").read_text())
        self.mean, self.std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))

    def inputs(self, tokens: torch.Tensor, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a call of the model; without images it takes none."""
        images = {"pixel_values": (pixels.float() / 255 - self.mean) / self.std} if len(pixels) else {}
        return {"input_ids": tokens, **images}

    @torch.no_grad()
    def answer(self, question: Question, ending: int) -> list[int]:
        """Its most likely tokens, one after the other."""
        tokens = torch.from_numpy(question.tokens)[None]
        found = self.model.generate(
            **self.inputs(tokens, torch.from_numpy(question.pixels)),
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=ending,
            pad_token_id=0,
        )
        return found[0, tokens.shape[1] :].tolist()

    @torch.no_grad()
    def loss(self, batches: list[dict]) -> float:
        """Mean over the labels of all batches."""
        total, count = 0.0, 0
        for batch in batches:
            logits = self.model(**self.inputs(batch["tokens"], batch["pixels"])).logits
            total += F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").item()
            count += int((batch["labels"] != IGNORE_LABEL).sum())
        return total / count


@pytest.fixture(scope="module")
def judge(workspace: Workspace) -> Judge:
    return Judge(workspace.checkpoint.parent / "hf")


@pytest.fixture(scope="module")
def told(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the run printed, and its output."""
    output = tmp_path_factory.mktemp("still") / "out"
    changes = {"TRAIN_ITERS": VALIDATIONS, "EVAL_INTERVAL": 1, "EVAL_ITERS": EVAL_ITERS, "SAMPLE_ANSWERS": ANSWERS}
    return run(workspace, output, **STANDING_STILL, **changes, GLOBAL_BATCH_SIZE=STEP_RECORDS), output


@pytest.fixture(scope="module")
def settings(workspace: Workspace) -> DataConfig:
    changes = {"conversation_template": "mistral", "micro_batch_size": "2", "num_workers": "0", "no_padding_free": ""}
    return read_config(argv(workspace, **changes)).data


def test_every_validation_sees_the_first_records(told, judge: Judge, settings: DataConfig, workspace: Workspace):
    found = re.findall(r"validation loss at iteration (\d+).*?lm loss value: ([\d.E+-]+)", told[0])
    assert {iteration for iteration, _ in found} >= {str(number + 1) for number in range(VALIDATIONS)}
    assert len({loss for _, loss in found}) == 1, f"not the same records each time: {found}"
    batches = iter(build_valid_loader(str(workspace.dataset), settings, 0, 1))
    steps = [[next(batches) for _ in range(STEP_RECORDS // 2)] for _ in range(2 * EVAL_ITERS)]
    right = judge.loss([batch for step in steps[:EVAL_ITERS] for batch in step])
    assert float(found[0][1]) == pytest.approx(right, rel=1e-6)
    others = judge.loss([batch for step in steps[EVAL_ITERS:] for batch in step])
    assert abs(others / right - 1) > 1e-3, "other records have the same loss: equality proves nothing"


def test_answers_are_transformers_greedy_ones(told, judge: Judge, settings: DataConfig, workspace: Workspace):
    prompts = Prompts(str(workspace.dataset), settings, ANSWERS)
    assert any(len(question.pixels) for question in prompts.found), "no question is about an image"
    one_by_one = dataclasses.replace(settings, micro_batch_size=1)
    batches = iter(build_valid_loader(str(workspace.dataset), one_by_one, 0, 1))
    for question, batch in zip(prompts.found, batches, strict=False):
        trained = int((batch["labels"][0] != IGNORE_LABEL).int().argmax())  # there the answer's first token is learnt
        assert question.tokens.tolist() == batch["tokens"][0, : trained + 1].tolist()
    ending = prompts._encoder.conversation.ending_id
    right = [judge.answer(question, ending) for question in prompts.found]
    assert len({tuple(answer) for answer in right}) > 1, "all answers are the same: equality proves nothing"
    for iteration in range(1, VALIDATIONS + 1):
        lines = (told[1] / f"answers/iter_{iteration:07d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["answer"] for line in lines] == [prompts.reader.text(answer) for answer in right]
