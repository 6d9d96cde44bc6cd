"""A program under observation: which of its layers ran how often on rank 0.

python tests/training/observer.py SEEN.json SCRIPT ARGUMENTS OF THE SCRIPT

SEEN.json: {"calls": {"TransformerLayer 64 1": 2, ...}, "deterministic": bool}: class, hidden width, number of a layer.
"""

import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

WATCHED = ("TransformerLayer", "ScaledDotProductAttention")


def main() -> None:
    """Run the script with a hook around every module."""
    seen, script = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    calls: Counter[str] = Counter()

    def count(module: Any, _: Any) -> None:
        kind = type(module).__name__
        if kind in WATCHED:
            number = f" {module.layer_number}" if kind == "TransformerLayer" else ""
            calls[f"{kind} {module.config.hidden_size}{number}"] += 1

    torch.nn.modules.module.register_module_forward_pre_hook(count)
    runpy.run_path(script, run_name="__main__")
    told = {"calls": calls, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if os.environ["RANK"] == "0":
        seen.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
