"""Under a result's own name lies something whole or what lay there before: after exceptions, kills and races."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch import atomic_files
from megatron_patch.atomic_files import atomic_file, atomic_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "a/b/target.json"
    write_text(target, "é\n")
    assert target.read_text(encoding="utf-8") == "é\n"
    with atomic_file(target, suffix=".gz") as beside:
        assert beside.parent == target.parent and beside.name == f"target.json.tmp-{os.getpid()}.gz"
        beside.write_text("new")
        assert target.read_text(encoding="utf-8") == "é\n", "the old one stays until the new one is whole"
    assert target.read_text() == "new" and names(target.parent) == ["target.json"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as beside:
        beside.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "made/for/it") as beside:
        beside.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "made/for/it") as beside:
        (beside / "file").write_text("half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError), atomic_file(target):
        pass  # nothing was written
    assert names(tmp_path) == ["target"] and target.read_text() == "old"


def test_a_target_that_must_be_new_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    with atomic_file(target, replace=False) as beside:
        beside.write_text("mine")
    assert target.read_text() == "mine" and names(tmp_path) == ["target"]

    def no_hard_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    for _ in range(2):
        with pytest.raises(FileExistsError), atomic_file(target, replace=False) as beside:
            beside.write_text("another")
        assert target.read_text() == "mine" and names(tmp_path) == ["target"]
        monkeypatch.setattr(os, "link", no_hard_links)
    with atomic_file(tmp_path / "second", replace=False) as beside:
        beside.write_text("mine")
    assert names(tmp_path) == ["second", "target"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()  # empty: as good as none
    with atomic_folder(target) as beside:
        (beside / "file").write_text("x")
        assert names(target) == []
    assert names(tmp_path) == ["target"] and names(target) == ["file"]
    with pytest.raises(FileExistsError, match="target"), atomic_folder(target) as beside:
        (beside / "other").write_text("y")
    assert names(tmp_path) == ["target"] and names(target) == ["file"]


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash of the machine may leave is decided by the order of these two calls."""
    seen = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, name=name, real=real: (seen.append(name), real(*words)))
    write_text(tmp_path / "target", "text", durable=True)
    assert seen == ["fsync", "replace"]
    write_text(tmp_path / "other", "text")
    assert seen == ["fsync", "replace", "replace"]


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_a_kill_leaves_the_target_alone(kind: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom megatron_patch import atomic_files\n"
        f"with atomic_files.{kind}(Path(sys.argv[1])) as beside:\n"
        "    (beside / 'file' if beside.is_dir() else beside).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(atomic_files.__file__).parents[1]
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "target"], cwd=root)
    assert child.wait() == -signal.SIGKILL
    assert names(tmp_path) == [f"target.tmp-{child.pid}"]


def test_it_is_imported_without_other_packages() -> None:
    """Patches, launch helpers and converters of data use it before torch is there."""
    code = "import sys, json, megatron_patch.atomic_files; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
