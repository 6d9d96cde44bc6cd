"""open_engine: the engine that fits a folder."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from megatron_patch import device
from megatron_patch.checkpoint_files import (
    NOT_WEIGHTS,
    checkpoint_format,
    newest_iteration,
    rank_folders,
    read_metadata,
    read_rank_file,
)
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Engine
from megatron_patch.launch.asking import ENGINES, alone, kind_of, no_model
from megatron_patch.llava_folder import LlavaFolder

EMBEDDING = "embedding.word_embeddings.weight"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_engine(
    folder: Path,
    kind: Literal["auto", "transformers", "megatron"] = "auto",
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    template: str | None = None,
    tensor: int = 1,
    pipeline: int = 1,
) -> Engine:
    """The engine of an exported Hugging Face folder or of a Megatron checkpoint, converted or trained.

    Of a Megatron checkpoint in several processes (one per tensor x pipeline; launch/processes.py starts them) only rank
    0 gets an engine: in the others the call works for it until it is closed, and then ends the process.

    Args:
        kind: auto: as the folder is.
        dtype: in which it computes; auto: fp32 on a CPU, else as the weights are stored.
        template: a conversation template's name or file, in place of the one that the model was trained with.
        tensor, pipeline: parallel sizes.
    Raises:
        UserError: the folder holds no such model, or it cannot be cut so.
    """
    found = folder_kind(folder) if kind == "auto" else kind
    if found not in ENGINES[1:]:
        raise UserError(f"engine {kind!r}: wanted one of {', '.join(ENGINES)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: wanted one of {', '.join(DTYPES)}")
    chosen = DTYPES[dtype]
    if dtype == "auto" and device.backend().NAME == "cpu":
        chosen = torch.float32
    if found == "transformers":
        if tensor * pipeline > 1:
            raise UserError(alone(folder, tensor, pipeline))
        from megatron_patch.inference.transformers_engine import TransformersEngine

        return TransformersEngine(folder, chosen, template)
    with quiet():
        from megatron_patch.inference.megatron_engine import MegatronEngine

        engine = MegatronEngine(folder, chosen or stored_dtype(folder), template, tensor, pipeline)
    if not engine.leads:
        engine.follow()
        sys.exit(0)
    return engine


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What Megatron says while it is imported and built is for its developers: not on standard output, no warnings."""
    before = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """Of the weights of a Megatron checkpoint's newest iteration, of adapters of their base's.  Raises UserError."""
    record = LlavaFolder.of(checkpoint).lora
    iteration = newest_iteration(checkpoint) if record is None else Path(record.base, record.iteration)
    if checkpoint_format(iteration) == "torch":
        places = read_rank_file(next(iter(rank_folders(iteration).values())))
        return next(iter(places.values())).dtype
    for key, entry in read_metadata(iteration).state_dict_metadata.items():
        if key.endswith(EMBEDDING) and not key.startswith(NOT_WEIGHTS):
            return entry.properties.dtype
    raise UserError(f"{iteration} holds no {EMBEDDING}; is it a LLaVA?")


def folder_kind(folder: Path) -> str:
    """`transformers` for an exported Hugging Face folder, `megatron` for a checkpoint.  Raises UserError: neither."""
    kind = kind_of(folder)
    if kind is None:
        raise UserError(no_model(folder))
    return kind
