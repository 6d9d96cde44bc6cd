"""One process of a model-parallel forward pass: reads cases, writes logits and losses.  Started by torchrun.

python -m torch.distributed.run --nproc_per_node 2 tests/model/parity_worker.py CASES.json

CASES.json: {"tensor": TP, "pipeline": PP, "context": CP, "sequence_parallel": bool,
             "length": tokens of every record (48 when absent), "weights": [NAME],
             "cases": [{"checkpoint": CKPT, "batch": FILE.pt, "result": FILE.pt, "adapters": FILE.pt or absent}]}
A batch holds tokens, labels, pixels and, of a model for images of any resolution, plans, and the same records packed
into one row with cu_seqlens.  A result holds logits [B, S, V], loss, and of the named weights on this stage the
gradients [TP, ...] of the mean loss, those of all tensor-parallel ranks behind each other, and the rows that the last
layer's MLP was given, of all context-parallel ranks; all of it once more of the packed row, under names that begin with
`packed_`.
adapters holds the whole matrices of the checkpoint's lora.json by their names; their gradients are in the result too.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch import device

device.install()

import torch  # noqa: E402

from megatron_patch import patches  # noqa: E402

patches.apply_all(device.backend().NAME)

from megatron.core import dist_checkpointing, mpu, tensor_parallel  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402

from megatron_patch.model.llava import LlavaModel  # noqa: E402
from megatron_patch.training.load_model import build_model  # noqa: E402

LENGTH = 48


def build(checkpoint: Path, plan: dict) -> LlavaModel:
    """The model of this process with the checkpoint's weights."""
    model = build_model(
        checkpoint,
        plan.get("length", LENGTH),
        plan["tensor"],
        plan["pipeline"],
        plan["context"],
        plan["sequence_parallel"],
    )
    wanted = model.base_sharded_state_dict({"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)})
    model.load_state_dict(dist_checkpointing.load({"model": wanted}, str(checkpoint / "release"))["model"])
    return model


@torch.no_grad()
def set_adapters(model: LlavaModel, file: str) -> list[str]:
    """Copy this rank's parts of whole matrices; returns the names of this stage's."""
    whole, rank = torch.load(file, weights_only=True), mpu.get_tensor_model_parallel_rank()
    names = [name for name, _ in model.named_parameters() if name.startswith("adapters.")]
    for name in names:
        value, own = whole[name], model.get_parameter(name)
        for axis, size in enumerate(own.shape):
            value = value if value.shape[axis] == size else value.narrow(axis, rank * size, size)
        own.copy_(value)
    return names


def through_stages(
    model: LlavaModel,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    pixels: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    plans: torch.Tensor | None = None,
):
    """Forward through the pipeline; returns (this stage's output, its input or None)."""
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    received = None
    if not first:
        config = model.config
        length = tokens.shape[1] // config.context_parallel_size
        if config.sequence_parallel:
            length //= config.tensor_model_parallel_size
        received = torch.empty(length, tokens.shape[0], config.hidden_size)
        torch.distributed.recv(received, mpu.get_pipeline_model_parallel_prev_rank())
        received.requires_grad_()
        model.set_input_tensor(received)
    output = model(
        tokens if first else None, labels if last else None, pixels if first else None, cu_seqlens, plans=plans
    )
    if not last:
        torch.distributed.send(output.detach().contiguous(), mpu.get_pipeline_model_parallel_next_rank())
    return output, received


def backward(output: torch.Tensor, received: torch.Tensor | None, count: float) -> None:
    """Of the mean loss, through the pipeline."""
    if mpu.is_pipeline_last_stage():
        (output[0] / count).backward()
    else:
        gradient = torch.empty_like(output)
        torch.distributed.recv(gradient, mpu.get_pipeline_model_parallel_next_rank())
        output.backward(gradient)
    if received is not None:
        torch.distributed.send(received.grad.contiguous(), mpu.get_pipeline_model_parallel_prev_rank())


def gradients(model: LlavaModel, names: list[str]) -> dict[str, torch.Tensor]:
    """Of the named weights on this stage [TP, ...], summed over ranks as Megatron's trainer sums them."""
    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    reduce = sys.modules[finalize_model_grads.__module__]._allreduce_non_tensor_model_parallel_grads
    reduce([model], model.config)
    found = {}
    for name, parameter in model.named_parameters():
        # a later stage counts its layers from 0 again
        if name in names and (mpu.is_pipeline_first_stage() or ".layers." not in name):
            gradient = parameter.grad.clone()
            torch.distributed.all_reduce(gradient, group=mpu.get_context_parallel_group())
            parts = [torch.empty_like(gradient) for _ in range(mpu.get_tensor_model_parallel_world_size())]
            torch.distributed.all_gather(parts, gradient, group=mpu.get_tensor_model_parallel_group())
            found[name] = torch.stack(parts)
    return found


def whole_sequence(logits: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Logits [B, S / CP, V] of this rank -> [B, S, V] of all; bounds: of the records, each cut for itself.

    Rank r of n holds pieces r and 2n - 1 - r of 2n: Megatron's rule, written down here a second time on purpose.
    """
    size = mpu.get_context_parallel_world_size()
    ranks = [torch.empty_like(logits) for _ in range(size)]
    torch.distributed.all_gather(ranks, logits.contiguous(), group=mpu.get_context_parallel_group())
    records = []
    for start, end in itertools.pairwise(bounds):
        pieces = [None] * 2 * size
        for rank, part in enumerate(ranks):
            pieces[rank], pieces[2 * size - 1 - rank] = part[:, start // size : end // size].chunk(2, dim=1)
        records.append(torch.cat(pieces, dim=1))
    return torch.cat(records, dim=1)


def everything(model: LlavaModel, names, tokens, labels, pixels, cu_seqlens, plans) -> dict[str, torch.Tensor]:
    """Logits; forward and backward; what this stage knows of the result."""
    result = {}
    with torch.no_grad():
        logits, _ = through_stages(model, tokens, None, pixels, cu_seqlens, plans)
    if mpu.is_pipeline_last_stage():
        bounds = [0, tokens.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        result["logits"] = whole_sequence(logits, bounds)
    model.zero_grad()
    rows = torch.zeros(1)

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        rows.fill_(inputs[0].shape[:2].numel())

    watching = model.language_model.decoder.layers[-1].mlp.register_forward_pre_hook(note)
    output, received = through_stages(model, tokens, labels, pixels, cu_seqlens, plans)
    watching.remove()
    torch.distributed.all_reduce(rows, group=mpu.get_context_parallel_group())
    total = output.detach().clone() if mpu.is_pipeline_last_stage() else torch.zeros(2)
    torch.distributed.all_reduce(total, group=mpu.get_context_parallel_group())
    count = float((labels != -100).sum())
    if mpu.is_pipeline_last_stage():
        assert total[1] == count, (total, count)
        result["loss"], result["rows"] = total[0] / total[1], rows
    backward(output, received, count)
    return result | gradients(model, names)


def main() -> None:
    """Run every case of the plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(plan["tensor"], plan["pipeline"], context_parallel_size=plan["context"])
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    for case in plan["cases"]:
        model = build(Path(case["checkpoint"]), plan)
        names = plan["weights"] + (set_adapters(model, case["adapters"]) if "adapters" in case else [])
        batch = torch.load(case["batch"], weights_only=True)
        tokens, labels, pixels = batch["tokens"], batch["labels"], batch["pixels"]
        packed, plans = batch["packed"], batch.get("plans")
        result = everything(model, names, tokens, labels, pixels, None, plans)
        text = (packed["tokens"], packed["labels"])
        again = everything(model, names, *text, pixels, packed["cu_seqlens"], plans)
        result |= {f"packed_{name}": value for name, value in again.items()}
        stage = mpu.get_pipeline_model_parallel_rank()
        if mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0:
            torch.save(result, f"{case['result']}.{stage}")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
