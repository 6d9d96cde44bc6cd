"""One process of verify_conversion.py's Megatron side; started by torchrun, one process per TP x PP rank.

PLAN.json: {"tensor": TP, "pipeline": PP, "cases": [{"checkpoint": CKPT, "batch": FILE.pt, "result": PREFIX}]}
Writes PREFIX.<stage>: name -> tensor of what this pipeline stage computes, batch first, fp32 on the CPU.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from megatron_patch import device

device.install()

import torch  # noqa: E402

from megatron_patch import patches  # noqa: E402

patches.apply_all(device.backend().NAME)

from megatron.core import mpu, tensor_parallel  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_patch.errors import UserError  # noqa: E402
from megatron_patch.model.llava import LlavaModel  # noqa: E402
from megatron_patch.training.load_model import build_model, load_weights  # noqa: E402


def watch(model: LlavaModel, seen: dict[str, Tensor]) -> None:
    """Keep what the parts of the model put out: [S, B, ...] becomes [B, S, ...]."""

    def keep(name: str, sequence_first: bool):
        def hook(_module: object, _inputs: object, output: object) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen[name] = (states.transpose(0, 1) if sequence_first else states).detach().float().cpu().clone()

        return hook

    if model.pre_process:
        model.language_model.embedding.register_forward_hook(keep("embedding", True))
        model.vision_projection.register_forward_hook(keep("projector", False))
        model.vision_projection.register_forward_pre_hook(
            lambda _module, inputs: seen.__setitem__("vision tower", inputs[0].detach().float().cpu().clone())
        )
    for layer in model.language_model.decoder.layers:
        layer.register_forward_hook(keep(f"decoder layer {layer.layer_number - 1}", True))


def through_stages(model: LlavaModel, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
    """Forward through the pipeline; returns this stage's output."""
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    tokens, pixels = batch["tokens"], batch["pixels"]
    if not first:
        received = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size, device=tokens.device)
        torch.distributed.recv(received, mpu.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    plans = batch["plans"].cpu() if "plans" in batch and first else None
    output = model(tokens if first else None, labels if last else None, pixels if first else None, plans=plans)
    if not last:
        torch.distributed.send(output.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
    return output


def outputs(plan: dict, case: dict) -> dict[str, Tensor]:
    """Name -> what this pipeline stage computes of a case."""
    batch = torch.load(case["batch"], weights_only=True)
    batch = {name: tensor.to(device.current_device()) for name, tensor in batch.items()}
    checkpoint = Path(case["checkpoint"])
    model = build_model(checkpoint, batch["tokens"].shape[1], plan["tensor"], plan["pipeline"]).eval()
    load_weights(model, checkpoint)
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        loss = through_stages(model, batch, batch["labels"])
        watch(model, seen)
        logits = through_stages(model, batch, None)
    if mpu.is_pipeline_last_stage():
        seen |= {"logits": logits.float().cpu(), "first loss": (loss[0] / loss[1]).float().cpu()}
    return seen


def main() -> int:
    """Exit code 0, or 2 with a sentence."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    here = device.current_device()
    torch.get_device_module(here).set_device(here)  # Megatron's tower makes its position_ids on the current device
    torch.distributed.init_process_group(device.backend().DISTRIBUTED_BACKEND)
    mpu.initialize_model_parallel(plan["tensor"], plan["pipeline"])
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    for case in plan["cases"]:
        try:
            seen = outputs(plan, case)
        except UserError as error:
            if torch.distributed.get_rank() == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        if mpu.get_tensor_model_parallel_rank() == 0:
            torch.save(seen, f"{case['result']}.{mpu.get_pipeline_model_parallel_rank()}")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
