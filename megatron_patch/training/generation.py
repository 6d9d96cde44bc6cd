"""Greedy answers of the model under training, with either kind of layers and however it is cut.

No state of earlier tokens is kept, since Transformer Engine's layers have no place for it: each token is a forward pass
over whole rows, for which any split of layers, sequences and weights works.  Only the tower runs once.  B: prompts of a
batch, S: tokens of a row, V: vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_patch import device
from megatron_patch.data.answer import AnswerReader
from megatron_patch.model.attention import zigzag_positions

NEW_TOKENS = 32
BATCH = 8  # prompts answered together
# Lengths are rounded up (a token never sees what follows it): sequence parallelism and fp8 kernels want multiples.
LENGTH_STEP = 16


class Prompt(Protocol):
    """What the model is shown."""

    tokens: np.ndarray  # int64 [S], up to where the answer begins
    pixels: np.ndarray  # uint8 [N, 3, side_px, side_px]
    plans: np.ndarray  # int64 [M, PLAN_FIELDS]


class GreedyGeneration:
    """Answers prompts with the most likely tokens.  Every process of the run calls it with the same prompts.

    Args:
        reader: knows when an answer is complete.
        pad_token_id: fills the end of a row.
    """

    def __init__(self, reader: AnswerReader, pad_token_id: int) -> None:
        self._reader, self._pad = reader, pad_token_id

    def texts(self, model: Sequence[torch.nn.Module], prompts: Sequence[Prompt]) -> list[str]:
        """One answer for each prompt, on all processes.  Data-parallel ranks share the prompts out.

        Args:
            model: Megatron's list of this process's parts, set to evaluation.
        """
        group = mpu.get_data_parallel_group()
        mine = prompts[group.rank() :: group.size()]
        found: list[str] = []
        with torch.no_grad():
            for start in range(0, len(mine), BATCH):
                answers = self._answers(model, mine[start : start + BATCH])
                found += [self._reader.text(answer) for answer in answers]
        told: list[list[str]] = [[] for _ in range(group.size())]
        torch.distributed.all_gather_object(told, found, group=group)
        return [told[number % group.size()][number // group.size()] for number in range(len(prompts))]

    def _answers(self, model: Sequence[torch.nn.Module], prompts: Sequence[Prompt]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        here, features = device.current_device(), self._features(model[0], prompts)
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts], device=here)
        plans = torch.from_numpy(np.concatenate([prompt.plans for prompt in prompts]))
        while any(not self._is_over(answer) for answer in answers):
            rows = [[*prompt.tokens, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
            for answer, token in zip(answers, self._next_tokens(model, rows, lengths, features, plans), strict=True):
                if not self._is_over(answer):
                    answer.append(token)
        return answers

    def _is_over(self, answer: list[int]) -> bool:
        return len(answer) == NEW_TOKENS or self._reader.is_complete(answer)

    @staticmethod
    def _features(first: torch.nn.Module, prompts: Sequence[Prompt]) -> Tensor | None:
        """Of all images, on the first stage: [N, P, tower.hidden]."""
        pixels = np.concatenate([prompt.pixels for prompt in prompts])
        if not mpu.is_pipeline_first_stage() or len(pixels) == 0:
            return None
        return unwrap_model(first).image_features(torch.from_numpy(pixels).to(device.current_device()))

    def _next_tokens(
        self,
        model: Sequence[torch.nn.Module],
        rows: Sequence[Sequence[int]],
        prompt_lengths: Tensor,
        features: Tensor | None,
        plans: Tensor,
    ) -> list[int]:
        """The most likely token behind each row, known to all processes of this copy of the model."""
        here, parts = device.current_device(), mpu.get_context_parallel_world_size()
        lasts = torch.tensor([len(row) - 1 for row in rows], device=here)
        step = LENGTH_STEP * mpu.get_tensor_model_parallel_world_size() * 2 * parts
        width = -(-max(map(len, rows)) // step) * step
        tokens = torch.full((len(rows), width), self._pad)
        for row, values in zip(tokens, rows, strict=True):
            row[: len(values)] = torch.tensor(values)
        # The last token of a row is seen by one context-parallel rank: there `found` is its place, elsewhere nowhere.
        positions = torch.arange(width, device=here)
        if parts > 1:
            positions = zigzag_positions(width // parts, mpu.get_context_parallel_rank(), parts, here)
        found = positions == lasts[:, None]  # [B, S / CP]
        inputs = {
            "features": features,
            "plans": plans,
            "logits_at": found.int().argmax(1),
            "prompt_lengths": prompt_lengths,
        }
        logits = self._through_the_stages(model, tokens.to(here), inputs)
        chosen = torch.full_like(lasts, -1)
        if logits is not None:
            chosen = torch.where(found.any(1), logits.argmax(-1), chosen)
            torch.distributed.all_reduce(chosen, torch.distributed.ReduceOp.MAX, mpu.get_context_parallel_group())
        last_stage = mpu.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(chosen, last_stage, mpu.get_pipeline_model_parallel_group())
        return chosen.tolist()

    @staticmethod
    def _through_the_stages(
        model: Sequence[torch.nn.Module], tokens: Tensor, inputs: dict[str, Tensor | None]
    ) -> Tensor | None:
        """tokens [B, S] and what else forward() is given -> on the last stage logits [B, V]."""
        first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
        output = None
        for number, part in enumerate(model):  # virtual stages go round the pipeline once each
            takes_tokens, gives_logits = first and number == 0, last and number == len(model) - 1
            if not takes_tokens:
                config = unwrap_model(part).config
                length = tokens.shape[1] // config.context_parallel_size
                if config.sequence_parallel:
                    length //= config.tensor_model_parallel_size
                shape = (length, tokens.shape[0], config.hidden_size)
                received = torch.empty(shape, dtype=config.params_dtype, device=tokens.device)
                torch.distributed.recv(received, mpu.get_pipeline_model_parallel_prev_rank())
                unwrap_model(part).set_input_tensor([received])
            output = part(tokens=tokens, **inputs)
            if not gives_logits:
                torch.distributed.send(output.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
        return output if last else None
