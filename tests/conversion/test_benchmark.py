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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_every_byte_is_compared(tool, tmp_path):
    """One byte of 300 MiB (sparse files), wherever it lies, and a file too few."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for part in ("a", "b"):
            with open(tmp_path / name / f"model-{part}.safetensors", "wb") as file:
                file.truncate(150 * 2**20)
    one, other = tmp_path / "one", tmp_path / "other"
    assert tool.same_bytes(one, other)
    for place in (0, 2 * 2**20 + 17, 100 * 2**20 + 1, 150 * 2**20 - 1):
        for byte, same in ((b"\1", False), (b"\0", True)):
            with open(other / "model-b.safetensors", "r+b") as file:
                file.seek(place)
                file.write(byte)
            assert tool.same_bytes(one, other) == same, place
    (other / "model-a.safetensors").unlink()
    assert not tool.same_bytes(one, other) and not tool.same_bytes(tmp_path, tmp_path)


@pytest.mark.slow
def test_an_export_that_differs_is_no_success(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--size", "tiny", "--work", str(tmp_path)])
    monkeypatch.setattr(tool, "SHARE_OF_COPY", 0.0)
    converted = tool.conversion

    def spoil(source, target, *words):
        result = converted(source, target, *words)
        for path in target.glob("*.safetensors"):  # of the export; the checkpoint has none
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return result

    monkeypatch.setattr(tool, "conversion", spoil)
    assert tool.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "NOT EQUAL: the export differs from the source"
