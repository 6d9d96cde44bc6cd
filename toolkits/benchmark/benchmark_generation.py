"""Tokens per second of the Megatron engine beside transformers' own generate(), in one process, in turns.

    python toolkits/benchmark/benchmark_generation.py [--shape 135M-256] [--new-tokens 256] [--batch-sizes 1 8]

All get the same prompts: an image and a question, in a batch of different lengths.  All choose exactly NEW tokens, the
most likely ones; those of the engines must be transformers' own, or the comparison is refused.  `uncached` is
training's forward over everything so far for each token; of its steps every 16th is timed.  Printed are medians over
the rounds (--rounds 3) of new tokens of the whole batch per second, prompts included.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workload import SHAPES, SMALL_TOWER, SMOLLM2, Shape, write_model

import toolkits.environment  # noqa: F401
from megatron_patch.conversion import convert_to_megatron
from megatron_patch.data.conversation import Exchange
from megatron_patch.inference import Engine, Prompt, Request, Sampling, open_engine

WITH_MANY_IMAGE_TOKENS = Shape(SMOLLM2, SMALL_TOWER, 224, 14, 40, 1, size="0.1B")  # 256, as small towers of LLaVA
HERE = {name: shape for name, shape in SHAPES.items() if shape.weights} | {"135M-256": WITH_MANY_IMAGE_TOKENS}
TIMED_STEPS = 16  # of uncached steps one of so many is timed


class NeverComplete:
    """In place of an engine's reader: an answer ends at its length alone."""

    def is_complete(self, ids: list[int]) -> bool:
        return False

    def text(self, ids: list[int]) -> str:
        return ""


def requests(batch: int, shape: Shape) -> list[Request]:
    """An image and a question of one to two times the shape's text each."""
    import io

    import numpy as np
    from PIL import Image

    found = []
    for number in range(batch):
        pixels = np.random.default_rng(number).integers(0, 256, (shape.side_px, shape.side_px, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        words = shape.text_tokens + number * shape.text_tokens // max(batch - 1, 1)
        text = " ".join(f"w{(number + word) % 200}" for word in range(words))
        found.append(Request(str(number), (Exchange(f"<image> {text}", None),), (file.getvalue(),)))
    return found


def by_generate(engine: Engine, prompts: list[Prompt], count: int) -> list[list[int]]:
    """transformers' generate() on the model of the engine."""
    import torch

    from megatron_patch.inference.generation import all_pixels, left_padded

    model = engine._model
    tokens, real = left_padded(prompts, 0)
    pixels = (all_pixels(prompts).to(model.device).float() - engine._mean) / engine._std
    with torch.inference_mode():
        output = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=real.long().to(model.device),
            pixel_values=pixels.to(model.dtype),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            eos_token_id=None,
        )
    return output[:, tokens.shape[1] :].tolist()


def by_engine(engine: Engine, prompts: list[Prompt], count: int) -> list[list[int]]:
    return [list(answer.token_ids) for answer in engine.answer(prompts, Sampling(max_new_tokens=count))]


def uncached_s(engine: Engine, prompt: Prompt, answer: list[int]) -> float:
    """Seconds of so many tokens without a cache, from every 16th of the steps."""
    import torch

    model, here = engine._part._model, engine._part._here
    pixels = torch.from_numpy(prompt.pixels).to(here)
    total = 0.0
    for step in range(TIMED_STEPS // 2, len(answer), TIMED_STEPS):
        row = torch.tensor([[*prompt.tokens.tolist(), *answer[:step]]], device=here)
        began = time.perf_counter()
        with torch.no_grad():
            int(model(tokens=row, pixels=pixels)[0, -1].argmax())
        total += TIMED_STEPS * (time.perf_counter() - began)
    return total


def timed(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """(seconds, tokens); the tokens are on the host, so a GPU has done its work."""
    began = time.perf_counter()
    tokens = work()
    return time.perf_counter() - began, tokens


def compare(exported: Engine, megatron: Engine, shape: Shape, batch: int, count: int, rounds: int) -> None:
    """Print the row of one batch size.  Raises RuntimeError: the engines answer differently."""
    prompts = [exported.prepare(request) for request in requests(batch, shape)]
    sides = {
        "transformers' generate()": lambda: by_generate(exported, prompts, count),
        "our loop, transformers": lambda: by_engine(exported, prompts, count),
        "our loop, Megatron": lambda: by_engine(megatron, prompts, count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[list[int]]] = {}
    for name, work in sides.items():  # warm
        tokens[name] = work()
    reference = tokens["transformers' generate()"]
    for name, found in tokens.items():
        if found != reference:
            first = next(n for n, pair in enumerate(zip(*found, *reference, strict=True)) if len(set(pair)) > 1)
            raise RuntimeError(f"{name} chooses other tokens than transformers, from token {first} on")
    for _, (name, work) in itertools.product(range(rounds), sides.items()):
        seconds[name].append(timed(work)[0])
    generate = statistics.median(seconds["transformers' generate()"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        speed = f"{batch * count / middle:>9.1f} tokens/s  {generate / middle:>6.2f} x"
        print(f"batch {batch:>3}  {name:<26} {speed}", flush=True)
    if batch == 1:
        cached = statistics.median(seconds["our loop, Megatron"])
        uncached = uncached_s(megatron, prompts[0], reference[0])
        print(f"batch   1  {'Megatron, uncached':<26} {count / uncached:>9.1f} tokens/s  {generate / uncached:>6.2f} x")
        print(f"cached is {uncached / cached:.1f} times as fast as uncached at {count} new tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=HERE, default="135M-256")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    arguments = parser.parse_args()
    shape = HERE[arguments.shape]
    with tempfile.TemporaryDirectory() as folder:
        hub = write_model(Path(folder, "hub"), shape)
        convert_to_megatron(hub, None, Path(folder, "checkpoint"), precision="fp32", model_size=shape.size)
        template = Path(folder, "template.json")
        words = {"dtype": arguments.dtype, "template": str(template)}
        template.write_text('{"question": "{question}", "answer": "{answer}{ending}"}')
        with (
            open_engine(hub, "transformers", **words) as exported,
            open_engine(Path(folder, "checkpoint"), "megatron", **words) as megatron,
        ):
            exported._encoder.reader = megatron._encoder.reader = NeverComplete()
            print(f"{arguments.shape}, {arguments.new_tokens} new tokens, {shape.image_tokens} image tokens a prompt")
            for batch in arguments.batch_sizes:
                compare(exported, megatron, shape, batch, arguments.new_tokens, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
