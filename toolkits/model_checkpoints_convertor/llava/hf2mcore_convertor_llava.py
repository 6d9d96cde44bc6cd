"""Command line of the conversion room: hub folders -> Megatron checkpoint, or back with --mg2hf.

Started by hf2mcore_convertor_llava.sh, whose nine arguments become these words.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY))

import toolkits.environment  # noqa: E402, F401
from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron  # noqa: E402
from megatron_patch.conversion.adapters import ADAPTER_LAYOUTS  # noqa: E402
from megatron_patch.conversion.convert import FORMATS, PRECISIONS  # noqa: E402
from megatron_patch.conversion.layouts import LAYOUTS  # noqa: E402
from megatron_patch.errors import UserError  # noqa: E402
from megatron_patch.geometry import PROJECTOR_TYPES  # noqa: E402
from megatron_patch.llava_kinds import LLAVA_KINDS  # noqa: E402
from megatron_patch.model_sizes import MODEL_SIZES  # noqa: E402
from toolkits.model_checkpoints_convertor.llava.command_line import add_token_arguments, exit_code  # noqa: E402


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", required=True, help=f"one of {', '.join(MODEL_SIZES)}; checked against the LLM")
    parser.add_argument("--source-llm", required=True, help="hub folder of an LLM or LLaVA; with --mg2hf a checkpoint")
    parser.add_argument("--source-clip", default="none", help="hub folder of a CLIP or SigLIP, OpenAI's .pt, or none")
    parser.add_argument("--target", required=True, help="folder to make; it must not exist or be empty")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="checked against the model")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="checked against the model")
    parser.add_argument("--mg2hf", action="store_true", help="from Megatron to Hugging Face")
    parser.add_argument("--precision", required=True, choices=list(PRECISIONS), help="dtype of the result")
    parser.add_argument("--hf-checkpoint", default="none", help="with --mg2hf: the LLM or LLaVA it came from, or none")
    parser.add_argument("--projector", choices=PROJECTOR_TYPES, help="kind of a new projector; default: mlp2x_gelu")
    parser.add_argument(
        "--mm-projector", metavar="FILE", help="start from this mm_projector.bin, not from a new projector"
    )
    add_token_arguments(parser)
    parser.add_argument("--vision-feature-layer", type=int, help="of --source-clip, for the projector; default: -2")
    parser.add_argument("--model-kind", choices=list(LLAVA_KINDS), help="of a new LLaVA; default: llava, which is 1.5")
    parser.add_argument("--seed", type=int, help="of a new projector's weights; default: 1234")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="torch_dist (default): read with any TP and PP; torch: one file per rank of the TP and PP given; exports "
        "see it themselves",
    )
    parser.add_argument(
        "--layout",
        choices=(*LAYOUTS, *ADAPTER_LAYOUTS),
        help="with --mg2hf: hub (default), what LlavaForConditionalGeneration loads; or liuhaotian's original layout; "
        "of adapters also peft or original_lora, the others merge them",
    )
    parser.add_argument(
        "--base-checkpoint", metavar="CKPT", help="with --mg2hf: the base of adapters, where it was moved to"
    )
    parser.add_argument("--vision-tower-name", metavar="NAME", help="mm_vision_tower of an original layout")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


def _folder(text: str) -> Path | None:
    return None if text in ("none", "") else Path(text)


# Options of one direction only; "none" and [] are the same as leaving them out.
TO_MEGATRON = (
    *("source_clip", "projector", "mm_projector", "add_tokens", "vision_feature_layer", "model_kind", "seed"),
    "format",
)
FROM_MEGATRON = ("hf_checkpoint", "layout", "vision_tower_name", "base_checkpoint")


def _check_direction(arguments: argparse.Namespace) -> None:
    """Refuse arguments of the other direction; what a source has no use for, its conversion refuses."""
    for name in TO_MEGATRON if arguments.mg2hf else FROM_MEGATRON:
        if getattr(arguments, name) not in (None, [], "none", ""):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is for conversions {'to' if arguments.mg2hf else 'from'} Megatron; leave it out")


def run(arguments: argparse.Namespace) -> None:
    common = {
        "model_size": arguments.model_size,
        "precision": arguments.precision,
        "tensor_parallel": arguments.tensor_model_parallel_size,
        "pipeline_parallel": arguments.pipeline_model_parallel_size,
        "progress": not arguments.no_progress,
    }
    _check_direction(arguments)
    if arguments.mg2hf:
        source, target = Path(arguments.source_llm), Path(arguments.target)
        layout = arguments.layout or next(iter(LAYOUTS))
        report = convert_to_huggingface(
            source,
            target,
            hf_checkpoint=_folder(arguments.hf_checkpoint),
            layout=layout,
            tower_name=arguments.vision_tower_name,
            base=arguments.base_checkpoint,
            **common,
        )
        following = []
        if layout == "hub":
            following = [f"LlavaForConditionalGeneration.from_pretrained({str(target)!r}) and AutoProcessor load it."]
    else:
        report = convert_to_megatron(
            arguments.source_llm,
            _folder(arguments.source_clip),
            arguments.target,
            projector=arguments.projector,
            mm_projector=arguments.mm_projector,
            add_tokens=arguments.add_tokens,
            vision_feature_layer=arguments.vision_feature_layer,
            kind=arguments.model_kind,
            seed=arguments.seed,
            checkpoint_format=arguments.format or FORMATS[0],
            **common,
        )
        shown = shlex.quote(os.path.abspath(arguments.target))
        following = [
            f"next: pass {shown} as PRETRAIN_CHECKPOINT_PATH (argument 20) of",
            "  bash examples/llava_mcore/run_mcore_llava.sh      (bash ... --help lists the 23 arguments)",
        ]
    for line in (*report.notes, f"wrote {report.summary}", *following):
        print(line)


def main() -> int:
    arguments = parse_arguments()
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
