"""LLaVA instruction JSON (Instruct-150K, mix665k) and its images -> shards that the launchers train on.

One or many turns; one, several or no images per record; several --image-root where the images lie apart."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.preparation.sources import LlavaSource
from toolkits.multimodal_data_preprocessing.command_line import run_on_json

if __name__ == "__main__":
    sys.exit(run_on_json(__doc__, LlavaSource, "the instruction file, a list or one record per line"))
