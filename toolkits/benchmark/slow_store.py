"""A folder as a bucket of S3 that answers late: what the benchmark of the loader reads from.

    python toolkits/benchmark/slow_store.py FOLDER [--latency-ms 30] [--mb-per-s 200]

It knows what a loader asks for (a listing, objects and ranges of them) and nothing else: no writing, no credentials,
this machine alone.  It works little itself, so that on a machine of few cores the loader is measured and not the store;
faults and the rest of S3 are what tests/object_store.py is for.  The port is the first line printed.
"""

import argparse
import asyncio
import os
import re
import sys
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
_RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d+)", re.IGNORECASE)
_DATE = "Sun, 01 Jan 2023 00:00:00 GMT"


def listing(folder: Path, prefix: str) -> bytes:
    """All objects whose names begin so, as ListObjectsV2 tells them; one page, however many there are."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.startswith(prefix):
            found.append(
                f"<Contents><Key>{escape(name)}</Key><LastModified>2023-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;0&quot;</ETag><Size>{path.stat().st_size}</Size></Contents>"
            )
    return (
        f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        f"<KeyCount>{len(found)}</KeyCount>{''.join(found)}</ListBucketResult>"
    ).encode()


def answer(folder: Path, head: bytes) -> tuple[bytes, bytes]:
    """(head, body) of the response to a request."""
    method, target, _ = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    url = urlsplit(target)
    _, bucket, *rest = unquote(url.path).split("/", 2)
    key, query = (rest or [""])[0], parse_qs(url.query)
    path = (folder / key).resolve()
    if method not in ("GET", "HEAD") or bucket != BUCKET or not path.is_relative_to(folder):
        return _head("403 Forbidden", 0), b""
    if not key:
        body = listing(folder, query.get("prefix", [""])[0])
        return _head("200 OK", len(body), "Content-Type: application/xml\r\n"), body
    if not path.is_file():
        body = b"" if method == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>"
        return _head("404 Not Found", len(body)), body
    size, asked = path.stat().st_size, _RANGE.search(head)
    if method == "HEAD":
        return _head("200 OK", size), b""
    first, last = (int(asked[1]), min(int(asked[2]), size - 1)) if asked else (0, size - 1)
    with path.open("rb", buffering=0) as file:
        body = os.pread(file.fileno(), last + 1 - first, first)
    if asked:
        return _head("206 Partial Content", len(body), f"Content-Range: bytes {first}-{last}/{size}\r\n"), body
    return _head("200 OK", len(body)), body


def _head(status: str, length: int, more: str = "") -> bytes:
    common = f'ETag: "0"\r\nLast-Modified: {_DATE}\r\nAccept-Ranges: bytes\r\n'
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{common}{more}\r\n".encode()


async def serve(
    folder: Path, latency_s: float, bytes_per_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """The requests of one connection, one after the other."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(latency_s)
            first, body = answer(folder, head)
            if bytes_per_s:
                await asyncio.sleep(len(body) / bytes_per_s)
            writer.write(first + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def run(folder: Path, latency_s: float, bytes_per_s: float) -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(partial(serve, folder, latency_s, bytes_per_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--latency-ms", type=float, default=30, help="before each response")
    parser.add_argument("--mb-per-s", type=float, default=0, help="of each connection; 0: as fast as it goes")
    given = parser.parse_args()
    if not given.folder.is_dir():
        print(f"error: FOLDER is {given.folder}, which is no folder; name the one to be served", file=sys.stderr)
        return 2
    asyncio.run(run(given.folder.resolve(), given.latency_ms / 1e3, given.mb_per_s * 1e6))
    return 0


if __name__ == "__main__":
    sys.exit(main())
