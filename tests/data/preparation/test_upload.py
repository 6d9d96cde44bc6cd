"""Uploads: a dataset is there whole or not at all, byte by byte, and a converter's command line makes one."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch import object_storage
from megatron_patch.data.loading.dataset import EnergonFolder
from megatron_patch.data.preparation.upload import LAST, check_target, upload_folder
from megatron_patch.errors import UserError
from tests.data.factories import convert_records, make_records
from tests.object_store import BUCKET, SECRET, Store

TOOLS = Path(__file__).parents[3] / "toolkits/multimodal_data_preprocessing"


@pytest.fixture(autouse=True)
def environment(object_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_records(tmp_path_factory.mktemp("records"), 22)
    convert_records(root)
    return root / "wds"


def stored(store: Store, prefix: str) -> dict[str, bytes]:
    names = [name for name in store.names() if name.startswith(f"{prefix}/")]
    return {name.removeprefix(f"{prefix}/"): store.get(name) for name in names}


def test_every_file_arrives_and_the_last_makes_the_dataset(folder: Path, object_store: Store) -> None:
    names: list[str] = []
    size = upload_folder(folder, "msc://store/up/whole", names.append)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert stored(object_store, "up/whole") == files and names[-1] == LAST and sorted(names) == sorted(files)
    assert size == sum(map(len, files.values()))
    assert EnergonFolder("msc://store/up/whole", "train").fingerprint == EnergonFolder(str(folder), "train").fingerprint
    with pytest.raises(UserError, match=rf"up/whole: holds a dataset already, of {len(files)} objects; remove it"):
        check_target("msc://store/up/whole")


@pytest.mark.parametrize("fault", [{"answer": b"403 Forbidden"}, {"answer": b"507 Insufficient Storage"}])
def test_what_the_store_refuses_is_no_dataset(fault: dict, folder: Path, object_store: Store) -> None:
    url = f"msc://store/up/{fault['answer'][:3].decode()}"
    with (
        object_storage.patience(0),
        object_store.fault(**fault, matching=b"train-000001.tar "),
        pytest.raises(UserError) as refused,
    ):
        upload_folder(folder, url)
    assert "what was sent is no dataset yet, upload again" in str(refused.value)
    with pytest.raises(UserError):
        EnergonFolder(url, "train")
    check_target(url)
    upload_folder(folder, url)  # begins again
    assert len(EnergonFolder(url, "train")) == len(EnergonFolder(str(folder), "train"))


def test_an_object_of_another_size_is_seen(folder: Path, object_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = object_storage.ObjectFolder.sizes

    def after_someone_else_wrote(self: object_storage.ObjectFolder) -> dict[str, int]:
        object_store.client.put_object(Bucket=BUCKET, Key="up/other/train-000001.tar", Body=b"x")
        return sizes(self)

    monkeypatch.setattr(object_storage.ObjectFolder, "sizes", after_someone_else_wrote)
    with pytest.raises(
        UserError, match=r"1 objects are not as they were sent, the first train-000001.tar with 1 of \d+"
    ):
        upload_folder(folder, "msc://store/up/other")
    assert f"up/other/{LAST}" not in object_store.names()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("/data/wds", "wanted msc://PROFILE/FOLDER"),
        (f"s3://k:{SECRET}@bucket/wds", "credentials are no part of the URL"),
        pytest.param("s3://no-such-bucket/wds", "there is no such bucket", marks=pytest.mark.slow),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_anything_is_made(url: str, told: str, tmp_path: Path) -> None:
    make_records(tmp_path, 22)
    line = [sys.executable, str(TOOLS / "convert_llava_instruct_to_wds.py"), str(tmp_path / "data.json")]
    done = subprocess.run([*line, "--upload", url], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and SECRET not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images"]


def test_a_part_is_not_uploaded(tmp_path: Path) -> None:
    make_records(tmp_path, 22)
    line = [sys.executable, str(TOOLS / "convert_llava_instruct_to_wds.py"), str(tmp_path / "data.json")]
    words = ["--part", "1/2", "--upload", "msc://store/up/part"]
    done = subprocess.run([*line, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "give it to the command with --join" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images"]


@pytest.mark.slow
def test_a_converter_uploads_at_its_end_and_a_folder_by_itself(object_store: Store, tmp_path: Path) -> None:
    make_records(tmp_path, 22)
    line = [sys.executable, str(TOOLS / "convert_llava_instruct_to_wds.py"), str(tmp_path / "data.json")]
    with object_store.fault(answer=b"403 Forbidden", matching=b"PUT "):
        done = subprocess.run([*line, "--upload", "msc://store/up/cli"], capture_output=True, text=True)
    assert done.returncode == 2 and "access is denied" in done.stderr and (tmp_path / "wds").is_dir()
    again = done.stderr.splitlines()[-1].rpartition("with upload_dataset.py ")[2].split()
    done = subprocess.run([sys.executable, str(TOOLS / "upload_dataset.py"), *again], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "next: give msc://store/up/cli" in done.stdout
    assert len(EnergonFolder("msc://store/up/cli", "train")) == len(EnergonFolder(str(tmp_path / "wds"), "train"))
