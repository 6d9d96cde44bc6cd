"""The nodes of a job hear of each other, so that one that is cut off ends the job and does not leave it hanging.

A collective over a dead network waits for torch's timeout, an hour here, without a word.  So the launchers of the nodes
keep a connection each to that of node 0, on the port behind MASTER_PORT, and say a byte every few seconds.  Where that
port cannot be reached nothing is watched, and nothing is worse than without.
"""

import contextlib
import socket
import threading
import time

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0  # after which a node counts as lost
BEAT, FAREWELL, FAILURE = b".", b"q", b"!"


class Heartbeat:
    """lost: why the job cannot go on, once it cannot; else None."""

    def __init__(self, node_rank: int, nodes: int, address: str, port: int) -> None:
        """address, port: of node 0; nothing is watched where there is one node."""
        self.lost: str | None = None
        self._rank, self._nodes = node_rank, nodes
        self._closing = threading.Event()
        self._peers: dict[int, socket.socket] = {}
        self._listener: socket.socket | None = None
        if nodes > 1:
            work = self._listen if node_rank == 0 else self._connect
            threading.Thread(target=work, args=(address, port), daemon=True).start()

    def close(self, failed: bool) -> None:
        """This node ends.  failed: and the job with it, which the others are told, with the reason that it knows."""
        self._closing.set()
        why = self.lost or f"node {self._rank} has failed; its own output says why"
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.sendall(FAILURE + why.encode() if failed else FAREWELL)
                peer.close()
        if self._listener is not None:
            self._listener.close()

    # ---------------------------------------------------------------- node 0

    def _listen(self, _: str, port: int) -> None:
        with contextlib.suppress(OSError):
            self._listener = socket.create_server(("", port), reuse_port=False)
            while not self._closing.is_set():
                peer, _ = self._listener.accept()
                threading.Thread(target=self._welcome, args=(peer,), daemon=True).start()

    def _welcome(self, peer: socket.socket) -> None:
        peer.settimeout(SILENCE_SECONDS)
        with contextlib.suppress(OSError, ValueError):
            rank = int(peer.recv(16))  # a stranger says something else
            if 0 < rank < self._nodes:
                peer.sendall(BEAT)
                self._watch(rank, peer)

    # ---------------------------------------------------------------- the others

    def _connect(self, address: str, port: int) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(OSError):
                peer = socket.create_connection((address, port), timeout=SILENCE_SECONDS)
                peer.sendall(str(self._rank).encode())
                if peer.recv(1) == BEAT:
                    self._watch(0, peer)
                    return
            time.sleep(BEAT_SECONDS / 5)

    # ---------------------------------------------------------------- both

    def _watch(self, rank: int, peer: socket.socket) -> None:
        """Say and hear a byte every BEAT_SECONDS until one of the two says farewell."""
        self._peers[rank] = peer
        threading.Thread(target=self._beat, args=(peer,), daemon=True).start()
        peer.settimeout(SILENCE_SECONDS)
        heard = BEAT
        try:
            while heard and heard[-1:] == BEAT:
                heard = peer.recv(1024)
        except TimeoutError:
            self._lose(f"node {rank} has not been heard of for {SILENCE_SECONDS:.0f} s: it, or its network, is gone")
            return
        except OSError:
            heard = b""
        if FAILURE in heard:
            self._lose(heard.partition(FAILURE)[2].decode())
        elif not heard:
            self._lose(f"node {rank} has gone without a word: its launcher was killed, or the machine is down")

    def _beat(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._closing.wait(BEAT_SECONDS):
                peer.sendall(BEAT)

    def _lose(self, why: str) -> None:
        if not self._closing.is_set() and self.lost is None:
            self.lost = why
