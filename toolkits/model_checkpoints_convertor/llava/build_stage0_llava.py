"""An LLM and a vision tower become an untrained LLaVA in the Hugging Face layout: the start of stage 1.

The LLM's weights and its head are copied, the projector is new (or read from --mm-projector), tokenizer and embedding
get <image>. hf2mcore_convertor_llava.sh converts the folder, LlavaForConditionalGeneration loads it.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY))

import toolkits.environment  # noqa: E402, F401
from megatron_patch.conversion.convert import PRECISIONS  # noqa: E402
from megatron_patch.conversion.stage0 import build_stage0  # noqa: E402
from toolkits.model_checkpoints_convertor.llava.command_line import add_token_arguments, exit_code  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-model", required=True, help="Hugging Face folder of the LLM")
    parser.add_argument("--vision-model", required=True, help="Hugging Face folder of the vision tower")
    parser.add_argument("--save-dir", required=True, help="folder to make; it must not exist or be empty")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="dtype of the result; default: that of the LLM")
    parser.add_argument(
        "--vocab-size-padding",
        type=int,
        default=1,
        metavar="N",
        help="give embedding and head unused rows up to a multiple of N",
    )
    add_token_arguments(parser)
    parser.add_argument("--mm-projector", metavar="FILE", help="an mm_projector.bin instead of a new projector")
    parser.add_argument("--seed", type=int, help="of the new projector's weights; default: 1234")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    report = build_stage0(
        arguments.text_model,
        arguments.vision_model,
        arguments.save_dir,
        precision=arguments.precision,
        vocabulary_multiple=arguments.vocab_size_padding,
        add_tokens=arguments.add_tokens,
        mm_projector=arguments.mm_projector,
        seed=arguments.seed,
        progress=not arguments.no_progress,
    )
    for line in (*report.notes, f"wrote {report.summary}"):
        print(line)


def main() -> int:
    arguments = parse_arguments()
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
