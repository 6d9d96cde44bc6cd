"""Serves a trained LLaVA.  Started by serve_llava.sh, whose --help tells all."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.llava_mcore.engine_options import engine_of, exit_code, sampling_of
from megatron_patch.errors import UserError
from megatron_patch.inference.server import LlavaServer
from megatron_patch.launch.asking import COMMANDS

MEGABYTE = 1 << 20


def main() -> None:
    arguments = COMMANDS["serve"].parser().parse_args()
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
