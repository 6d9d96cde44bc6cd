"""Whole shards, written by the nodes of an existing Ray cluster, as workers.py has them written by processes.

The command itself streams the records, deals them and keeps the journal.  A node looks for what it must see once more
whenever a shard has images or videos that are missing: a node without the mount must not reject records.

Any node but the command's own may die: Ray gives its shards to others, which write the same bytes.
"""

import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from megatron_patch.atomic_files import sync
from megatron_patch.data.preparation.workers import Done, Job, ShardBuilder, WorkersLost
from megatron_patch.ray_cluster import LOSSES, RayCluster, SharedFolder, Token, named, unseen
from megatron_patch.sight import Sight

MISSING = ("image missing", "image unreadable", "video missing", "video unreadable")


def ray_workers(cluster: RayCluster, at_once: int | None) -> "Callable[[ShardBuilder], RayWorkers]":
    """What makes workers of a shard builder; at_once: shards at work or waiting, None: two for each core."""
    return lambda maker: RayWorkers(cluster, at_once or max(2, 2 * cluster.cores()), maker)


class RayWorkers:
    """As workers.Workers.  Raises UserError when a node does not see the folder in which the shards grow."""

    def __init__(self, cluster: RayCluster, at_once: int, maker: ShardBuilder) -> None:
        self.at_once = at_once
        self._folder = SharedFolder(cluster, maker.folder / f"ray.part-{os.urandom(8).hex()}")
        self._setup = pickle.dumps((maker, cluster.seen, self._folder.token))
        self._make = cluster.call.options(num_cpus=1, max_retries=LOSSES).remote

    def submit(self, job: Job) -> "Future[Any]":
        """Begin a job."""
        return self._make(__name__, "make", self._setup, pickle.dumps(job)).future()

    def result(self, begun: "Future[Any]") -> Done:
        """Wait for a job.  Raises OSError when its shard could not be written, UserError when it was lost for good."""
        from ray.exceptions import RayError, RayTaskError

        try:
            found = begun.result()
        except RayTaskError:
            raise  # a fault of this program
        except RayError as error:
            raise WorkersLost(
                f"the Ray cluster gave a shard up: {' '.join(str(error).split())[:300]}; give --resume to go on"
            ) from error
        if isinstance(found, OSError):
            raise found
        if isinstance(found, str):
            raise WorkersLost(f"{found}; mount it, or take the node out of the cluster, and give --resume to go on")
        return found

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()


# ------------------------------------------------------------------------------------------------ on the nodes


_setups: dict[bytes, tuple[ShardBuilder, Sight, Token]] = {}  # of this process: the one in use, unpickled


def make(setup: bytes, job: bytes) -> Done | OSError | str:
    """Make a pickled Job: what became of it, why it could not be written, or why this node cannot be trusted.

    setup: pickled (shard builder, files seen, token of its folder).
    """
    is_new = setup not in _setups
    maker, seen, token = pickle.loads(setup) if is_new else _setups[setup]
    sight = pickle.dumps((seen, token))
    if is_new and (problems := unseen(sight)):
        return named(problems)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    _setups.clear()
    _setups[setup] = (maker, seen, token)
    wanted = pickle.loads(job)
    try:
        done = maker.make(wanted)
        if done.written:
            sync(maker.folder / f"{wanted.name}.idx")  # this node may be gone when the folder is finished
    except OSError as error:
        return error
    lacking = any(rejection.reason in MISSING for rejection in done.rejected)
    if lacking and (problems := unseen(sight)):
        return named(problems)
    return done
