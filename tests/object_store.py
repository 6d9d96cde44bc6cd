"""A real S3 server (moto's) in a process of its own, and a TCP proxy before it that makes a network's faults.

Processes that are tested talk to the proxy; it knows nothing of S3 but where a request ends.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.package_cache import kept, pip

KEY, SECRET = "AKIAEXAMPLEOFTESTS", "secret-of-the-tests-0123456789"
BUCKET = "training-data"
# What moto's server needs for S3 beside requirements.txt, whose botocore it takes.
PACKAGES = (
    *("moto==5.2.5", "Flask==3.1.3", "blinker==1.9.0", "itsdangerous==2.2.0", "flask-cors==6.0.5"),
    *("requests==2.34.2", "certifi==2026.10.19.post1", "charset-normalizer==3.5.3", "responses==0.26.3"),
    *("xmltodict==1.0.4", "py-partiql-parser==0.6.3", "cryptography==50.0.2"),
)
START_S = 60.0
REFUSED = b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"


def moto() -> Path:
    """Folder for PYTHONPATH; skips where the packages cannot be had."""

    def fill(folder: Path) -> None:
        pip("install", "--only-binary", ":all:", "--target", str(folder), *PACKAGES)

    try:
        return kept(PACKAGES[0], fill)
    except FileNotFoundError as error:
        pytest.skip(f"moto cannot be installed: {error}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Faults:
    """What the proxy does to requests; may be changed at any time, from any thread."""

    latency_s: float = 0.0  # before each request is passed on
    answer: bytes = b""  # of every request, as b"503 Service Unavailable"; b"": the store's
    every: int = 1  # of the requests that match, each how-manieth is answered so or cut
    matching: bytes = b""  # in the request line or headers
    cut_after: int = 0  # bytes of a response, headers included, after which the connection ends; 0: whole
    requests: int = 0  # seen so far
    struck: int = 0  # requests that a fault has met
    together: int = 0  # requests that are under way
    most_together: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def strikes(self, head: bytes) -> bool:
        """Is this request met by the fault?"""
        with self.lock:
            self.requests += 1
            if not (self.answer or self.cut_after) or self.matching not in head or self.requests % self.every:
                return False
            self.struck += 1
            return True


class Proxy:
    """Listens on a port of its own; each connection has a thread."""

    def __init__(self, target: int) -> None:
        self.faults, self._target = Faults(), target
        self.port = free_port()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.up()

    def up(self) -> None:
        """Take connections."""
        if self._listener is not None:
            return
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and cut those that are open, in the middle of whatever they do."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def down_for(self, seconds: float) -> Iterator[None]:
        """Down within the block, but no longer than that: who waits for ever is seen."""
        self.down()
        timer = threading.Timer(seconds, self.up)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.up()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Requests of one connection, one after the other, each passed on over a connection of its own."""
        self._open.add(client)
        try:
            with client:
                while request := _read_request(client):
                    self._pass_on(client, request)
        except OSError:
            pass
        finally:
            self._open.discard(client)

    def _pass_on(self, client: socket.socket, request: bytes) -> None:
        faults = self.faults
        with faults.lock:
            faults.together += 1
            faults.most_together = max(faults.most_together, faults.together)
        try:
            self._answer(client, request)
        finally:
            with faults.lock:
                faults.together -= 1

    def _answer(self, client: socket.socket, request: bytes) -> None:
        faults = self.faults
        head = request.partition(b"\r\n\r\n")[0]
        if faults.latency_s:
            time.sleep(faults.latency_s)
        struck = faults.strikes(head)
        if struck and faults.answer:
            body = b"<Error><Code>%s</Code></Error>" % faults.answer.partition(b" ")[2].replace(b" ", b"")
            client.sendall(REFUSED % (faults.answer, len(body), body))
            raise ConnectionAbortedError
        with socket.create_connection(("127.0.0.1", self._target)) as store:
            self._open.add(store)
            try:
                store.sendall(_closing(request))
                left = faults.cut_after if struck else sys.maxsize
                while data := store.recv(1 << 16):
                    client.sendall(data[:left])
                    left -= len(data)
                    if left <= 0:
                        raise ConnectionAbortedError
            finally:
                self._open.discard(store)
        raise ConnectionAbortedError  # the store closes after its answer, and so does this


def _closing(request: bytes) -> bytes:
    """Asks the store to close after its answer, whose end needs not be looked for then.  Not a signed header."""
    line, _, rest = request.partition(b"\r\n")
    return line + b"\r\nConnection: close\r\n" + rest


def _read_request(client: socket.socket) -> bytes:
    """A request with its body; b"" at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (found := client.recv(1 << 16)):
            return b""
        data += found
    head, _, body = data.partition(b"\r\n\r\n")
    sizes = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    if b"expect: 100-continue" in head.lower():
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    while sizes and len(body) < int(sizes[0]):
        if not (found := client.recv(1 << 16)):
            return b""
        data += found
        body += found
    return data


class Store:
    """moto's server behind a proxy, with one bucket, its profile `store`, and who may use them."""

    bucket = BUCKET

    def __init__(self, folder: Path) -> None:
        self._folder, self._packages = folder, moto()
        self.config = folder / "msc.yaml"
        self._port = free_port()
        self._server: subprocess.Popen | None = None
        self.start()
        self.proxy = Proxy(self._port)
        self.faults = self.proxy.faults
        self.config.write_text(
            f"""profiles:
  store:
    storage_provider:
      type: s3
      options: {{base_path: {BUCKET}, endpoint_url: "http://127.0.0.1:{self.proxy.port}", region_name: us-east-1}}
    credentials_provider:
      type: S3Credentials
      options: {{access_key: "${{STORE_KEY}}", secret_key: "${{STORE_SECRET}}"}}
"""
        )
        self.environment = {
            **{"MSC_CONFIG": str(self.config), "STORE_KEY": KEY, "STORE_SECRET": SECRET},
            **{"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"},
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Begin to serve; what was stored in an earlier process is gone, as moto keeps it in memory."""
        environment = os.environ | {"PYTHONPATH": str(self._packages), "AWS_ACCESS_KEY_ID": "-"}
        code = "from moto.server import main; main()"
        line = [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(self._port)]
        with (self._folder / "moto.log").open("ab") as log:
            self._server = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self._port}/moto-api/"):
                break
            assert time.monotonic() < end and self._server.poll() is None, (self._folder / "moto.log").read_text()
            time.sleep(0.1)
        self.client = self._client()
        self.client.create_bucket(Bucket=BUCKET)

    def kill(self) -> None:
        """End the server at once."""
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()

    def close(self) -> None:
        """End everything."""
        self.proxy.down()
        self.kill()

    def _client(self):
        import boto3

        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self._port}", **keys)

    def put(self, folder: Path, prefix: str) -> None:
        """All files below a folder, hidden ones too."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                key = f"{prefix}/{file.relative_to(folder)}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())

    def get(self, key: str) -> bytes:
        """An object."""
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def names(self) -> list[str]:
        """All objects."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    @contextlib.contextmanager
    def fault(self, **changes: object) -> Iterator[Faults]:
        """The proxy's faults within the block."""
        before = {name: getattr(self.faults, name) for name in changes}
        for name, value in changes.items():
            setattr(self.faults, name, value)
        try:
            yield self.faults
        finally:
            for name, value in before.items():
                setattr(self.faults, name, value)
