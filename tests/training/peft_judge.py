"""peft on transformers' LLaVA, as a user would train it: the judge of our adapters.

    python peft_judge.py begin MODEL FOLDER LORA.json     adapters to begin with, as peft saves them
    python peft_judge.py train MODEL FOLDER RUN.json      from FOLDER/begin over the run's own records to FOLDER/end,
                                                          losses in FOLDER/losses.json
    python peft_judge.py compare BASE ADAPTER MERGED OUT  logits and greedy tokens of BASE with ADAPTER, and of MERGED

RUN.json holds the words of our trainer's run, from which records, schedule and limits are taken.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from megatron_patch.data.loading import build_train_loader
from megatron_patch.geometry import IGNORE_LABEL
from megatron_patch.training.config import parse_own_arguments, read_config

GREEDY_TOKENS = 64


def load(folder: str) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def begin(model: str, folder: str, lora: str) -> None:
    """Random A, and B too: with B = 0 the first steps would say nothing of A."""
    torch.manual_seed(5)
    settings = json.loads(Path(lora).read_text())
    wrapped = get_peft_model(load(model), LoraConfig(**settings, init_lora_weights=False))
    wrapped.save_pretrained(f"{folder}/begin")


def rate(step: int, arguments, lr_warmup: int, decay: int) -> float:
    """Megatron's linear warm-up, then cosine, of the step numbered from 0."""
    if step < lr_warmup:
        return arguments.lr * step / lr_warmup
    share = (step - lr_warmup) / (decay - lr_warmup)
    return arguments.min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (arguments.lr - arguments.min_lr)


def train(folder: str, where: str, run: str) -> None:
    words = json.loads(Path(run).read_text())
    settings, arguments = read_config(words), parse_own_arguments(words)
    model = PeftModel.from_pretrained(load(folder), f"{where}/begin", is_trainable=True).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    padded = dataclasses.replace(settings.data, padding_free=False)
    loader = build_train_loader(settings.train_dataset_path, padded, 0, 1)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (settings.data.image_mean, settings.pixel_std)
    )
    steps, micro_batches = arguments.train_iters, arguments.global_batch_size // arguments.micro_batch_size
    losses = []
    for step in range(steps):
        batches = [next(loader) for _ in range(micro_batches)]
        count = sum((batch["labels"] != IGNORE_LABEL).sum() for batch in batches)
        total = 0.0
        for batch in batches:
            images = batch["pixels"] if len(batch["pixels"]) else None
            logits = model(
                input_ids=batch["tokens"], pixel_values=None if images is None else (images.float() - mean) / std
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_LABEL, reduction="sum"
            )
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, arguments, arguments.lr_warmup_iters, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count.item())
    model.save_pretrained(f"{where}/end")
    Path(where, "losses.json").write_text(json.dumps(losses))


@torch.no_grad()
def compare(base: str, adapter: str, merged: str, output: str) -> None:
    both = PeftModel.from_pretrained(load(base), adapter).eval(), load(merged).eval()
    silent = [
        name
        for name, value in load_file(f"{adapter}/adapter_model.safetensors").items()
        if "lora_B" in name and not value.any()
    ]
    config = both[1].config
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(3)
    image_tokens = config.image_seq_length
    text = torch.randint(10, 60, (1, 8), generator=generator)
    ids = torch.cat([text[:, :2], torch.full((1, image_tokens), config.image_token_id), text[:, 2:]], dim=1)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    found = {"silent": silent}
    logits = [model(input_ids=ids, pixel_values=pixels).logits for model in both]
    found["logits"] = (logits[0] - logits[1]).abs().max().item()
    found["moved"] = (logits[0] - load(base).eval()(input_ids=ids, pixel_values=pixels).logits).abs().max().item()
    found["tokens"] = [
        model.generate(
            input_ids=ids,
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=GREEDY_TOKENS,
            min_new_tokens=GREEDY_TOKENS,
        )[0, ids.shape[1] :].tolist()
        for model in both
    ]
    save_file({"unmerged": logits[0], "ids": ids, "pixels": pixels}, f"{output}.safetensors")
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    {"begin": begin, "train": train, "compare": compare}[sys.argv[1]](*sys.argv[2:])
