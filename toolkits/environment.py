"""Imported first by every command of the toolkits: it runs in the project's environment, or says how to make it.

A command that is typed outside of it becomes the same command of .venv's Python, where setup_environment.sh made one.
Standard library only, and no more of the language than any python3 knows.
"""

import importlib.util
import os
import sys

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEEDED = ("numpy", "torch", "yaml")  # stand for the rest of requirements.txt


def enter():
    """Return where the packages are; else become the command in the environment, or end with exit code 2."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    own = os.path.join(REPOSITORY, ".venv", "bin", "python")
    if os.access(own, os.X_OK) and os.path.realpath(sys.prefix) != os.path.realpath(os.path.join(REPOSITORY, ".venv")):
        os.execv(own, [own, *sys.argv])
    print(
        f"error: {sys.executable} lacks {', '.join(missing)}; set the environment up once, this command finds it then: "
        f"bash {os.path.join(REPOSITORY, 'examples', 'setup_environment.sh')}",
        file=sys.stderr,
    )
    sys.exit(2)


enter()
