"""Serves a trained LLaVA: a Megatron checkpoint, or an exported Hugging Face folder.

    bash serve_llava.sh DIR [--port 8000]

http://127.0.0.1:8000/ is a page to drop an image on and ask; /v1/chat/completions and /v1/models answer as OpenAI's do,
with images as data: URLs and with `stream`.  There is no password: only this machine is served unless --host says more.
What a request leaves open, the options under `sampling` say.  Ctrl-C ends it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.llava_mcore.engine_options import (
    add_engine_options,
    add_sampling_options,
    engine_of,
    exit_code,
    positive,
    sampling_of,
)
from megatron_patch.errors import UserError
from megatron_patch.inference.server import MOST_BYTES, LlavaServer

MEGABYTE = 1 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve_llava.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="checkpoint or exported folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free; default: 8000")
    parser.add_argument("--name", help="of the model in requests; default: DIR's own")
    parser.add_argument(
        "--max-request-mb",
        type=positive,
        default=MOST_BYTES // MEGABYTE,
        metavar="MB",
        help=f"larger requests are refused; default: {MOST_BYTES // MEGABYTE}",
    )
    add_sampling_options(parser)
    add_engine_options(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    sampling = sampling_of(arguments)
    with engine_of(arguments) as engine:
        name = arguments.name or arguments.model.resolve().name
        address = (arguments.host, arguments.port)
        try:
            server = LlavaServer(address, engine, name, sampling, arguments.max_request_mb * MEGABYTE)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {arguments.host} port {arguments.port}: {error}; try --port") from None
        with server:
            print(f"{name} is served by {engine.name}: http://{arguments.host}:{server.server_port}/", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    sys.exit(exit_code(main))
