"""The file of lengths: mapped into memory, whole or not there, and the former one still read."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.loading import DataConfig
from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.lengths import open_lengths, record_lengths, write_lengths
from megatron_patch.data.loading.sampler import RecordLengths
from megatron_patch.data.loading.task_encoder import TaskEncoder

TOKENS, IMAGES = np.array([5, 6, 7], dtype=np.int32), np.array([0, 1, 0], dtype=np.int32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_lengths(tmp_path / "lengths.npy", iter([np.array([[5, 6], [0, 1]]), np.array([[7], [0]])]), 3)
    return tmp_path / "lengths.npy"


def test_lengths_are_mapped_and_their_fingerprint_is_stored(file: Path) -> None:
    found = open_lengths(file, 3)
    assert found.tokens.tolist() == TOKENS.tolist() and found.images.tolist() == IMAGES.tolist()
    assert isinstance(found.tokens, np.memmap) and found.tokens.dtype == np.int32
    assert found.fingerprint == RecordLengths(TOKENS, IMAGES).fingerprint
    content = file.read_bytes()
    file.write_bytes(content[:-16] + b"0123456789abcdef")
    assert open_lengths(file).fingerprint == "0123456789abcdef", "all lengths were read for it"


@pytest.mark.parametrize("kept", [0, 100, -17, -1])
def test_a_damaged_file_is_an_error(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError):
        open_lengths(file)


def test_lengths_of_other_records_or_something_else_are_an_error(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lengths of 3 records, wanted 4"):
        open_lengths(file, 4)
    for number, other in enumerate((np.zeros(4, dtype=np.int32), np.zeros((2, 4)), np.zeros((3, 4), dtype=np.int32))):
        np.save(tmp_path / f"{number}.npy", other)
        with (tmp_path / f"{number}.npy").open("ab") as end:
            end.write(b"0123456789abcdef")
        with pytest.raises(ValueError, match="no lengths of records"):
            open_lengths(tmp_path / f"{number}.npy")
    with pytest.raises(FileNotFoundError):
        open_lengths(tmp_path / "absent.npy")


def test_a_chunk_that_was_lost_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="lengths of 2 records, wanted 3"):
        write_lengths(tmp_path / "lengths.npy", [np.ones((2, 2))], 3)


@pytest.mark.parametrize("name", ["images", "pictures"])
def test_the_former_files_are_taken_over(folder: str, settings: DataConfig, name: str, tmp_path: Path, capfd) -> None:
    copy = tmp_path / "wds"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("llava_lengths_*"))
    dataset, encoder = Dataset(str(copy), "train"), TaskEncoder(settings, with_pixels=False)
    measured = record_lengths(dataset, encoder, settings)
    assert "measuring lengths: 100%" in capfd.readouterr().err
    (file,) = (copy / ".nv-meta").glob("llava_lengths_*.npy")
    former = {"tokens": np.array(measured.tokens) + np.int32(1), name: np.array(measured.images)}
    np.savez(file.with_suffix(".npz"), **former)
    file.unlink()
    for _ in range(2):  # from the former file, and from what was made of it
        found = record_lengths(dataset, encoder, settings)
        assert found.tokens.tolist() == (measured.tokens + 1).tolist()
        assert found.images.tolist() == measured.images.tolist()
        assert found.fingerprint == RecordLengths(former["tokens"], former[name]).fingerprint
    assert "measuring" not in capfd.readouterr().err
    np.savez(file.with_suffix(".npz"), tokens=former["tokens"][1:], images=former[name][1:])
    file.unlink()
    assert record_lengths(dataset, encoder, settings).tokens.tolist() == measured.tokens.tolist()
