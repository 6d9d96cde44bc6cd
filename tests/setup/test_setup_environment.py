"""The set-up script, run for real: refusals in one sentence, finding interpreters, finishing what was interrupted."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash")
TOOLS = ("awk", "cat", "cut", "df", "du", "flock", "grep", "head", "mkdir", "mv", "rm", "sleep", "tail")
PACKAGING = f"packaging=={metadata.version('packaging')}"


@pytest.fixture
def repository(tmp_path):
    """A clone that holds the script and a short requirements.txt, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    (folder / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "examples/setup_environment.sh", folder / "examples")
    (folder / "requirements.txt").write_text(f"# short\n{PACKAGING}\n")
    return folder


@pytest.fixture
def tools(tmp_path):
    """A PATH folder with the standard tools and no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


@pytest.fixture
def wheels(tmp_path):
    """A folder with the wheel of this environment's own `packaging`, so that the tests need no package index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    distribution = metadata.distribution("packaging")
    with zipfile.ZipFile(folder / f"{PACKAGING.replace('==', '-')}-py3-none-any.whl", "w") as wheel:
        for file in distribution.files:
            if file.suffix != ".pyc" and file.name not in ("INSTALLER", "REQUESTED", "direct_url.json"):
                wheel.write(file.locate(), str(file))
    return folder


def base_interpreter() -> str:
    """The interpreter that this environment was made from: it has none of the requirements."""
    return os.path.realpath(sys.executable)


def set_up(repository: Path, path: str, **variables: str) -> subprocess.CompletedProcess:
    home = repository.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {"PATH": path, "HOME": str(home), "PIP_CONFIG_FILE": "/dev/null", **variables}
    command = [BASH, str(repository / "examples/setup_environment.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def link(folder: Path, name: str) -> Path:
    """A launcher under that name for the base interpreter (a plain link would lose the interpreter's own folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'#!{BASH}\nexec "{base_interpreter()}" "$@"\n')
    (folder / name).chmod(0o755)
    return folder


def test_no_interpreter_is_one_sentence_and_creates_nothing(repository):
    result = set_up(repository, "/nonexistent")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no Python 3.12 or newer found")
    assert "uv python install 3.12" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (repository / ".venv").exists()


def test_full_disk_is_one_sentence_and_creates_nothing(repository, tools):
    (tools / "df").unlink()
    (tools / "df").write_text(
        f"#!{BASH}\necho 'Filesystem 1M-blocks Used Available Use% Mounted'\necho '/dev/x 9999 9000 999 90% /'\n"
    )
    (tools / "df").chmod(0o755)
    link(tools, "python3.12")
    result = set_up(repository, str(tools))
    assert result.returncode == 1
    assert "needs 9000 MB of disk" in result.stderr and "only 999 MB are free" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (repository / ".venv").exists()


def test_unreachable_index_is_one_sentence_with_the_remedy_and_no_stamp(repository, tools):
    link(tools, "python3.12")
    started = time.monotonic()
    result = set_up(repository, str(tools), PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert time.monotonic() - started < 60
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: pip cannot fetch packages from its index: Failed to establish a new connection")
    assert "PIP_INDEX_URL=" in last
    assert not (repository / ".venv/requirements.sha256").exists()


@pytest.mark.slow
def test_installs_finishes_an_interrupted_install_and_then_does_nothing(repository, tools, wheels):
    """python3 on PATH is too old and the only new one lies below pyenv's versions folder, as on many machines."""
    (tools / "python3").write_text(f"#!{BASH}\nexit 1\n")
    (tools / "python3").chmod(0o755)
    link(repository.parent / "home/.pyenv/versions/3.12.99/bin", "python3")
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    before = {entry.name for entry in repository.parent.iterdir()} | {"home"}

    result = set_up(repository, str(tools), **variables)
    assert result.returncode == 0, result.stderr
    python = repository / ".venv/bin/python"
    assert result.stdout == f"{python}\n"
    assert "making .venv with" in result.stderr and "versions/3.12.99/bin/python3" in result.stderr
    assert {entry.name for entry in repository.parent.iterdir()} == before
    assert list((repository.parent / "home").iterdir()) == [repository.parent / "home/.pyenv"]

    started = time.monotonic()
    result = set_up(repository, "/nonexistent")
    assert time.monotonic() - started < 3
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{python}\n", "")

    # Killed while pip unpacked the package: no stamp, no INSTALLER, files missing.
    (repository / ".venv/requirements.sha256").unlink()
    (package,) = (repository / ".venv/lib").glob("python3*/site-packages/packaging")
    (package.parent / f"{PACKAGING.replace('==', '-')}.dist-info/INSTALLER").unlink()
    (package / "version.py").unlink()
    result = set_up(repository, str(tools), **variables)
    assert result.returncode == 0, result.stderr
    assert (package / "version.py").exists()
    assert "making .venv" not in result.stderr

    # Killed while .venv itself was made: no pip in it.
    shutil.rmtree(package.parent / "pip")
    (repository / ".venv/requirements.sha256").unlink()
    result = set_up(repository, str(tools), **variables)
    assert result.returncode == 0, result.stderr
    assert "making .venv" in result.stderr

    # New requirements are installed, not overlooked.
    (repository / "requirements.txt").write_text(f"{PACKAGING}\npillow>=1\n")
    result = set_up(repository, str(tools), **variables)
    assert result.returncode == 1
    assert "pip could not install requirements.txt" in result.stderr and "pillow" in result.stderr


@pytest.mark.slow
def test_a_gpu_machine_without_a_compiler_is_warned(repository, tools, wheels):
    link(tools, "python3.12")
    (tools / "nvidia-smi").write_text(f"#!{BASH}\n")
    (tools / "nvidia-smi").chmod(0o755)
    done = set_up(repository, str(tools), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert done.returncode == 0, done.stderr
    assert "warning: no C compiler found (looked for $CC, gcc, clang)" in done.stderr
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    assert ("Python.h is missing" in done.stderr) == (not headers)


def test_an_environment_that_satisfies_everything_is_used(repository):
    shutil.copy(ROOT / "requirements.txt", repository)
    prefix = sys.prefix
    for variables in ({"VIRTUAL_ENV": prefix}, {"PYTHON": f"{prefix}/bin/python"}):
        started = time.monotonic()
        result = set_up(repository, "/nonexistent", **variables)
        assert time.monotonic() - started < 3
        assert (result.returncode, result.stdout) == (0, f"{prefix}/bin/python\n"), result.stderr
        assert not (repository / ".venv").exists()


def test_a_named_interpreter_that_lacks_something_is_refused_by_name(repository):
    (repository / "requirements.txt").write_text("packaging==0.1\nno-such-package==1.0\n")
    result = set_up(repository, "/nonexistent", PYTHON=f"{sys.prefix}/bin/python")
    assert result.returncode == 1
    assert "packaging " in result.stderr and "wanted ==0.1; no-such-package is missing" in result.stderr
    assert not (repository / ".venv").exists()


def test_this_repository_is_ready_in_under_three_seconds():
    started = time.monotonic()
    result = subprocess.run([BASH, str(ROOT / "examples/setup_environment.sh")], capture_output=True, text=True)
    assert time.monotonic() - started < 3
    assert result.returncode == 0 and Path(result.stdout.strip()).exists()
