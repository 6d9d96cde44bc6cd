"""An endpoint like OpenAI's over one engine, and a web page: python's own http.server, a thread per connection.

    GET  /                      the page
    GET  /health                {"status": "ok"}
    GET  /v1/models             the one model
    POST /v1/chat/completions   messages with texts and images (data: URLs) -> an answer, or with `stream` its pieces

The model answers one request after the other.  What would change an answer and is not known here is refused.
"""

import base64
import binascii
import json
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_patch.data.conversation import IMAGE_MARK, Exchange
from megatron_patch.errors import UserError
from megatron_patch.inference.interface import Answer, Engine, Prompt, Request, Sampling
from megatron_patch.launch.asking import REQUEST_MB

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = REQUEST_MB << 20  # of a request
READ_TIMEOUT_S = 60
# Everything is in the page itself; it may ask this server and nobody else.
PAGE_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"} | {
    *("temperature", "top_p", "seed", "user", "metadata", "store")
}
# Fields that may be given as long as they ask for nothing.
IDLE_VALUES = {
    "n": (None, 1),
    "stop": (None, [], ""),
    "tools": (None, []),
    "logprobs": (None, False),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
}


class HttpError(Exception):
    """A request that gets no answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A request of /v1/chat/completions, read."""

    prompt: Prompt
    sampling: Sampling
    stream: bool
    with_usage: bool  # at the end of the stream


class LlavaServer(ThreadingHTTPServer):
    """Serves one engine under one name; `defaults` holds what a request leaves open.

    Raises OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, address: tuple[str, int], engine: Engine, model: str, defaults: Sampling, most_bytes: int = MOST_BYTES
    ) -> None:
        super().__init__(address, Handler)
        self.engine, self.model, self.defaults, self.most_bytes = engine, model, defaults, most_bytes
        self.busy = threading.Lock()
        self.began = int(time.time())

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        """Clients that hang up are none; the rest is shown as it is."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def read(self, body: Any) -> Completion:
        """The JSON of a request.  Raises HttpError and UserError."""
        if not isinstance(body, dict):
            raise UserError(f"the body is {type(body).__name__}, wanted a JSON object")
        for name, idle in IDLE_VALUES.items():
            if body.get(name) not in idle:
                raise UserError(f"{name} is not supported here; leave it out")
        if unknown := sorted(body.keys() - KNOWN - IDLE_VALUES.keys()):
            raise UserError(f"{', '.join(unknown)}: not supported here; leave out")
        if (asked := field(body, "model", str)) not in (None, self.model):
            raise HttpError(HTTPStatus.NOT_FOUND, f"model {asked!r} is not here; wanted {self.model!r}")
        options = field(body, "stream_options", dict) or {}
        return Completion(
            self.engine.prepare(read_messages(body.get("messages"))),
            self._sampling(body),
            field(body, "stream", bool) or False,
            field(options, "include_usage", bool) or False,
        )

    def _sampling(self, body: dict[str, Any]) -> Sampling:
        defaults = self.defaults

        def number(name: str, kind: type, otherwise: Any) -> Any:
            value = field(body, name, (int, float) if kind is float else int)
            return otherwise if value is None else kind(value)

        temperature = number("temperature", float, defaults.temperature)
        return Sampling(
            max_new_tokens=number("max_completion_tokens", int, number("max_tokens", int, defaults.max_new_tokens)),
            temperature=temperature,
            top_p=number("top_p", float, defaults.top_p),
            seed=number("seed", int, secrets.randbits(31) if temperature else defaults.seed),
        )


def field(values: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """The value of a field; None where it is absent or null.  Raises UserError: it is of another type."""
    value = values.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
        return value
    raise UserError(f"{name} is {type(value).__name__}, wanted {' or '.join(one.__name__ for one in kinds)}")


def read_messages(messages: Any) -> Request:
    """OpenAI's messages -> the conversation: system at most once and first, then user and assistant in turns.

    Raises:
        UserError: they are no such conversation, or an image is not in the request itself.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: wanted a list with at least one message")
    images: list[bytes] = []
    texts = [_read_message(message, images) for message in messages]
    system = texts.pop(0)[1] if texts[0][0] == "system" else None
    for number, (role, _) in enumerate(texts):
        if role != ("user", "assistant")[number % 2]:
            raise UserError(f"messages: {role} stands where {('user', 'assistant')[number % 2]} was wanted")
    if len(texts) % 2 == 0:
        raise UserError("messages: the last one must be of user")
    said = [text for _, text in texts]
    turns = tuple(Exchange(*turn) for turn in zip(said[::2], [*said[1::2], None], strict=True))
    return Request("request", turns, tuple(images), system)


def _read_message(message: Any, images: list[bytes]) -> tuple[str, str]:
    """(role, text with a mark for each image); the images are put behind `images`."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise UserError("messages: each wants a role, one of system, user and assistant, and a content")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return role, content
    if not isinstance(content, list):
        raise UserError(f"messages: a content is {type(content).__name__}, wanted a text or a list of parts")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image_url" and role == "user":
            url = part.get("image_url")
            images.append(_read_data_url(url.get("url") if isinstance(url, dict) else url))
            pieces.append(IMAGE_MARK)
        else:
            raise UserError("messages: a part is neither {type: text, text} nor, of user, {type: image_url, image_url}")
    return role, "\n".join(pieces)


def _read_data_url(url: Any) -> bytes:
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise UserError("image_url: wanted data:image/...;base64,... ; images are not fetched from elsewhere")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise UserError(f"image_url: is no base64 ({error})") from None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: LlavaServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "llava", ""
    timeout = READ_TIMEOUT_S

    def do_GET(self) -> None:
        """The page and what is served."""
        path = self.path.partition("?")[0]
        if path == "/":
            page = PAGE.read_bytes()
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8", {"Content-Security-Policy": PAGE_POLICY})
        elif path == "/health":
            self._send_json(HTTPStatus.OK, {"status": "ok"})
        elif path == "/v1/models":
            model = {"id": self.server.model, "object": "model", "created": self.server.began, "owned_by": "local"}
            self._send_json(HTTPStatus.OK, {"object": "list", "data": [model]})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"{path}: not here; wanted /, /health, /v1/models, /v1/chat/completions")

    def do_POST(self) -> None:
        """A completion."""
        try:
            completion = self.server.read(self._body())
        except HttpError as error:
            self._refuse(error.status, str(error))
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        else:
            if completion.stream:
                self._stream(completion)
            else:
                self._answer(completion)

    def _body(self) -> Any:
        """The JSON of the request.  Raises HttpError and UserError."""
        path = self.path.partition("?")[0]
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise HttpError(HTTPStatus.LENGTH_REQUIRED, "wanted a body with Content-Length")
        if int(length) > self.server.most_bytes:
            raise HttpError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request has {length} bytes, wanted at most {self.server.most_bytes}; send smaller images",
            )
        data = self.rfile.read(int(length))
        if path != "/v1/chat/completions":
            raise HttpError(HTTPStatus.NOT_FOUND, f"{path}: not here; wanted /v1/chat/completions")
        # What a page of another site can send without the browser asking here first is of other types.
        if self.headers.get_content_type() != "application/json":
            raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "wanted Content-Type: application/json")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the body is no JSON: {error}") from None

    def _answer(self, completion: Completion) -> None:
        try:
            with self.server.busy:
                (answer,) = self.server.engine.answer([completion.prompt], completion.sampling)
        except Exception as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}", "server_error")
            raise  # is shown where the server runs
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        head = self._head("chat.completion")
        self._send_json(HTTPStatus.OK, head | {"choices": [choice], "usage": usage(answer)})

    def _stream(self, completion: Completion) -> None:
        """Server-sent events; the connection ends with them."""
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        for name, value in {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        head = self._head("chat.completion.chunk")

        def tell(delta: dict[str, str], reason: str | None = None) -> None:
            self._event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

        with self.server.busy:
            pieces = self.server.engine.stream(completion.prompt, completion.sampling)
            try:
                tell({"role": "assistant", "content": ""})
                while True:
                    try:
                        tell({"content": next(pieces)})
                    except StopIteration as end:
                        answer: Answer = end.value
                        break
            finally:
                pieces.close()  # a client that has hung up stops the computation
        tell({}, answer.finish_reason)
        if completion.with_usage:
            self._event(head | {"choices": [], "usage": usage(answer)})
        self._write(b"data: [DONE]\n\n")

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{secrets.token_hex(12)}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.server.model}

    def _event(self, value: dict[str, Any]) -> None:
        self._write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _send_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode() + b"\n", "application/json", {})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, as JSON too."""
        del explain
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _refuse(self, status: HTTPStatus, message: str, kind: str = "invalid_request_error") -> None:
        self.close_connection = True  # of its body some may not have been read
        error = {"message": message, "type": kind, "param": None, "code": None}
        self._send_json(status, {"error": error})

    def _send(self, status: HTTPStatus, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = headers | {"Content-Type": kind, "Content-Length": str(len(data))}
        headers["X-Content-Type-Options"] = "nosniff"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self._write(data)


def usage(answer: Answer) -> dict[str, int]:
    """Tokens of one answer, as OpenAI counts."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
