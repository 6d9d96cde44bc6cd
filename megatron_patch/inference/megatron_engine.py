"""The Megatron model answers from the checkpoint itself, cut for any TP and PP.

Rank 0 leads: it has the requests, chooses the tokens and tells the others, whose processes only do what a batch's next
tokens ask of their part of the model.
"""

import atexit
import datetime
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_patch import device, patches
from megatron_patch.errors import UserError

device.install()  # before Megatron is imported
patches.apply_all(device.backend().NAME)

import torch  # noqa: E402
from megatron.core import mpu, tensor_parallel  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_patch.inference.generation import BatchEngine, all_pixels, all_plans, left_padded  # noqa: E402
from megatron_patch.inference.interface import Prompt  # noqa: E402
from megatron_patch.inference.prompt import PromptEncoder  # noqa: E402
from megatron_patch.llava_folder import LlavaFolder  # noqa: E402
from megatron_patch.model.key_value_cache import KeyValueCache  # noqa: E402
from megatron_patch.model.linear import multiply_alone  # noqa: E402
from megatron_patch.model.llava import LlavaModel  # noqa: E402
from megatron_patch.training.load_model import build_model, load_weights  # noqa: E402

# Megatron 0.19 calls it for every gather of logits.
warnings.filterwarnings("ignore", r".*all_gather_into_tensor", FutureWarning)
LEADER = 0
IDLE = datetime.timedelta(days=3650)  # the others wait for the next request as long as it takes
STOP = -1  # in place of a batch's next tokens: it is complete


class MegatronEngine(BatchEngine):
    """A checkpoint, on rank 0; on the other ranks follow() does their part.

    Args:
        dtype: of the weights in memory.
        template: in place of the one that the model was trained with.
        tensor, pipeline: parallel sizes; one process each.
    Raises:
        UserError: the folder holds no such model, it cannot be cut so, or the processes are not as many.
    """

    name = "megatron"

    def __init__(
        self, path: Path, dtype: torch.dtype, template: str | None = None, tensor: int = 1, pipeline: int = 1
    ) -> None:
        folder = LlavaFolder.of(path)
        super().__init__(PromptEncoder(folder, template))
        folder.geometry().check_parallel(tensor, pipeline)
        self._processes = Processes(tensor, pipeline)
        argv = list(sys.argv)  # build_model overwrites them
        try:
            model = build_model(path, self.max_tokens, tensor, pipeline, dtype=dtype)
            load_weights(model, path)
            self._part = ModelPart(model.eval().requires_grad_(False))
        except BaseException:
            self._processes.end()
            raise
        finally:
            sys.argv[:] = argv

    @property
    def leads(self) -> bool:
        """Is this rank 0?"""
        return torch.distributed.get_rank() == LEADER

    def follow(self) -> None:
        """Work for rank 0 until it closes its engine."""
        while (batch := self._processes.tell(None)) is not None:
            self._part.start(*batch)
            rows = batch[0].shape[0]
            while (tokens := self._processes.tell_tokens([0] * rows))[0] != STOP:
                self._part.step(tokens)
        self._processes.end()

    def _start(self, prompts: Sequence[Prompt], most_new: int) -> "_Session":
        tokens, real = left_padded(prompts, self._encoder.pad_token_id)
        batch = (tokens, real, all_pixels(prompts), all_plans(prompts), most_new)
        self._processes.tell(batch)
        return _Session(self._part, self._processes, self._part.start(*batch))

    def close(self) -> None:
        """As Engine says; the other processes end."""
        if self._processes.are_there:
            self._processes.tell(None)
            self._processes.end()


class _Session:
    """One batch, on rank 0."""

    def __init__(self, part: "ModelPart", processes: "Processes", logits: Tensor) -> None:
        self._part, self._processes, self.logits = part, processes, logits
        self._rows = logits.shape[0]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """As Session says."""
        return self._part.step(self._processes.tell_tokens(tokens))

    def close(self) -> None:
        """As Session says."""
        self._processes.tell_tokens([STOP] * self._rows)


class ModelPart:
    """This process's part of the model, and the batch that it works on."""

    def __init__(self, model: LlavaModel) -> None:
        self._model, self._here = model, device.current_device()
        multiply_alone(model, trained=True)
        self._cache: KeyValueCache | None = None
        self._first, self._last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()

    def start(self, tokens: Tensor, real: Tensor, pixels: Tensor, plans: Tensor, most_new: int) -> Tensor | None:
        """tokens int64 and real bool [B, S], pixels uint8 [N, 3, side, side], plans int64 [M, ...] -> as step()."""
        self._cache = KeyValueCache(real.to(self._here), most_new)
        return self._forward(tokens, pixels.to(self._here), plans)

    def step(self, tokens: Sequence[int]) -> Tensor | None:
        """The next token of each row -> on rank 0 logits fp32 [B, V], elsewhere nothing."""
        return self._forward(torch.tensor(tokens)[:, None], None)

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, pixels: Tensor | None, plans: Tensor | None = None) -> Tensor | None:
        config, (rows, count) = self._model.config, tokens.shape
        if not self._first:
            received = torch.empty(count, rows, config.hidden_size, dtype=config.params_dtype, device=self._here)
            torch.distributed.recv(received, mpu.get_pipeline_model_parallel_prev_rank())
            self._model.set_input_tensor(received)
        output = self._model.next_logits(tokens.to(self._here), pixels, self._cache, plans)
        if not self._last:
            torch.distributed.send(output.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
        return self._to_leader(output.float() if self._last else None, rows)

    def _to_leader(self, logits: Tensor | None, rows: int) -> Tensor | None:
        """Logits [B, V] of the last stage -> the same on rank 0."""
        if mpu.get_pipeline_model_parallel_world_size() == 1 or mpu.get_tensor_model_parallel_rank():
            return logits
        if self._last:
            torch.distributed.send(logits.contiguous(), LEADER)
            return None
        if not self._first:
            return None
        logits = torch.empty(rows, self._model.geometry.language.vocabulary, device=self._here)
        torch.distributed.recv(logits, mpu.get_pipeline_model_parallel_last_rank())
        return logits


class Processes:
    """torch's and Megatron's process groups, made here, and how rank 0 tells the others what is next.

    Raises:
        UserError: there are not tensor x pipeline processes, or a model of Megatron's is open in this one already.
    """

    def __init__(self, tensor: int, pipeline: int) -> None:
        started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
        if started != tensor * pipeline:
            raise UserError(
                f"tensor parallel {tensor} x pipeline parallel {pipeline} wants {tensor * pipeline} processes, "
                f"{started} started"
            )
        if mpu.model_parallel_is_initialized():
            raise UserError("a Megatron model is open in this process; close it first")
        here, backend = device.current_device(), device.backend()
        torch.get_device_module(here).set_device(here)  # Megatron's tower makes its position_ids there
        if not torch.distributed.is_initialized():  # by an engine before this one: it cannot be made twice
            alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if started == 1 else {}
            torch.distributed.init_process_group(backend.DISTRIBUTED_BACKEND, **alone)
            atexit.register(torch.distributed.destroy_process_group)
        mpu.initialize_model_parallel(tensor, pipeline)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        self._group = torch.distributed.new_group(backend="gloo", timeout=IDLE) if started > 1 else None
        self.are_there = True

    def tell(self, value: Any) -> Any:
        """What rank 0 says, on all ranks."""
        if self._group is None:
            return value
        told = [value]
        torch.distributed.broadcast_object_list(told, LEADER, group=self._group, device=torch.device("cpu"))
        return told[0]

    def tell_tokens(self, tokens: Sequence[int]) -> list[int]:
        """The same of as many numbers as all ranks know; quicker."""
        if self._group is None:
            return list(tokens)
        told = torch.tensor(tokens)
        torch.distributed.broadcast(told, LEADER, group=self._group)
        return told.tolist()

    def end(self) -> None:
        """Take Megatron's groups down; torch's stay until the process ends."""
        mpu.destroy_model_parallel()
        self.are_there = False
