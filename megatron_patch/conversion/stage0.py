"""Stage 0: a LLM and a vision tower become an untrained LLaVA folder in the hub's layout, tensor by tensor."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megatron_patch.conversion import hub_files
from megatron_patch.conversion.additions import Additions, read_tokens
from megatron_patch.conversion.convert import PRECISIONS, Report, cast, precision_dtype, provenance_text
from megatron_patch.conversion.hub_weights import open_hub_weights, row_blocks, write_hub_weights
from megatron_patch.conversion.output import check_disk, check_target, progress_bar, staged_folder
from megatron_patch.conversion.plan import make_plan, wanted_tensors
from megatron_patch.conversion.table import HubTensor
from megatron_patch.errors import UserError
from megatron_patch.geometry import check_known
from megatron_patch.language_models import LANGUAGE_MODELS
from megatron_patch.llava_folder import LlavaFolder


def stored_precision(folder: Path) -> str:
    """The PR in which most bytes of a folder's weights are stored.

    Raises:
        UserError: none of them is in a precision that a LLaVA can have.
    """
    nbytes = dict.fromkeys(PRECISIONS, 0)
    for stored in open_hub_weights(folder).values():
        for name, dtype in PRECISIONS.items():
            nbytes[name] += stored.nbytes if stored.dtype == dtype else 0
    largest = max(nbytes, key=nbytes.get)
    if not nbytes[largest]:
        raise UserError(f"{folder} holds no weights in {', '.join(PRECISIONS)}; wanted an unquantised model")
    return largest


def build_stage0(
    text_model: str | Path,
    vision_model: str | Path,
    target: str | Path,
    *,
    precision: str | None = None,
    vocabulary_multiple: int = 1,
    add_tokens: Sequence[str] = (),
    mm_projector: str | Path | None = None,
    seed: int | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> Report:
    """Write a LLaVA folder that LlavaForConditionalGeneration and AutoProcessor load.

    The LLM's weights, its head among them, and the tower's are copied; tokenizer, embedding and head get `<image>`.

    Args:
        text_model: folder of an LLM of LANGUAGE_MODELS.
        vision_model: folder of a tower.
        target: a folder that does not exist yet or is empty.
        precision: fp16, bf16 or fp32; None: that of the LLM.
        vocabulary_multiple: embedding and head are given unused rows up to a multiple of this.
        add_tokens: special tokens (see additions.read_tokens) that stand before `<image>`.
        mm_projector: an mm_projector.bin to start from, instead of a new projector drawn from `seed` (None: 1234).
        shard_bytes: largest size of one weight file.
        progress: show a bar on stderr.
    Raises:
        UserError: nothing was written.
    """
    began = time.monotonic()
    llm, tower, target = Path(text_model), Path(vision_model), Path(target)
    check_target(target)
    check_known("LLM model_type", hub_files.model_type(llm), LANGUAGE_MODELS)
    precision = precision or stored_precision(llm)
    dtype = precision_dtype(precision)
    projector_file = None if mm_projector is None else Path(mm_projector)
    additions = Additions(read_tokens(add_tokens), "mlp2x_gelu", projector_file, seed, vocabulary_multiple)
    plan = make_plan(llm, tower, precision, additions)

    tensors = wanted_tensors(plan.rows, plan.geometry)
    nbytes = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    check_disk(target, nbytes)

    def blocks(tensor: HubTensor) -> Iterator[Tensor]:
        stored = plan.weights[tensor.name]
        for first, last in row_blocks(stored.shape, stored.dtype):
            yield cast(stored.read_rows(first, last), dtype, tensor.name)

    with staged_folder(target) as folder:
        notes = plan.notes + hub_files.write_hub_folder(folder, plan.config, plan.tokens, llm, plan.tower_folder)
        with progress_bar(nbytes, "stage 0", progress) as advance:
            files = write_hub_weights(folder, tensors, dtype, blocks, advance, shard_bytes)
        arguments = {
            "precision": precision,
            "vocabulary_multiple": vocabulary_multiple,
            "add_tokens": list(additions.tokens),
            "mm_projector": projector_file and projector_file.name,
            "seed": seed,
        }
        facts = plan.facts | {"notes": notes}
        LlavaFolder(folder).write_provenance(provenance_text("stage 0", plan.sources, arguments, facts))
    notes.append(f"{len(tensors)} tensors in {len(files)} file(s), {precision}")
    return Report(target, nbytes, time.monotonic() - began, notes)
