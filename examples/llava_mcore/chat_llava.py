"""Talk with a trained LLaVA in the terminal.  Started by chat_llava.sh, whose --help tells all."""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.llava_mcore.engine_options import engine_of, exit_code, sampling_of
from megatron_patch.errors import UserError
from megatron_patch.inference.chat import Chat
from megatron_patch.launch.asking import CHAT, COMMANDS

COMMANDS_IN_CHAT = CHAT[CHAT.index("/image") :]


def obey(chat: Chat, line: str) -> bool:
    """Do what a line that begins with / says; False when it is the end."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        chat.reset()
        print("(a new conversation)")
    elif command == "/image" and rest.strip():
        path = Path(rest.strip()).expanduser()
        chat.add_image(path)
        print(f"({path.name} belongs to the next question)")
    elif command == "/video" and rest.strip():
        path = Path(rest.strip()).expanduser()
        frames = chat.add_video(path)
        print(f"({path.name}, {frames} frames of it, belongs to the next question)")
    elif command == "/help":
        print(COMMANDS_IN_CHAT, end="")
    else:
        raise UserError(f"{line!r} is no command; /help lists them")
    return True


def tell(chat: Chat, question: str) -> None:
    """Print the answer as it comes."""
    pieces = chat.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    finally:
        pieces.close()
    print()


def main() -> None:
    arguments = COMMANDS["chat"].parser().parse_args()
    sampling = sampling_of(arguments)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and recalled
    with engine_of(arguments) as engine:
        chat = Chat(engine, sampling)
        for image in arguments.images:
            chat.add_image(image)
        print(f"{arguments.model} answers by {engine.name}; /help lists the commands", file=sys.stderr)
        while True:
            try:
                line = input("> ").strip()
                if line.startswith("/") and not obey(chat, line):
                    return
                if line and not line.startswith("/"):
                    tell(chat, line)
            except EOFError:
                print()
                return
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_code(main))
