"""What a launcher becomes: `python megatron_patch/launch/__main__.py COMMAND PROGRAM WORD...`.

COMMAND is a name of commands.py, PROGRAM the script as it was called.  It runs as a file, without site-packages.
"""

import os
import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036  # any python3 of the machine may come here
    print(f"error: {sys.executable} is Python {sys.version.split()[0]}, 3.10 or newer is needed", file=sys.stderr)
    sys.exit(2)
sys.path[0:0] = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]

from megatron_patch.launch.commands import find_command  # noqa: E402
from megatron_patch.launch.rows import ANY_PYTHON, Call, Command, Program, refuse  # noqa: E402
from megatron_patch.launch.rules import REPOSITORY  # noqa: E402
from megatron_patch.launch.tables import help_text  # noqa: E402


def main(name: str, program: str, words: list[str]) -> None:
    """Print help, refuse, or become the program."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
    command = find_command(name)
    if not isinstance(command, Command):  # it has options of its own
        started = command.run(words, os.environ)
        if started is not None:
            start(started, dry=os.environ.get("DRY_RUN") == "1")
        return
    if words[:1] in (["--help"], ["-h"]):
        print(help_text(command, program))
        return
    environment, complaints = os.environ, []
    if words[:1] in (["--config"], ["--from"]) and command.paths:
        from megatron_patch.launch.run_file import expand

        words, environment, complaints = expand(command, program, words, os.environ)
        if complaints:
            refuse(complaints, program)
    call = Call(command, program, words, environment)
    found = command.check(call)
    call.end_if_wrong()
    started = command.start(call, found)
    for note in call.notes:
        print(note, file=sys.stderr, flush=True)
    start(started, dry=call["DRY_RUN"] == "1")


def _has_packages() -> bool:
    """Has the Python of this process, which was started without them, what training needs?"""
    import site
    from importlib.util import find_spec

    site.main()
    return find_spec("torch") is not None


def start(program: Program, dry: bool) -> None:
    """Become the program, or print it, one word per line."""
    if dry:
        words = ["env", *(f"{name}={value}" for name, value in program.environment.items()), *program.words]
        sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\n" for word in words))
        return
    if program.words[0] == ANY_PYTHON and not _has_packages():
        setup = os.path.join(REPOSITORY, "examples/setup_environment.sh")
        print(
            f"error: {ANY_PYTHON} ({sys.executable}) has no torch, and there is no environment yet; make "
            f"it once: bash {setup}; or name a Python that has: PYTHON=...",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.stdout.flush()
    os.execvpe(program.words[0], program.words, os.environ | program.environment)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
