"""Pieces of work on actors that die: each is done, its result comes in its place; what cannot work is one sentence.

Without Ray: a stand-in calls what the actors would call, and lets them die where the test says so.
"""

import operator
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_patch import ray_cluster
from megatron_patch.errors import UserError
from megatron_patch.ray_cluster import AHEAD, LOSSES, QUEUED, RayActors, RayCluster, Shape, SharedFolder, Token

PIECES, ACTORS = 60, 3
HUNDRED = partial(int, 100)  # what pieces work with


class RayError(Exception):
    """An actor is gone."""


class RayTaskError(RayError):
    """A fault of the program."""


class Standin:
    """A cluster: what has begun is done when ray.wait() is asked, one thing at a time, in any order."""

    def __init__(self, dies: Callable[[int, int], bool], seed: int = 0, has_room: bool = True) -> None:
        """dies: does this actor (0, 1, ...) die at its n-th call?"""
        self.seen, self.ray = {}, self
        self.alive: dict[int, int] = {}  # actors, and how often they were called
        self.started = self.most = self.most_queued = 0
        self._dies, self._random, self._has_room = dies, random.Random(seed), has_room
        self._begun: dict[int, tuple[int, str, bytes]] = {}
        self._references = self._waits = 0

    def start(self, shape: Shape) -> types.SimpleNamespace:
        number, self.started = self.started, self.started + 1
        self.alive[number] = 0
        self.most = max(self.most, len(self.alive))
        remote = partial(self._begin, number)
        return types.SimpleNamespace(call=types.SimpleNamespace(remote=remote), number=number)

    def _begin(self, actor: int, module: str, name: str, data: bytes) -> int:
        self._references += 1
        self._begun[self._references] = (actor, name, data)
        self.most_queued = max(self.most_queued, sum(one[0] == actor for one in self._begun.values()))
        return self._references

    def holds(self, shape: Shape) -> bool:
        return self._has_room

    def kill(self, actor: types.SimpleNamespace) -> None:
        self.alive.pop(actor.number, None)

    def check_nodes(self, token: Token | None) -> None:
        """All is well."""

    def wait(self, references: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        self._waits += 1
        assert self._waits < 1000, "it goes on for ever"
        ready = [self._random.choice(references)] if self._has_room else []
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference: int):
        actor, name, data = self._begun.pop(reference)
        if actor not in self.alive:
            raise RayError("its node is gone")
        self.alive[actor] += 1
        if self._dies(actor, self.alive[actor]):
            del self.alive[actor]
            raise RayError("its node died")
        return getattr(ray_cluster, name)(data)


@pytest.fixture
def actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RayActors]]:
    """Makes actors of a stand-in."""
    errors = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(exceptions=errors))
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    monkeypatch.setattr(ray_cluster, "_here", None)
    folders: list[SharedFolder] = []

    def make(cluster: Standin, opener: Callable = HUNDRED) -> RayActors:
        folders.append(SharedFolder(cluster, tmp_path / f"answers-{len(folders)}.ray"))
        return RayActors(cluster, Shape(ACTORS, 1, 0), opener, folders[-1])

    yield make
    for folder in folders:
        folder.close()
    assert list(tmp_path.iterdir()) == []


def pieces(asked: list[int]) -> Iterator[Callable[[int], int]]:
    """Each adds its number; those that have been asked for are noted."""
    for number in range(PIECES):
        asked.append(number)
        yield operator.methodcaller("__add__", number)


@pytest.mark.parametrize("seed", range(5))
def test_actors_die_and_every_piece_has_its_result_in_its_place(seed: int, actors) -> None:
    chance = random.Random(seed)
    cluster = Standin(lambda actor, call: chance.random() < 0.15, seed)
    asked: list[int] = []
    found = []
    with actors(cluster) as made:
        for result in made.in_order(pieces(asked)):
            found.append(result)
            assert len(asked) <= len(found) + QUEUED * AHEAD * ACTORS + 1, "pieces pile up"
    assert found == [100 + number for number in range(PIECES)]
    assert cluster.started > ACTORS == cluster.most and cluster.most_queued == QUEUED
    assert not cluster.alive, "actors go on"


def test_without_a_piece_no_actor_is_started(actors) -> None:
    cluster = Standin(lambda actor, call: False)
    assert list(actors(cluster).in_order([])) == [] and cluster.started == 0


def test_what_opens_or_does_a_piece_may_refuse(actors, tmp_path: Path) -> None:
    never = lambda actor, call: False  # noqa: E731
    with pytest.raises(UserError, match=r"wanted one of auto, .*; the same command goes on"):
        list(actors(Standin(never), refuse).in_order([abs]))
    with pytest.raises(UserError, match=r"node .*: .*No such file.*none"):
        list(actors(Standin(never)).in_order([partial(open_file, str(tmp_path / "none"))]))
    with pytest.raises(UserError, match=r"node .*: No module named 'absent'"):
        list(actors(Standin(never), partial(__import__, "absent")).in_order([abs]))


def refuse() -> None:
    raise UserError("engine 'x': wanted one of auto, transformers, megatron")


def open_file(name: str, opened: int) -> None:
    Path(name).read_bytes()


def test_an_actor_that_does_not_see_all_does_nothing(actors, tmp_path: Path) -> None:
    cluster = Standin(lambda actor, call: False)
    made = actors(cluster, refuse)  # what it would open is not opened
    for file in tmp_path.iterdir():
        file.write_text("of another folder")
    with pytest.raises(UserError, match=r"is not the folder of the command.*take the node out of the cluster"):
        list(made.in_order([abs]))


def test_a_piece_that_kills_every_process_is_given_up(actors) -> None:
    cluster = Standin(lambda actor, call: call > 1)
    with pytest.raises(UserError, match=f"died {LOSSES + 1} times at the same piece"):
        list(actors(cluster).in_order([abs]))
    assert cluster.started <= LOSSES + ACTORS + 1


def test_a_cluster_without_room_is_told(actors) -> None:
    with pytest.raises(UserError, match="no node of the cluster is left with 0 GPUs and 1 cores for a model"):
        list(actors(Standin(lambda actor, call: False, has_room=False)).in_order([abs]))


@pytest.mark.parametrize(
    ("nodes", "workers", "shape"),
    [
        ([{"CPU": 8}, {"CPU": 4}], None, Shape(2, 4, 0)),
        ([{"CPU": 8}, {"CPU": 4}], 4, Shape(4, 2, 0)),
        ([{"CPU": 8}, {"CPU": 4}], 1, Shape(1, 4, 0)),
        ([{"CPU": 8}, {"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 4}], None, Shape(12, 1, 1)),
        ([{"CPU": 8}, {"CPU": 64, "GPU": 8}], 2, Shape(2, 1, 1)),
        ([{"CPU": 8}, {"CPU": 64, "GPU": 8}], 9, "--ray-workers 9: the cluster has 8 GPUs, and each model takes one"),
        ([{"CPU": 2}], 3, "--ray-workers 3: the cluster has 2 CPUs"),
    ],
)
def test_a_model_takes_a_gpu_or_the_cores_of_a_node(nodes, workers, shape) -> None:
    cluster = object.__new__(RayCluster)
    cluster.ray = types.SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes],
        cluster_resources=lambda: {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")},
    )
    cluster._needs = "GPU" if any("GPU" in node for node in nodes) else "CPU"
    if isinstance(shape, str):
        with pytest.raises(UserError, match=shape):
            cluster.shape(workers)
    else:
        assert cluster.shape(workers) == shape and cluster.holds(shape)
        assert not cluster.holds(Shape(1, 100, shape.gpus))


def test_another_folder_of_the_same_name_is_not_the_commands(tmp_path: Path) -> None:
    """On a node that does not share it; what is there is told apart by the token in it."""
    token, other = tmp_path / "shared" / "token", tmp_path / "other" / "token"
    for path in (token, other):
        path.parent.mkdir()
        path.write_text(path.parent.name)

    def problems(path: Path, text: str) -> list[str]:
        return ray_cluster.unseen(pickle.dumps(({}, (str(path), text))))

    assert problems(token, "shared") == []
    for path in (other, tmp_path / "none" / "token"):
        (problem,) = problems(path, "shared")
        assert f"{path.parent} is not the folder of the command" in problem
    assert [path.name for path in token.parent.iterdir()] == ["token"], "the probe is gone"
