"""Chats in JSON or JSONL, ShareGPT (conversations) or ChatML (messages) -> shards that the launchers train on.

A system turn at the front takes the place of the system sentence of the template."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.preparation.sources import ChatSource
from toolkits.multimodal_data_preprocessing.command_line import run_on_json

if __name__ == "__main__":
    sys.exit(run_on_json(__doc__, ChatSource, "the chats, a list or one record per line"))
