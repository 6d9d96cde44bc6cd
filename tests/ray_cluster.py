"""A Ray cluster of two nodes on this machine, for the tests: prints its address, then does what stdin says.

    kill          the second node dies, without a word to the others
    add           a second node is there again
    blind FOLDER  a node joins that sees nothing in FOLDER (in a mount namespace of its own)

A line is answered by one line, once it is done; at the end of stdin everything stops.
"""

import os
import signal
import subprocess
import sys
import time
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 << 20
TRIES = 4
JOIN = (
    'mount -t tmpfs none "$0" && exec "$1" -m ray.scripts.scripts start --address="$2" --num-cpus=1 --block '
    f"--object-store-memory={OBJECT_STORE_BYTES} --disable-usage-stats"
)


def main() -> None:
    """Until stdin ends."""
    cluster = Cluster()
    add_node(cluster, include_dashboard=False)
    second = add_node(cluster)
    print(cluster.address, flush=True)
    blind = None
    for line in sys.stdin:
        word, _, folder = line.strip().partition(" ")
        if word == "kill":
            cluster.remove_node(second, allow_graceful=False)
        elif word == "add":
            second = add_node(cluster)
        elif word == "blind":
            words = ["unshare", "--mount", "sh", "-c", JOIN, folder, sys.executable, cluster.address]
            blind = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            wait_for_nodes(cluster.address, 3)
        print("done", flush=True)
    if blind is not None:
        os.killpg(blind.pid, signal.SIGKILL)
    cluster.shutdown()


def add_node(cluster: Cluster, **options: bool) -> Any:
    """One more, with a core; on a busy machine it may not be up in Ray's 30 seconds, and is tried again."""
    for attempt in range(TRIES):
        try:
            return cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, **options)
        except Exception as error:  # Ray knows no closer kind
            if "timed out during startup" not in str(error) or attempt == TRIES - 1:
                raise
    raise AssertionError("unreachable")


def wait_for_nodes(address: str, count: int) -> None:
    """Until so many are alive."""
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    deadline = time.monotonic() + 240  # on a busy machine
    while sum(node["Alive"] for node in ray.nodes()) < count:
        assert time.monotonic() < deadline, ray.nodes()
        time.sleep(0.2)
    ray.shutdown()


if __name__ == "__main__":
    main()
