"""A program under observation: the most host memory that each of its ranks held.

python tests/training/peak_memory.py FOLDER SCRIPT ARGUMENTS OF THE SCRIPT

FOLDER/RANK: bytes of resident memory at their peak.
"""

import os
import runpy
import sys
from pathlib import Path

from megatron_patch.device import cpu


def main() -> None:
    """Run the script, then write."""
    folder, script = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:  # an exit interval is an exit
        (folder / os.environ["RANK"]).write_text(str(cpu.peak_memory()))


if __name__ == "__main__":
    main()
