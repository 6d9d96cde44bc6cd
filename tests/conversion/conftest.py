"""Tiny hub folders, made once per run."""

import importlib.util
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests import tiny_models

SCRIPT = Path(__file__).parents[2] / "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.py"


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A function: name -> hub folder.  llama, mistral, qwen2: LLMs; llava_<family>; clip, clip_full, clip_bare."""
    root = tmp_path_factory.mktemp("hub")
    makers = {
        "clip": lambda path: tiny_models.make_tiny_clip(path),
        "clip_full": lambda path: tiny_models.make_tiny_clip(path, full_model=True),
        "clip_bare": lambda path: tiny_models.make_tiny_clip(path, hub_prefix=False),
    }
    for family in tiny_models.FAMILIES:
        makers[family] = lambda path, family=family: tiny_models.make_tiny_llm(path, family)
        makers[f"llava_{family}"] = lambda path, family=family: tiny_models.make_tiny_llava(path, family)

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else makers[name](path)

    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """The converter's command line, run in this process: words -> (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("hf2mcore_convertor_llava", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words), "--no-progress"])
        capsys.readouterr()
        try:
            code = module.main()
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def tensors_of(folder: Path) -> dict:
    """All tensors of a folder's safetensors files, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert name not in found, name
                found[name] = file.get_tensor(name)
    return found
