"""Trains the tiny vision tower before there is a LLaVA, as CLIP's had seen its images before LLaVA-1.5 took it.

    python -m examples.llava_mcore.quickstart.train_tower CLIP RECORDS OUT

CLIP is the tower of make_models, RECORDS a set of make_digits with captions; OUT gets the trained tower.  It learns to
tell digit, ink and ground of an image, without words.  Each patch has to tell them by itself, from the layer that LLaVA
takes: LLaVA sees the patches, and a tower that tells them from its class token keeps little of it there.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPImageProcessor, CLIPVisionModel
from transformers.utils import logging

from examples.llava_mcore.quickstart.make_digits import GROUNDS, INKS
from megatron_patch.atomic_files import atomic_folder
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import IMAGE_PROCESSOR

FEATURE_LAYER = -2  # LLaVA-1.5's
BATCH, LR = 32, 2e-3
ANSWERS = ([str(digit) for digit in range(10)], list(INKS), list(GROUNDS))


def read_images(clip: Path, records: Path) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, side, side] and int64 [N, 3], the places in ANSWERS of what each caption says."""
    processor, pixels, truth = CLIPImageProcessor.from_pretrained(clip), [], []
    for record in json.loads((records / "digits.json").read_text()):
        _, ink, digit, _, ground = record["conversations"][1]["value"].split()  # "a red 7 on black"
        truth.append([names.index(name) for names, name in zip(ANSWERS, (digit, ink, ground), strict=True)])
        pixels.append(np.asarray(Image.open(records / "images" / record["image"])))
    parts = np.array_split(np.stack(pixels), max(1, len(pixels) // 1000))
    return torch.cat([processor(part, return_tensors="pt")["pixel_values"] for part in parts]), torch.tensor(truth)


def train_tower(clip: Path, records: Path, out: Path, epochs: int = 2, seed: int = 1) -> list[float]:
    """Writes OUT, which must not exist; returns the share of patches that tell the digit, by epoch."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it or name another folder")
    torch.manual_seed(seed)
    pixels, truth = read_images(clip, records)
    tower = CLIPVisionModel.from_pretrained(clip)
    heads = torch.nn.ModuleList(torch.nn.Linear(tower.config.hidden_size, len(names)) for names in ANSWERS)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=LR)
    steps = epochs * -(-len(truth) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    right = []
    for epoch in range(epochs):
        told = 0.0
        for chosen in torch.randperm(len(truth)).split(BATCH):
            patches = tower(pixels[chosen], output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:]
            guesses = [head(patches).flatten(0, 1) for head in heads]  # of each: [images x patches, names]
            wanted = truth[chosen].repeat_interleave(patches.shape[1], dim=0).unbind(1)
            optimizer.zero_grad()
            sum(cross_entropy(*pair) for pair in zip(guesses, wanted, strict=True)).backward()
            optimizer.step()
            schedule.step()
            told += (guesses[0].argmax(dim=1) == wanted[0]).float().mean().item() * len(chosen)
        right.append(told / len(truth))
        print(f"all patches, epoch {epoch + 1} of {epochs}: {right[-1]:.1%} tell the digit", flush=True)
    with atomic_folder(out) as folder:
        tower.save_pretrained(folder)
        shutil.copyfile(clip / IMAGE_PROCESSOR, folder / IMAGE_PROCESSOR)
    return right


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="the untrained tower")
    parser.add_argument("records", type=Path, help="folder with digits.json and images/")
    parser.add_argument("out", type=Path, help="folder to create")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for file in (arguments.clip / "config.json", arguments.records / "digits.json"):
        if not file.is_file():
            print(f"error: {file}: no such file; make models and digits first", file=sys.stderr)
            return 2
    try:
        train_tower(arguments.clip, arguments.records, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
