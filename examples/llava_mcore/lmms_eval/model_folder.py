"""The folder that lmms-eval is given: an export whose tokenizer adds no BOS by itself.

    python -m examples.llava_mcore.lmms_eval.model_folder EXPORTED OUT

lmms-eval writes the chat out by the chat template, which begins with BOS, and tokenizes the text as any other, so that
the tokenizer puts a second BOS in front and a few answers in a thousand change.  OUT has the export's files as links,
but for tokenizer.json.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_patch.atomic_files import atomic_folder, write_text
from megatron_patch.llava_folder import CHAT_TEMPLATE, TOKENIZER


def model_folder(exported: Path, out: Path) -> None:
    """Write OUT, which must not exist; a kill midway leaves only OUT.tmp-<process id>.  Raises OSError."""
    tokenizer = json.loads((exported / TOKENIZER).read_text(encoding="utf-8"))
    tokenizer["post_processor"] = None  # it does nothing but put BOS in front
    with atomic_folder(out) as folder:
        for file in exported.resolve().iterdir():
            if file.name != TOKENIZER:
                (folder / file.name).symlink_to(file)
        write_text(folder / TOKENIZER, json.dumps(tokenizer, ensure_ascii=False))


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path, metavar="EXPORTED", help="a model in the hub layout")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    arguments = parser.parse_args()
    problem = ""
    for name in (TOKENIZER, CHAT_TEMPLATE):
        if not (arguments.exported / name).is_file():
            problem = f"EXPORTED is {arguments.exported}, which has no {name}; name one that the converter exported"
    if arguments.out.exists():
        problem = f"OUT is {arguments.out}, which exists; remove it or name another folder"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    model_folder(arguments.exported, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
