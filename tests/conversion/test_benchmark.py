"""The benchmark makes what it says, measures both directions, and leaves nothing."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "toolkits/model_checkpoints_convertor/llava/benchmark_conversion.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_conversion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_both_directions_are_measured_and_everything_is_deleted(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--size", "tiny", "--work", str(tmp_path)])
    monkeypatch.setattr(tool, "SHARE_OF_COPY", 0.0)  # 10 MB are copied before Python has started
    assert tool.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:18].strip() for line in lines[2:4]] == ["hub -> Megatron", "Megatron -> hub"]
    for line in lines[2:4]:
        assert 100 < float(line.split()[-1]) < 1536, "MiB of a process that imports torch"
    assert lines[-1].endswith("the export equals the source")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_deletes_everything_too(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--size", "tiny", "--work", str(tmp_path)])
    monkeypatch.setattr(tool, "make_source", lambda folder, size: folder.mkdir() or 1)
    with pytest.raises(RuntimeError, match=r"config\.json"):
        tool.main()
    assert list(tmp_path.iterdir()) == []


def test_the_large_size_is_a_7b(tool):
    geometry = tool.read_geometry(tool.config_of("7B"))
    rows = tool.table_of_weights(geometry)
    parameters = sum(tool.torch.Size(tensor.shape).numel() for tensor in tool.wanted_tensors(rows, geometry))
    assert 7.0e9 < parameters < 7.1e9
    assert 2 * parameters <= tool.ROOM["7B"]


def test_differences_are_seen(tool, tmp_path):
    for name, byte in (("one", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        data = bytearray(3 * 2**20)
        data[2**20] = byte
        (tmp_path / name / "model.safetensors").write_bytes(data)
    assert tool.same_samples(tmp_path / "one", tmp_path / "one")
    assert not tool.same_samples(tmp_path / "one", tmp_path / "other")
