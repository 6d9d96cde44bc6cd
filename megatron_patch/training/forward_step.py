"""One micro-batch: from the loader to every tensor-parallel peer, through the model, to a sum of losses."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_patch import device
from megatron_patch.model.llava import LlavaModel
from megatron_patch.tile_plan import PLAN_FIELDS
from megatron_patch.training import loss_spikes

LOSS = "lm loss"  # its name in the log, TensorBoard and results of evaluations
# B, S, entries of cu_seqlens (0: not packed), plans (NO_PLANS: the model has no use for them), kind of the images,
# their shape: pixels [N, 3, side, side] or, cached, features [N, P, H, 1]
HEADER = 9
NO_PLANS = -1
IMAGE_KINDS = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)  # pixels are uint8, features the others


def broadcast_batch(batch: dict[str, Tensor] | None) -> dict[str, Tensor | None]:
    """Send the micro-batch of tensor-parallel rank 0 to its peers.

    Args:
        batch: on rank 0 tokens [B, S], labels [B, S] int64, pixels [N, 3, side, side] uint8 or None, in place of them
            features [N, P, H] where these are cached, plans [M, PLAN_FIELDS] int64 where the model wants them, and for
            a packed row cu_seqlens [records + 1] int32; elsewhere None.

    Returns:
        The same tensors on this process's device, plans on the CPU; cu_seqlens is None when not packed, pixels have
        N = 0 where there are none, and of pixels and features one is None.
    """
    here = device.current_device()
    parallel = mpu.get_tensor_model_parallel_world_size() > 1
    source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()

    def send(tensor: Tensor) -> Tensor:
        if parallel and tensor.numel():
            torch.distributed.broadcast(tensor, source, group=group)
        return tensor

    if batch is None:
        header = send(torch.zeros(HEADER, dtype=torch.int64, device=here))
        size, length, entries, images_planned, kind, *shape = header.tolist()
        text = torch.empty(2, size, length, dtype=torch.int64, device=here)
        images = torch.empty(shape, dtype=IMAGE_KINDS[kind], device=here)
        cu_seqlens = torch.empty(entries, dtype=torch.int32, device=here)
        plans = torch.empty(max(images_planned, 0), PLAN_FIELDS, dtype=torch.int64, device=here)
    else:
        text = torch.stack([batch["tokens"], batch["labels"]]).to(here, non_blocking=True)
        if batch.get("features") is not None:
            images = batch["features"].unsqueeze(-1).to(here)
        elif batch["pixels"] is not None:
            images = batch["pixels"].to(here)
        else:
            images = torch.empty(0, 3, 0, 0, dtype=torch.uint8, device=here)
        packed = batch.get("cu_seqlens")
        cu_seqlens = torch.empty(0, dtype=torch.int32, device=here) if packed is None else packed.to(here)
        planned = batch.get("plans")
        images_planned = NO_PLANS if planned is None else planned.shape[0]
        plans = torch.empty(0, PLAN_FIELDS, dtype=torch.int64, device=here) if planned is None else planned.to(here)
        kind = IMAGE_KINDS.index(images.dtype)
        header = [*text.shape[1:], cu_seqlens.shape[0], images_planned, kind, *images.shape]
        send(torch.tensor(header, dtype=torch.int64, device=here))
    text, images, cu_seqlens, plans = send(text), send(images), send(cu_seqlens), send(plans)
    pixels, features = (images, None) if images.dtype == torch.uint8 else (None, images.squeeze(-1))
    packed = cu_seqlens if cu_seqlens.numel() else None
    return {
        "tokens": text[0],
        "labels": text[1],
        "pixels": pixels,
        "features": features,
        "cu_seqlens": packed,
        "plans": None if images_planned == NO_PLANS else plans.cpu(),
    }


def loss_function(output: Tensor, record_ids: Sequence[str] = ()) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Model output [2] -> (sum of losses in nats, number of labels, what to report).

    Megatron divides gradients and the reported sum by the number of labels of all ranks and micro-batches.
    `record_ids` (known on tensor-parallel rank 0 alone) are named when the loss turns out bad.
    """
    # a clone, since the pipeline frees outputs and refuses views
    total, count = output[0].clone(), output[1].detach()
    sums = torch.stack([total.detach(), count])
    loss_spikes.note(record_ids, sums)
    return total, count.to(torch.int), {LOSS: sums}


def forward_step(data_iterator: Iterator[dict] | None, model: LlavaModel) -> tuple[Tensor, Callable]:
    """Megatron's hook: one micro-batch through the part of the model on this pipeline stage."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    first, last = (get_attr_wrapped_model(model, name) for name in ("pre_process", "post_process"))
    batch, record_ids = dict.fromkeys(("tokens", "labels", "pixels", "features", "cu_seqlens", "plans")), ()
    args = get_args()
    if first or last or args.packing or args.padding_free:  # every stage must know where the records of a row begin
        own = next(data_iterator) if data_iterator is not None else None
        record_ids = own["record_ids"] if own is not None else ()
        batch = broadcast_batch(own)
    timers("batch-generator").stop()
    output = model(
        tokens=batch["tokens"] if first else None,
        labels=batch["labels"] if last else None,
        pixels=batch["pixels"] if first else None,
        cu_seqlens=batch["cu_seqlens"],
        features=batch["features"] if first else None,
        plans=batch["plans"] if first else None,
    )
    return output, functools.partial(loss_function, record_ids=record_ids)
