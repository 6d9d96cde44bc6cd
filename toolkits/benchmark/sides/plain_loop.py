"""What a user would write: a loop over transformers' LlavaForConditionalGeneration, with SDPA and fused AdamW.

    python plain_loop.py MODEL RUN.json PRECISION MICRO_BATCHES HEIGHTxWIDTH [freeze-language-model]
        [freeze-vision-tower]

Started by the benchmark, with a gate before each step (gate.py).  RUN.json holds the arguments of our trainer, from
which this loop takes its records alone: the batches are the same.  All images are of one size, of which a LLaVA-NeXT
wants to know.  bf16-mixed: weights in 32 bits, products under autocast, as transformers' Trainer with bf16=True.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import transformers
from gate import Gate

from megatron_patch.data.loading import build_train_loader
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.training.config import read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.float32}


def build(folder: str, dtype: torch.dtype, frozen: list[str]) -> transformers.PreTrainedModel:
    """On the GPU where there is one; with the folder's weights where it has some."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    kind = getattr(transformers, config.architectures[0])
    if list(Path(folder).glob("*.safetensors")):
        model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    else:
        with torch.device(where):
            model = kind._from_config(config, dtype=dtype)
    model.to(where).train()
    for part, name in (
        (model.model.vision_tower, "freeze-vision-tower"),
        (model.model.language_model, "freeze-language-model"),
        (model.lm_head, "freeze-language-model"),
    ):
        part.requires_grad_(name not in frozen)
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.requires_grad_("freeze-language-model" not in frozen)
    return model


def images_of(batch: dict, pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What the forward pass wants: pixels [N, ...], or those of each image's tiles [M, N / M, ...] and its size."""
    if "plans" not in batch:
        return {"pixel_values": pixels}
    images = len(batch["plans"])
    return {"pixel_values": pixels.unflatten(0, (images, -1)), "image_sizes": torch.tensor([size] * images)}


def main() -> None:
    """Train until the gate says that it is enough."""
    folder, run, precision, micro_batches, image_size, *frozen = sys.argv[1:]
    height, width = map(int, image_size.split("x"))
    settings = read_config(json.loads(Path(run).read_text()))
    model = build(folder, DTYPES[precision], frozen)
    where = model.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    # what is an option of ours alone: no padding, features of the tower in place of pixels
    padded = dataclasses.replace(settings.data, padding_free=False, feature_cache=None)
    loader = build_train_loader(settings.train_dataset_path, padded, 0, 1)
    mean, std = (
        torch.tensor(values, device=where).view(1, 3, 1, 1) * 255
        for values in (settings.data.image_mean, settings.pixel_std)
    )
    gate = Gate()
    while True:
        gate.before_step()
        batches = [next(loader) for _ in range(int(micro_batches))]
        count = sum((batch["labels"] != IGNORE_LABEL).sum() for batch in batches)
        total = torch.zeros((), device=where)
        for batch in batches:
            pixels = ((batch["pixels"].to(where).float() - mean) / std).to(model.dtype)
            # ours stand at the token before the one to predict, transformers' at the token itself
            labels = torch.nn.functional.pad(batch["labels"], (1, 0), value=IGNORE_LABEL)[:, :-1].to(where)
            with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model(
                    input_ids=batch["tokens"].to(where),
                    labels=labels,
                    num_items_in_batch=count,
                    **images_of(batch, pixels, (height, width)),
                ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.note(loss=total.item(), work=dict(loader.work))


if __name__ == "__main__":
    main()
