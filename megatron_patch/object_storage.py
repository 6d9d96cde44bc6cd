"""Folders in object storage: `msc://PROFILE/FOLDER` and `s3://BUCKET/FOLDER`, through multi-storage-client (MSC).

A profile stands in MSC's own file (~/.msc_config.yaml, or the one that MSC_CONFIG names); an s3:// URL is read with
what boto3 finds by itself: AWS_ACCESS_KEY_ID and its like, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_REGION, the machine's
role.  Neither is ever part of a message here, and MSC's own, which may quote its file, are not shown.

What may pass (no connection, 5xx, too many requests, a body cut short) is asked for again for PATIENCE_S.  What will
not, or has not, is a StorageError.

The launchers, which import nothing that takes time, know URLs by this file; what a request needs is imported by it.
"""

import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE_S = 20 * 60  # of a run; the other ranks wait for an hour (--distributed-timeout-minutes)
PATIENCE_AT_START_S = 30  # of a look before anything is started: an address may simply be wrong
DELAY_S, LONGEST_DELAY_S = 0.5, 15.0  # between two requests for the same; doubled each time
TOLD_EVERY_S = 60.0  # an outage is said once a minute and process, however many requests it meets
AT_ONCE = 16  # requests of a process that are under way together
URL = re.compile(r"(msc|s3)://([^/@?#\s]+)(/[^?#]*)?")


class StorageError(Exception):
    """Object storage did not give what was asked for.  Neither an OSError nor a ValueError: no record is to blame."""


class Absent(StorageError):
    """There is no such object."""


# ---------------------------------------------------------------- URLs


def is_url(path: str) -> bool:
    """Does this name something in object storage?"""
    return path.startswith(("msc://", "s3://"))


def url_problem(url: str) -> str | None:
    """Why this is no URL that can be read here; the network is not asked."""
    if URL.fullmatch(url):
        return None
    if is_url(url) and ("@" in url.split("/")[2] or "?" in url):
        return "credentials are no part of the URL: they come from the environment or MSC's profile"
    return "wanted msc://PROFILE/FOLDER or s3://BUCKET/FOLDER"


def without_credentials(text: str) -> str:
    """A value as it may be shown: what stands before an @ of a URL, or behind its question mark, is left out."""
    if not is_url(text):
        return text
    scheme, _, rest = text.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def join(folder: str, name: str) -> str:
    """`name` as seen from a folder in object storage; a URL stays what it is.  `..` leads no higher than the bucket."""
    if is_url(name):
        return name
    scheme, _, rest = folder.partition("://")
    root, _, path = rest.partition("/")
    return f"{scheme}://{root}{posixpath.normpath(posixpath.join('/', path, name))}"


# ---------------------------------------------------------------- folders


class ObjectFolder:
    """What lies below a URL.  Holds no connection, so that it may be forked, sent to a process and used by threads."""

    def __init__(self, url: str) -> None:
        if (problem := url_problem(url)) is not None:
            raise StorageError(f"{without_credentials(url)}: {problem}")
        self.url = url.rstrip("/")

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """An object, or `size` bytes of it, which it must have.  Raises StorageError, Absent where there is none."""
        if size == 0:
            return b""

        def ask(client: Any, place: str) -> bytes:
            from multistorageclient.types import Range

            data = client.read(place, byte_range=None if size is None else Range(offset=start, size=size))
            if size is not None and len(data) != size:
                raise ConnectionError(f"{len(data)} of {size} bytes")
            return data

        return self._ask(name, ask)

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of all objects below, by one listing.  Raises StorageError."""

        def ask(client: Any, place: str) -> dict[str, int]:
            inside = f"{place}/" if place else ""
            return {found.key.removeprefix(inside): found.content_length for found in client.list(inside)}

        return self._ask("", ask)

    def write(self, name: str, data: bytes) -> None:
        """Put an object in one request: it is there whole, or what was there before.  Raises StorageError."""
        self._ask(name, lambda client, place: client.write(place, data))

    def upload(self, name: str, file: Path) -> None:
        """Put a file of any size, which becomes an object when all of it is there.  Raises StorageError."""
        self._ask(name, lambda client, place: client.upload_file(place, str(file)))

    def _ask(self, name: str, ask: Callable[[Any, str], Any]) -> Any:
        """ask(client, place below its profile), again while it fails for what may pass."""
        where = f"{self.url}/{name}" if name else self.url
        began, parent, delay = time.monotonic(), os.getppid(), DELAY_S
        while True:
            client, base = _client(self.url)
            try:
                found = ask(client, "/".join(filter(None, (base, name))))
            except Exception as error:
                # `from None`: the message of a library is not ours to show
                if (lasting := _lasting(error)) is not None:
                    kind = Absent if isinstance(error, FileNotFoundError) and lasting == ABSENT else StorageError
                    raise kind(f"{where}: {lasting}") from None
                waited = time.monotonic() - began
                if waited + delay > _patience_s or os.getppid() != parent:  # nobody waits for a loader's orphan
                    raise StorageError(f"{where}: no answer for {waited:.0f} s ({_passing(error)})") from None
                _tell(where, _passing(error))
                time.sleep(delay * _share())
                delay = min(2 * delay, LONGEST_DELAY_S)
                continue
            return found


_patience_s: float = PATIENCE_S
_told = -TOLD_EVERY_S


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within the block this process gives up sooner."""
    global _patience_s
    before, _patience_s = _patience_s, seconds
    try:
        yield
    finally:
        _patience_s = before


def _share() -> float:
    """From 1/2 to 1, at random: so that not all processes ask at once."""
    return 0.5 + int.from_bytes(os.urandom(2), "big") / 2**17


def _tell(where: str, reason: str) -> None:
    global _told
    import logging

    now = time.monotonic()
    if now - _told >= TOLD_EVERY_S:
        _told = now
        logging.getLogger(__name__).warning("%s: %s; asking again for up to %.0f s", where, reason, _patience_s)


# ---------------------------------------------------------------- what went wrong

ABSENT = "there is no such object"
NO_CREDENTIALS = "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give MSC's profile some"
OF_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}
TOO_MANY, TIMED_OUT = 429, 408


def _client(url: str) -> tuple[Any, str]:
    """MSC's client for a URL, and the place of the URL in it.  MSC keeps one per profile and process."""
    try:
        import multistorageclient as msc
    except ImportError as error:
        raise StorageError(f"{url}: needs the package {error.name}; run examples/setup_environment.sh") from None
    import logging

    logging.getLogger("multistorageclient").setLevel(logging.CRITICAL)  # it would say every failure, twice
    try:
        return msc.resolve_storage_client(url)
    except Exception as error:
        raise StorageError(f"{url}: {_of_configuration(url, error)}") from None


def _of_configuration(url: str, error: Exception) -> str:
    """What is wrong with MSC's file, without a word of it but names."""
    text = str(error)
    if "not found in configuration" in text:
        profile = url.split("/")[2]
        return (
            f"MSC has no profile {profile!r}; add it to ~/.msc_config.yaml, or name the file that has it in MSC_CONFIG"
        )
    if "Unresolved environment variables" in text:
        names = re.findall(r"\$\{?(\w+)", text.partition("]")[0])
        return f"MSC's configuration names {', '.join(names)}, which the environment has not; set it"
    if isinstance(error, ImportError):
        return f"its storage needs the package {error.name}; install it"
    detail = getattr(error.args[-1], "json_path", "") if error.args else ""
    kind = type(error).__name__
    return f"MSC's configuration cannot be used ({kind}{' at ' + detail if detail else ''}); see MSC's documentation"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answer(error: Exception) -> tuple[int, str]:
    """(HTTP status, S3's code) of what the store answered; (0, "") where it did not."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)  # of botocore's ClientError
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
    return 0, ""


def _lasting(error: Exception) -> str | None:
    """What is wrong and will stay so; None: it may pass."""
    status, code = _answer(error)
    if code == "NoSuchBucket":
        return "there is no such bucket"
    if isinstance(error, FileNotFoundError):
        return ABSENT
    if isinstance(error, PermissionError) or status in (401, 403):
        of_store = f" ({status} {code})" if status else ""
        return f"access is denied{of_store}; look at the credentials and at what they may read"
    if any(type(cause).__name__ in OF_CREDENTIALS for cause in _causes(error)):
        return NO_CREDENTIALS
    if isinstance(error, NotImplementedError | TypeError | AttributeError):
        return f"cannot be asked for here ({type(error).__name__})"
    if 300 <= status < 500 and status not in (TIMED_OUT, TOO_MANY) and not code.startswith("RequestTimeout"):
        return f"the store refuses the request ({status} {code})"
    return None


def _passing(error: Exception) -> str:
    """A few words about what may pass."""
    status, code = _answer(error)
    if status:
        return f"{status} {code}"
    return type(list(_causes(error))[:2][-1]).__name__  # MSC wraps what the library says


# ---------------------------------------------------------------- several requests at once


def at_once(calls: Sequence[Callable[[], Any]], threads: int = AT_ONCE) -> list[Callable[[], Any]]:
    """Begin all calls, `threads` of them together.

    Returns, for each, a function that waits for it, and gives or raises what it did.

    The threads are daemons: a process that ends does not wait for the patience of requests that nobody needs any more.
    """
    import collections
    import threading
    from concurrent.futures import Future

    futures: list[Future] = [Future() for _ in calls]
    waiting = collections.deque(zip(futures, calls, strict=True))

    def work() -> None:
        while True:
            try:
                future, call = waiting.popleft()
            except IndexError:
                return
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

    for _ in range(min(threads, len(futures))):
        threading.Thread(target=work, daemon=True).start()
    return [future.result for future in futures]
