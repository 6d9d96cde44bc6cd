"""rehearse_llava.sh: ranks of a job of any size, each started here with its real words."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_patch import device
from megatron_patch.launch.job_words import JOB, command_of, job_call
from megatron_patch.launch.rows import Program, default_python, python_path
from megatron_patch.launch.rules import REPOSITORY
from megatron_patch.launch.training import ENTRY

ABOUT = """Rehearses ranks of a job on this CPU before it queues: every error that a start of it would meet.

    bash rehearse_llava.sh --ranks 0,31,1023 --of 1024 run_mcore_llava.sh dsw 7B 1 256 ... (the job's own arguments)

A rank goes through the launcher's rules, the checks of data, tokenizer and labels and Megatron's own parser with its
real words; builds its part of the model without memory and compares it with the checkpoint; and reads its own slice of
the data order. Nothing is computed, sent or written. Not rehearsed: kernels, memory, the network, Transformer Engine.
"""


@dataclass(frozen=True)
class Rehearsal:
    """The command."""

    def parser(self) -> argparse.ArgumentParser:
        """The parser of its words."""
        parser = argparse.ArgumentParser(
            prog="rehearse_llava.sh", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--ranks", default="0", metavar="0,31", help="ranks to rehearse; default: 0")
        parser.add_argument("--of", type=int, required=True, metavar="N", help="processes of the job")
        parser.add_argument("--per-node", type=int, default=8, metavar="N", help="processes of a node; default: 8")
        parser.add_argument("job", nargs=argparse.REMAINDER, metavar="JOB", help=JOB)
        return parser

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> Program:
        """The program of words that are right; refuses others."""
        parser = self.parser()
        arguments = parser.parse_args(words)
        if not all(rank.isdecimal() and int(rank) < arguments.of for rank in arguments.ranks.split(",")):
            parser.error(f"--ranks {arguments.ranks}: wanted whole numbers from 0 to {arguments.of - 1}, as 0,31")
        per_node = min(arguments.per_node, arguments.of)
        if per_node < 1 or arguments.of % per_node:
            parser.error(f"--of {arguments.of}: wanted a multiple of the {per_node} processes of a node (--per-node)")
        call, job = job_call(parser, arguments.job, arguments.of, per_node, environment)
        started = command_of(arguments.job).start(call, job)
        for note in call.notes:
            print(note, file=sys.stderr)
        of_entry = started.words[list(started.words).index(ENTRY) + 1 :]
        entry = f"{REPOSITORY}/examples/llava_mcore/rehearse_llava.py"
        python = environment.get("PYTHON") or default_python()
        return Program(
            [python, "-u", entry, arguments.ranks, str(arguments.of), str(per_node), *of_entry],
            {"PYTHONPATH": python_path(environment), **device.kind(device.FALLBACK).environment(nodes=1)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port), "OMP_NUM_THREADS": "1"},
        )


COMMAND = Rehearsal()
