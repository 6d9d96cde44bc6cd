"""How the kernels come to be: built once, found again, and left out with a sentence where they cannot be built."""

import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megatron_patch import kernels
from megatron_patch.cpp_compiler import cpp_compiler
from megatron_patch.kernels import build
from tests.programs import in_new_process

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield tmp_path / "cache" / "llava_megatron"
    build.library.cache_clear()


def counting_compiler(folder: Path) -> tuple[Path, Path]:
    """The machine's compiler behind a script, and the file to which it adds a line at each call."""
    calls, script = folder / "calls", folder / "our-c++"
    script.write_text(f'#!/bin/sh\necho called >> {calls}\nexec {shutil.which(cpp_compiler()[0])} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script, calls


@needs_compiler
def test_the_library_is_built_once_and_for_the_user_alone(own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    script, calls = counting_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(script))
    for _ in range(2):
        assert build.library() is not None
        build.library.cache_clear()
    assert calls.read_text() == "called\n"
    assert len(list(own_cache.iterdir())) == 1 and stat.S_IMODE(own_cache.stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("changed", ["source", "header", "flags", "processor", "compiler"])
def test_another_origin_is_another_library(changed: str, own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    assert build.library() is not None
    build.library.cache_clear()
    if changed in ("source", "header"):
        copies = tmp_path / "sources"
        shutil.copytree(build.FOLDER, copies)
        name = "attention.cpp" if changed == "source" else "common.h"
        (copies / name).write_text((copies / name).read_text() + "\n// another\n")
        monkeypatch.setattr(build, "SOURCES", [copies / path.name for path in build.SOURCES])
        monkeypatch.setattr(build, "HEADER", copies / build.HEADER.name)
    elif changed == "flags":
        monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    elif changed == "processor":
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text("model name : another\nflags : none\n")
        monkeypatch.setattr(build, "CPUINFO", cpuinfo)
    else:
        monkeypatch.setenv("CXX", str(counting_compiler(tmp_path)[0]))
    assert build.library() is not None
    assert len(list(own_cache.iterdir())) == 2


@needs_compiler
def test_ranks_that_start_together_leave_one_whole_library(own_cache: Path) -> None:
    program = "from megatron_patch.kernels import build; assert build.library() is not None"
    ranks = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert [path.suffix for path in own_cache.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what a process has loaded")
def test_it_computes_in_torchs_own_threads() -> None:
    """A second OpenMP beside torch's would keep its threads on the same cores."""
    program = """
from megatron_patch.kernels import build
assert build.library() is not None
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert in_new_process(program).split() == ["1"]  # without sentencepiece, which brings an OpenMP of its own


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("/no/such/compiler", "there is no C++ compiler (/no/such/compiler)"),
        ("false", "false failed"),
        ("true", "kernels-"),  # succeeds and writes nothing
    ],
)
def test_no_kernels_is_said_once_and_torch_computes(compiler: str, told: str, own_cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match="steps are slower") as caught:
        assert kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5) is None
    assert told in str(caught[0].message) and "CXX" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.swiglu(torch.ones(2, 4)) is None
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_a_compiler_that_dies_leaves_no_half_of_a_library(own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "dying"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho half > "$2"\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.warns(UserWarning, match="dying failed"):
        assert build.library() is None
    assert not list(own_cache.iterdir())


def test_left_out_on_request_without_a_word(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library() is None


@pytest.mark.skipif(os.environ.get("LOCAL_RANK", "0") != "0", reason="within a run")
def test_one_process_of_a_machine_says_it(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library() is None


@needs_compiler
def test_a_home_that_cannot_be_written_does_not_stop_it(tmp_path: Path) -> None:
    """Whoever has no home builds for himself, and leaves nothing."""
    (tmp_path / "file").write_text("")
    (tmp_path / "own").mkdir()
    program = """
import os
from megatron_patch.kernels import build
assert build.library() is not None
print(*(name.partition("_")[0] for name in os.listdir(os.environ["TMPDIR"])))
"""
    places = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "own")}
    assert in_new_process(program, **places).split() == ["llava"]
    assert not list((tmp_path / "own").iterdir())
