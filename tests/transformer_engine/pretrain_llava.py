"""examples/llava_mcore/pretrain_llava.py with Transformer Engine's layers, in their Python, on a CPU.

PRODUCTS=FOLDER: FOLDER/RANK.json gets how often which product of matrices was computed (stand_in.products).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch import parent_process

parent_process.end_with_parent()


def main() -> None:
    """Train, as sys.argv says."""
    from tests.transformer_engine import let_through

    stand_in = let_through.install()
    from megatron_patch.training.pretrain import train_llava

    train_llava()
    if folder := os.environ.get("PRODUCTS"):
        (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(stand_in.products))


if __name__ == "__main__":
    main()
