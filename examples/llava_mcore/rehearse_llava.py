"""Ranks of a job, rehearsed on this CPU one after the other.  Started by rehearse_llava.sh, whose --help tells all.

rehearse_llava.py RANKS WORLD_SIZE LOCAL_WORLD_SIZE ARGUMENTS OF pretrain_llava.py ...
"""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch import device


def rehearse(rank: int, world: int, local_world: int, words: list[str]) -> int:
    """In a process of its own, as torch's process groups are made once; returns its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local_world, "LOCAL_WORLD_SIZE": local_world}
    os.environ |= {name: str(value) for name, value in names.items()}
    sys.argv[1:] = words
    from megatron_patch.training.rehearsal import main

    code = 1
    try:
        code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    ranks, world, local_world, *words = sys.argv[1:]
    warnings.simplefilter("ignore")
    device.install()
    import megatron.training.training  # noqa: F401  # once for all ranks

    return max(rehearse(int(rank), int(world), int(local_world), words) for rank in ranks.split(","))


if __name__ == "__main__":
    sys.exit(main())
