"""Takes the projector out of a Megatron checkpoint: mm_projector.bin as the original LLaVA saves it after stage 1.

Only the projector's tensors are read. Back in: hf2mcore_convertor_llava.sh with PROJECTOR_PATH=FILE.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY))

import toolkits.environment  # noqa: E402, F401
from megatron_patch.conversion.convert import PRECISIONS  # noqa: E402
from megatron_patch.conversion.mm_projector import extract_projector  # noqa: E402
from toolkits.model_checkpoints_convertor.llava.command_line import exit_code  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a Megatron checkpoint; its newest iteration is read")
    parser.add_argument("output", help="file to make, for example mm_projector.bin; it must not exist")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="dtype of the file; default: as stored")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    dtype = arguments.precision and PRECISIONS[arguments.precision]
    kind, nbytes = extract_projector(Path(arguments.checkpoint), Path(arguments.output), dtype)
    print(f"wrote the {kind} projector, {nbytes / 1e6:.3f} MB -> {arguments.output}")


def main() -> int:
    arguments = parse_arguments()
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
