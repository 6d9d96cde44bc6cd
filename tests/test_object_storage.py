"""URLs, and what is said of them, without a store; the folders are tested in data/loading/test_object_storage.py."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_patch.object_storage import ObjectFolder, StorageError, at_once, join, url_problem, without_credentials

ROOT = Path(__file__).parents[1]
SECRET = "very-secret-indeed"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("msc://profile/some/folder", None),
        ("s3://bucket", None),
        ("s3://bucket/", None),
        ("msc:///folder", "wanted msc://PROFILE/FOLDER"),
        ("s3://", "wanted msc://PROFILE/FOLDER"),
        ("/data/a@b", "wanted msc://PROFILE/FOLDER"),
        ("s3://key:secret@bucket/folder", "credentials are no part of the URL"),
        ("s3://bucket/folder?X-Amz-Signature=abc", "credentials are no part of the URL"),
    ],
)
def test_urls_that_can_be_read(url: str, problem: str | None) -> None:
    found = url_problem(url)
    assert found is None if problem is None else problem in found
    if problem is None:
        assert ObjectFolder(url).url == url.rstrip("/")
    else:
        with pytest.raises(StorageError, match=problem) as refused:
            ObjectFolder(url)
        assert "secret" not in str(refused.value) and "abc" not in str(refused.value)


def test_credentials_of_a_url_are_not_shown() -> None:
    assert without_credentials("s3://key:secret@bucket/a@b") == "s3://bucket/a@b"
    assert without_credentials("s3://bucket/a?X-Amz-Signature=abc") == "s3://bucket/a"
    assert without_credentials("/data/a@b?c") == "/data/a@b?c"


@pytest.mark.parametrize(
    ("folder", "name", "found"),
    [
        ("msc://p/blends", "pretrain/wds", "msc://p/blends/pretrain/wds"),
        ("msc://p/blends", "../pretrain/./wds", "msc://p/pretrain/wds"),
        ("msc://p/blends", "../../..", "msc://p/"),
        ("msc://p", "wds", "msc://p/wds"),
        ("/data", "s3://bucket/wds", "s3://bucket/wds"),
        ("msc://p/blends", "/wds", "msc://p/wds"),
    ],
)
def test_names_beside_a_file_in_object_storage(folder: str, name: str, found: str) -> None:
    assert join(folder, name) == found


PROFILES = """profiles:
  store:
    storage_provider: {type: s3, options: {base_path: bucket, endpoint_url: "http://127.0.0.1:9"}}
    credentials_provider:
      type: S3Credentials
      options: {access_key: KEY, secret_key: "%s"}
%s"""


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (PROFILES % (SECRET, ""), "MSC has no profile 'other'"),
        (PROFILES % (SECRET + "${ABSENT_A}$ABSENT_B", "  other: {storage_provider: {type: file}}"), None),
        (
            PROFILES % (SECRET, "  other: {storage_provider: {type: 7}}"),
            "configuration cannot be used (RuntimeError at $",
        ),
        (PROFILES % (SECRET + '"\n  broken: ["', ""), "configuration cannot be used (ValueError)"),
        (
            (PROFILES % (SECRET + "${ABSENT_A}$ABSENT_B", "")).replace("  store", "  other"),
            "names ABSENT_A, ABSENT_B, which the environment has not",
        ),
    ],
    ids=["no such profile", "another one's variable", "wrong type", "no YAML", "variables"],
)
def test_what_is_wrong_with_the_profile_is_said_without_its_secrets(
    config: str, told: str | None, tmp_path: Path
) -> None:
    """In a process of its own, as MSC keeps what it has read; its standard error is a run's log."""
    file = tmp_path / "msc.yaml"
    file.write_text(config)
    (tmp_path / "f").write_bytes(b"x")
    code = (
        "from megatron_patch.object_storage import ObjectFolder, StorageError\n"
        "try: ObjectFolder('msc://other').read('f')\n"
        "except StorageError as error: print(error)"
    )
    line = [sys.executable, "-c", code]
    environment = {"MSC_CONFIG": str(file), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert SECRET not in done.stdout + done.stderr
    assert done.returncode == 0 and done.stderr == ""
    assert told is None or (told in done.stdout and done.stdout.count("\n") == 1), done.stdout


def test_a_path_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_patch.launch import rules, training_rules\n"
        f"assert rules.dataset_problem({str(tmp_path)!r}) == 'it has no .nv-meta'\n"
        "assert rules.dataset_problem('msc://profile/wds') is None\n"
        "assert not {'multistorageclient', 'boto3', 'logging', 'threading'} & set(sys.modules), sys.modules.keys()"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); " + code
    subprocess.run([sys.executable, "-IS", "-c", code], check=True)


def test_calls_run_together_and_keep_their_order() -> None:
    together = threading.Barrier(4)

    def wait(number: int) -> int:
        together.wait(60)  # raises unless three other calls are under way
        if number == 5:
            raise StorageError("five")
        return number

    results = at_once([lambda number=number: wait(number) for number in range(16)], threads=4)
    assert [get() for number, get in enumerate(results) if number != 5] == [*range(5), *range(6, 16)]
    with pytest.raises(StorageError, match="five"):
        results[5]()


def test_an_error_of_storage_is_none_of_a_record() -> None:
    """Those are OSError, ValueError (and UserError with it) and TarError, and are skipped."""
    assert not issubclass(StorageError, OSError | ValueError)
    assert ObjectFolder("msc://p/wds/").url == "msc://p/wds"
