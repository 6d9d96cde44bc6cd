"""Conversions by a Ray cluster: the bytes of the local ones, whatever dies; a node that does not see all is refused."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_patch import ray_cluster
from megatron_patch.data.preparation import ray_workers
from megatron_patch.data.preparation.parts import Part
from megatron_patch.data.preparation.pipeline import Options, prepare
from megatron_patch.data.preparation.sources import LlavaSource
from megatron_patch.data.preparation.workers import Job, Sample, ShardBuilder
from megatron_patch.errors import UserError
from megatron_patch.ray_cluster import PACKAGE
from megatron_patch.sight import look
from tests.data.factories import convert_records, make_records
from tests.data.preparation.test_pipeline import CONVERTER, files_of
from tests.ray_nodes import Nodes, kill, succeed, two_nodes, wait_until

RECORDS, PER_SHARD = 1500, 5
WORDS = ("--samples-per-shard", PER_SHARD, "--keep-going", "--engine", "ray")


def convert(nodes: Nodes, root: Path, *words: object) -> subprocess.Popen:
    """The converter's command on this cluster, begun."""
    return nodes.begin([sys.executable, CONVERTER, root, "--image-root", root / "images", *WORDS, *words])


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes."""
    yield from two_nodes()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Records, one of them without its image, and what the local conversion gives."""
    root = make_records(tmp_path_factory.mktemp("records") / "in", RECORDS)
    (root / "images/7.png").unlink()
    convert_records(root, "once", samples_per_shard=PER_SHARD, keep_going=True)
    return root, files_of(root / "once")


def shards(root: Path) -> int:
    """That are there so far."""
    return len(list((root / "wds.partial").glob("*.tar")))


@pytest.mark.slow
def test_a_node_dies_and_the_driver_is_killed_and_resumed(nodes, source, capsys) -> None:
    root, expected = source
    running = convert(nodes, root)
    wait_until(running, lambda: shards(root) >= 20)
    nodes.tell("kill")
    at_death = shards(root)
    succeed(running)
    assert at_death and files_of(root / "wds") == expected
    shutil.rmtree(root / "wds")

    nodes.tell("add")
    running = convert(nodes, root)
    wait_until(running, lambda: shards(root) >= 20)
    kill(running)
    assert not (root / "wds").exists()
    journal = (root / "wds.partial/journal.jsonl").read_text().count("\n")
    succeed(convert(nodes, root, "--resume"))
    assert files_of(root / "wds") == expected and 1 < journal < len([name for name in expected if name[-4:] == ".tar"])
    with capsys.disabled():
        print(f"\n{at_death} shards when the node died, {journal - 1} noted when the driver was killed, of", end=" ")
        print(sum(name.endswith(".tar") for name in expected))


@pytest.mark.slow
def test_a_node_that_does_not_see_the_pictures_is_refused(nodes, source) -> None:
    """Last, for the node stays."""
    root, _ = source
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    nodes.tell(f"blind {root / 'images'}")
    there = files_of(root)
    running = convert(nodes, root, "--output", root / "other")
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 2 and "png is there and not here" in errors, errors
    assert socket.gethostname() in errors and "Traceback" not in errors
    assert files_of(root) == there


# --- What a node does, without Ray


def setup_of(root: Path, folder: Path) -> tuple[bytes, bytes]:
    """Shard builder, sight and token as the command sends them; a job of two records with images."""
    folder.mkdir()
    (folder / "token").write_text("token")
    source = LlavaSource(root / "data.json", [root / "images"])
    maker = ShardBuilder(source, folder, None)
    samples = [Sample(number, b'{"image": "%d.png"}' % number, [f"{number}.png"], number) for number in (1, 2)]
    setup = (maker, look(source.places()), (str(folder / "token"), "token"))
    return pickle.dumps(setup), pickle.dumps(Job("train", "train-000000.tar", samples))


def test_what_a_node_answers(tmp_path, monkeypatch) -> None:
    root = make_records(tmp_path / "in", 12)
    setup, job = setup_of(root, tmp_path / "wds.partial")
    sight = pickle.dumps(pickle.loads(setup)[1:])
    assert ray_cluster.unseen(sight) == []
    (tmp_path / "wds.partial/token").write_text("of another folder")
    assert "wds.partial is not the folder of the command" in ray_workers.make(setup, job)  # it joined late
    (tmp_path / "wds.partial/token").write_text("token")
    assert ray_workers.make(setup, job).written == 2
    assert sorted(path.name for path in (tmp_path / "wds.partial").iterdir()) == [
        "token",
        "train-000000.tar",
        "train-000000.tar.idx",
    ]
    (root / "images/1.png").rename(tmp_path / "aside")
    assert [one.reason for one in ray_workers.make(setup, job).rejected] == ["image missing"]  # of all nodes
    (root / "images").rename(tmp_path / "images")
    assert "png is there and not here" in ray_workers.make(setup, job)  # of this node: it lost the mount
    assert "png is there and not here" in ray_cluster.unseen(sight)[0]
    (tmp_path / "images").rename(root / "images")
    monkeypatch.setattr(ShardBuilder, "make", lambda self, job: os.stat("/absent"))
    assert isinstance(ray_workers.make(setup, job), FileNotFoundError)


# --- What is refused before anything is created


@pytest.fixture
def records(tmp_path) -> LlavaSource:
    root = make_records(tmp_path / "in", 12)
    return LlavaSource(root / "data.json", [root / "images"])


def test_without_ray_the_command_says_how_to_get_it(records, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--engine ray: Ray is not installed for .*; pip install {PACKAGE}"):
        prepare(records, tmp_path / "wds", Options(engine="ray"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"--ray-address 127.0.0.1:1: does not answer \(.*refused"),
        ("127.0.0.1:99999", r"does not answer"),
        ("ray://127.0.0.1:10001", r"wanted HOST:PORT of the cluster's head, .* not through Ray's client"),
        ("head", r"wanted HOST:PORT"),
    ],
)
def test_an_address_that_does_not_answer_is_refused(records, tmp_path, monkeypatch, address, message) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=message):
        prepare(records, tmp_path / "wds", Options(engine="ray", ray_address=address))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"engine": "ray", "part": Part(1, 2)}, "--engine ray: excludes --part and --join"),
        ({"engine": "ray", "join": True}, "--engine ray: excludes --part and --join"),
        ({"engine": "ray", "workers": 0}, "--engine ray --workers 0: wanted at least 1"),
        ({"ray_address": "head:6379"}, "--ray-address head:6379: has no meaning without --engine ray"),
    ],
)
def test_options_that_do_not_go_together(words, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**words)
