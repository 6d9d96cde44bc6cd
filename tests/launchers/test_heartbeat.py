"""Two nodes hear of each other, in one process and with short times."""

import socket
import time
from collections.abc import Callable

import pytest

from megatron_patch.launch import heartbeat
from megatron_patch.launch.heartbeat import BEAT, Heartbeat

SILENCE = 0.5


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", SILENCE / 10)
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", SILENCE)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def two(port: int) -> tuple[Heartbeat, Heartbeat]:
    """Nodes 1 and 0 that have met, the former started before there was anybody to meet."""
    one = Heartbeat(1, 2, "127.0.0.1", port)
    zero = Heartbeat(0, 2, "127.0.0.1", port)
    wait_until(lambda: one._peers and zero._peers)
    return zero, one


def test_nodes_that_live_are_not_lost_and_may_end(port: int):
    zero, one = two(port)
    time.sleep(3 * SILENCE)
    assert (zero.lost, one.lost) == (None, None)
    one.close(failed=False)
    time.sleep(2 * SILENCE)
    assert zero.lost is None
    zero.close(failed=False)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_told(port: int, failing: int):
    nodes = two(port)
    nodes[failing].close(failed=True)
    other = nodes[1 - failing]
    wait_until(lambda: other.lost)
    assert other.lost == f"node {failing} has failed; its own output says why"
    other.close(failed=True)


def of_a_stranger(port: int) -> tuple[Heartbeat, socket.socket]:
    """Node 0, and a connection that says it is node 1 and has been believed."""
    zero = Heartbeat(0, 2, "127.0.0.1", port)
    wait_until(lambda: zero._listener)
    other = socket.create_connection(("127.0.0.1", port))
    other.sendall(b"1")
    assert other.recv(1) == BEAT
    return zero, other


def test_silence_is_a_loss(port: int):
    zero, other = of_a_stranger(port)
    wait_until(lambda: zero.lost)
    assert zero.lost.startswith("node 1 has not been heard of for ")
    other.close()
    zero.close(failed=True)


def test_an_end_without_a_word_is_a_loss(port: int):
    zero, other = of_a_stranger(port)
    other.close()
    wait_until(lambda: zero.lost)
    assert zero.lost == "node 1 has gone without a word: its launcher was killed, or the machine is down"
    zero.close(failed=True)


def test_a_port_that_others_have_is_no_error(port: int):
    with socket.create_server(("", port)):
        zero = Heartbeat(0, 2, "127.0.0.1", port)
        time.sleep(SILENCE)
        assert zero.lost is None
        zero.close(failed=False)
