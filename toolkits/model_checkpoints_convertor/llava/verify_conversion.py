"""Does a converted checkpoint compute what its Hugging Face source computes?

    python verify_conversion.py --hf LLAVA_FOLDER --checkpoint CKPT [--tensor-model-parallel-size N] ...
    python verify_conversion.py --hf LLM_FOLDER --hf-clip CLIP_FOLDER --checkpoint CKPT ...

Both models run the same images and text in fp32, transformers in this process, Megatron in TP x PP processes that it
starts.  Printed: embedding, vision tower, projector, every decoder layer, logits and first loss with the largest
absolute and relative difference.  Exit code 0: all agree; 1: the first part that differs is named; 2: wrong input.

A checkpoint made of a language model and a CLIP tower has a projector (one that sees images at any resolution also an
image_newline) that no source holds: the checkpoint's own is used on both sides, so its row tells about the computation
only, and all other rows about weights as well.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY))

import toolkits.environment  # noqa: E402, F401

# isort: split
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_patch import device  # noqa: E402
from megatron_patch.conversion import hub_files  # noqa: E402
from megatron_patch.conversion.adapters import open_weights  # noqa: E402
from megatron_patch.conversion.table import projector_rows, table_of_weights  # noqa: E402
from megatron_patch.errors import UserError  # noqa: E402
from megatron_patch.geometry import LlavaGeometry  # noqa: E402
from megatron_patch.llava_folder import LlavaFolder  # noqa: E402
from megatron_patch.llava_kinds import LLAVA_KINDS, NEWLINE  # noqa: E402
from toolkits.model_checkpoints_convertor.llava.command_line import exit_code  # noqa: E402

IGNORE_LABEL = -100
TEXT_TOKENS = 24


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face LLaVA folder, or the language model's")
    parser.add_argument("--hf-clip", type=Path, help="with a language model: the vision tower's folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="converted checkpoint")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--image", type=Path, help="an image; default: two of random pixels")
    parser.add_argument("--prompt", help="text behind the image; default: random tokens")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference / largest value of a part")
    parser.add_argument("--seed", type=int, default=0, help="of the random pixels and tokens")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- what both sides compute


def make_batch(arguments: argparse.Namespace, geometry: LlavaGeometry, ids: int) -> dict[str, Tensor]:
    """tokens, labels int64 [B, S], pixels uint8 [N, 3, side, side]: an image, then text; no padding anywhere.

    Of a model that sees images at any resolution also plans int64 [B, ...] and image_sizes int64 [B, 2]; else N is B.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    side, rows = geometry.tower.side_px, 1 if arguments.image or arguments.prompt else 2
    pixels = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)
    image_tokens, planned = geometry.tower.image_tokens, {}
    if geometry.any_resolution is not None:
        pixels, image_tokens, planned = _tiles(arguments, geometry, rows, generator)
    elif arguments.image:
        from megatron_patch.data.image import image_to_pixels, open_image

        folder = LlavaFolder.of(arguments.checkpoint)
        settings = folder.settings
        way = folder.image_processing(side)
        image = open_image(arguments.image.read_bytes(), settings.exif_orientation)
        aspect = settings.image_aspect_ratio
        fitted = image_to_pixels(image, side, aspect, way["image_mean"], way["center_crop"], way["resample"])
        pixels = torch.from_numpy(fitted)[None]
    text = torch.randint(0, ids, (rows, TEXT_TOKENS), generator=generator)
    if arguments.prompt:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(LlavaFolder.of(arguments.checkpoint).tokenizer)
        text = torch.tensor([tokenizer(arguments.prompt).input_ids])
    text[text == geometry.image_token_id] = 0
    if geometry.video_token_id is not None:
        text[text == geometry.video_token_id] = 0
    marks = torch.full((rows, image_tokens), geometry.image_token_id)
    tokens = torch.cat([text[:, :1], marks, text[:, 1:]], dim=1)
    labels = torch.full_like(tokens, IGNORE_LABEL)
    labels[:, image_tokens:-1] = text[:, 1:]  # the token to predict at each position
    return {"tokens": tokens, "labels": labels, "pixels": pixels} | planned


def _tiles(
    arguments: argparse.Namespace, geometry: LlavaGeometry, rows: int, generator: torch.Generator
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Pixels of the tiles of one image for each row, its tokens, and plans and image_sizes."""
    from PIL import Image

    from megatron_patch.data.image import image_to_grid, open_image

    rule, folder = geometry.any_resolution, LlavaFolder.of(arguments.checkpoint)
    if arguments.image:
        images = [open_image(arguments.image.read_bytes(), folder.settings.exif_orientation)]
    else:  # wide, and not a whole number of tiles, so that padding is dropped
        size = (rule.side_px * 3 // 2, rule.side_px * 5 // 2, 3)
        drawn = (torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for _ in range(rows))
        images = [Image.fromarray(pixels.numpy()) for pixels in drawn]
    resample = folder.image_processing(rule.side_px)["resample"]
    sizes = [(image.height, image.width) for image in images]
    plan = rule.plan(sizes[0])
    pixels = torch.cat([torch.from_numpy(image_to_grid(image, rule, resample)) for image in images])
    return pixels, plan.tokens, {"plans": torch.tensor([plan.numbers] * rows), "image_sizes": torch.tensor(sizes)}


# ---------------------------------------------------------------- transformers


def _copy(parameters: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Copy into a parameter, the first rows where the LLaVA has grown more."""
    if name not in parameters:
        raise UserError(f"the source's {name} has no place in transformers' LLaVA; is it the checkpoint's source?")
    target = parameters[name]
    if target.shape[1:] != value.shape[1:] or target.shape[:1] < value.shape[:1]:
        raise UserError(f"{name} is {list(value.shape)} in the source, {list(target.shape)} in the checkpoint's config")
    target[: len(value)].copy_(value) if target.dim() else target.copy_(value)


def _own_weights(checkpoint: Path, geometry: LlavaGeometry) -> Iterator[tuple[str, Tensor]]:
    """(name in transformers' LLaVA, tensor) of what no source holds: projector and image_newline."""
    rows = projector_rows(geometry) + [row for row in table_of_weights(geometry) if row.parts[0].name == NEWLINE]
    with open_weights(checkpoint, geometry) as reader:
        for row in rows:
            yield f"model.{row.parts[0].name}", reader.read(row.key, (0,) * len(row.shape), row.shape)


def _assembled(arguments: argparse.Namespace, geometry: LlavaGeometry, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' LLaVA of a language model, a tower and the checkpoint's projector."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(LlavaFolder.of(arguments.checkpoint).path)
    model = getattr(transformers, geometry.kind.architecture)(config).float()
    if geometry.projector_type == "linear":
        linear = torch.nn.Linear(geometry.tower.hidden, geometry.language.hidden)
        model.model.multi_modal_projector = torch.nn.ModuleDict({"linear_1": linear})
        model.model.multi_modal_projector.forward = linear.forward
    llm = transformers.AutoModelForCausalLM.from_pretrained(arguments.hf, dtype=dtype)
    tower = transformers.AutoModel.from_pretrained(arguments.hf_clip, dtype=dtype)
    tower = getattr(tower, "vision_model", tower)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in llm.named_parameters():
            inner = name.removeprefix("model.")
            _copy(parameters, name if inner == name else f"model.language_model.{inner}", value)
        in_llava = {name.replace("vision_model.", ""): name for name in parameters if ".vision_tower." in name}
        for name, value in tower.named_parameters():
            name = f"model.vision_tower.{name.removeprefix('vision_model.')}"
            _copy(parameters, in_llava.get(name, name), value)
        for name, value in _own_weights(arguments.checkpoint, geometry):
            _copy(parameters, name, value.to(dtype))
    return model


def load_source(arguments: argparse.Namespace, geometry: LlavaGeometry, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' LLaVA with the source's weights, rounded to the checkpoint's dtype, in fp32.

    Raises:
        UserError: a folder is of another kind, or lacks weights.
    """
    import transformers

    kind = hub_files.model_type(arguments.hf)
    if kind not in LLAVA_KINDS:
        if arguments.hf_clip is None:
            raise UserError(f"{arguments.hf} is a {kind} without a vision tower; pass --hf-clip as well")
        return _assembled(arguments, geometry, dtype)
    if arguments.hf_clip is not None:
        raise UserError(f"{arguments.hf} is a whole LLaVA with its own tower; leave --hf-clip out")
    model, report = getattr(transformers, LLAVA_KINDS[kind].architecture).from_pretrained(
        arguments.hf, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise UserError(f"{arguments.hf} lacks weights of a LLaVA: {', '.join(sorted(report['missing_keys'])[:4])}")
    return model.float()


def run_source(model: torch.nn.Module, batch: dict[str, Tensor], statistics: dict) -> dict[str, Tensor]:
    """Name -> output of every part."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: object, _inputs: object, output: object) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().float().clone()

        return hook

    inner = model.model
    inner.language_model.embed_tokens.register_forward_hook(keep("embedding"))
    inner.multi_modal_projector.register_forward_hook(keep("projector"))
    inner.multi_modal_projector.register_forward_pre_hook(
        lambda _module, inputs: seen.__setitem__("vision tower", inputs[0].detach().float().clone())
    )
    for number, layer in enumerate(inner.language_model.layers):
        layer.register_forward_hook(keep(f"decoder layer {number}"))
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    labels = torch.full_like(batch["labels"], IGNORE_LABEL)
    labels[:, 1:] = batch["labels"][:, :-1]  # transformers' labels stand at the token itself
    images = {"pixel_values": (batch["pixels"].float() / 255 - mean) / std}
    if "plans" in batch:  # one image in each row, and all of the same shape
        rows = len(batch["plans"])
        images = {"pixel_values": images["pixel_values"].unflatten(0, (rows, -1)), "image_sizes": batch["image_sizes"]}
    with torch.no_grad():
        output = model.eval()(input_ids=batch["tokens"], labels=labels, **images)
    return seen | {"logits": output.logits.float(), "first loss": output.loss.float()}


# ---------------------------------------------------------------- Megatron, comparison


def run_megatron(
    cases: Sequence[tuple[Path, dict[str, Tensor]]], tensor: int, pipeline: int
) -> list[dict[str, Tensor]]:
    """Name -> output of every part, for each (checkpoint, batch), from TP x PP processes.

    Raises:
        UserError: a checkpoint cannot be loaded; with the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = {"tensor": tensor, "pipeline": pipeline, "cases": []}
        for number, (checkpoint, batch) in enumerate(cases):
            case = {"checkpoint": str(checkpoint.resolve()), "batch": f"{folder}/{number}.batch"}
            torch.save(batch, case["batch"])
            plan["cases"].append(case | {"result": f"{folder}/{number}.result"})
        Path(folder, "plan.json").write_text(json.dumps(plan))
        threads = str(max(1, (os.cpu_count() or 1) // (tensor * pipeline)))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", str(tensor * pipeline)),
                *(str(Path(__file__).with_name("verify_worker.py")), f"{folder}/plan.json"),
            ],
            capture_output=True,
            text=True,
            env={"OMP_NUM_THREADS": threads} | os.environ | device.backend().environment(nodes=1),
        )
        if done.returncode:
            # a refusal: its sentence, and the lists that belong to it, indented
            said = re.search(r"^error: (.*(?:\n  .*)*)", done.stderr, re.MULTILINE)
            raise UserError(said[1] if said else f"Megatron failed:\n{done.stderr[-3000:]}")
        results: list[dict[str, Tensor]] = []
        for case in plan["cases"]:
            results.append({})
            for stage in range(pipeline):
                results[-1] |= torch.load(f"{case['result']}.{stage}", weights_only=True)
    return results


@dataclass(frozen=True)
class Case:
    """A checkpoint, what both sides compute, and what its source said."""

    geometry: LlavaGeometry
    dtype: torch.dtype  # of the checkpoint's weights
    vocabulary: int  # rows of the embedding that the source has
    batch: dict[str, Tensor]
    expected: dict[str, Tensor]


def prepare(arguments: argparse.Namespace) -> Case:
    """Run the source.

    Raises:
        UserError: the folders are no checkpoint and no source of it, or TP and PP do not fit.
    """
    folder = LlavaFolder.of(arguments.checkpoint)
    geometry = folder.geometry()
    geometry.check_parallel(arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
    rows = table_of_weights(geometry)
    with open_weights(arguments.checkpoint, geometry) as reader:
        stored = reader.tensors.get(rows[0].key)
        if stored is None:
            raise UserError(f"{arguments.checkpoint} holds no {rows[0].key}; is it a LLaVA?")
        dtype = stored.properties.dtype
    source = hub_files.full_config(arguments.hf)
    vocabulary = min(source.get("text_config", source)["vocab_size"], geometry.language.vocabulary)
    batch = make_batch(arguments, geometry, vocabulary)
    statistics = folder.image_processing(geometry.tower.side_px)
    expected = run_source(load_source(arguments, geometry, dtype), batch, statistics)
    return Case(geometry, dtype, vocabulary, batch, expected)


def compare(case: Case, got: dict[str, Tensor]) -> list[tuple[str, float, float]]:
    """(part, largest absolute difference, the same / largest value) in the order of the computation."""
    decoder = [f"decoder layer {number}" for number in range(case.geometry.language.layers)]
    is_text = (case.batch["tokens"] != case.geometry.image_token_id)[..., None]
    table = []
    for name in ["embedding", "vision tower", "projector", *decoder, "logits", "first loss"]:
        one, other = case.expected[name], got[name]
        if name == "embedding":  # at images it is replaced
            one, other = one * is_text, other * is_text
        if name == "logits":  # rows that the conversion added are in no source
            one, other = one[..., : case.vocabulary], other[..., : case.vocabulary]
        difference = (one - other.reshape(one.shape)).abs().max().item()
        table.append((name, difference, difference / max(one.abs().max().item(), 1e-30)))
    return table


def differing(table: Sequence[tuple[str, float, float]], tolerance: float) -> list[str]:
    """Parts above the tolerance, the first of the computation first; NaN is above."""
    return [name for name, _, relative in table if not relative <= tolerance]


def verify(arguments: argparse.Namespace) -> int:
    """Print the table and the verdict; returns the exit code."""
    tensor, pipeline = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    case = prepare(arguments)
    table = compare(case, run_megatron([(arguments.checkpoint, case.batch)], tensor, pipeline)[0])
    wrong = differing(table, arguments.tolerance)
    print(f"{'part':<20} {'max abs diff':>13} {'relative':>10}")
    for name, absolute, relative in table:
        print(f"{name:<20} {absolute:>13.3e} {relative:>10.2e}{'   <-- differs' if name in wrong else ''}")
    if arguments.hf_clip is not None:
        print("projector: the checkpoint's own on both sides; the sources hold none")
    place = f"TP {tensor} x PP {pipeline}"
    if wrong:
        print(f"DIFFERENT at {place}: {wrong[0]} is the first of {len(wrong)} parts above {arguments.tolerance:g}")
        return 1
    print(f"EQUAL at {place}: every part within {arguments.tolerance:g} of transformers ({case.dtype} weights, fp32)")
    return 0


def main() -> int:
    arguments = parse_arguments()
    return exit_code(lambda: verify(arguments))


if __name__ == "__main__":
    sys.exit(main())
