"""The endpoint and the page's server over HTTP, with the tiny model that the other engine tests ask."""

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_patch.data.conversation import Exchange
from megatron_patch.inference import Engine, Request, Sampling
from megatron_patch.inference.server import PAGE, LlavaServer
from tests.inference.conftest import Folders

DEFAULTS = Sampling(max_new_tokens=12)
MOST_BYTES = 200_000


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[LlavaServer]:
    with LlavaServer(("127.0.0.1", 0), engine, "tiny", DEFAULTS, MOST_BYTES) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def call(server: LlavaServer, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str, str]:
    """(status, content type, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kinds = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, data, {**kinds, **headers})
    answer = connection.getresponse()
    return answer.status, answer.headers["Content-Type"], answer.read().decode()


def ask(server: LlavaServer, body: object) -> tuple[int, dict]:
    status, kind, text = call(server, "POST", "/v1/chat/completions", body)
    assert kind == "application/json"
    return status, json.loads(text)


def data_url(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def user(text: str, *images: Path) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_an_answer(server: LlavaServer, engine: Engine, folders: Folders):
    image = folders.images / "0.png"
    status, told = ask(server, {"model": "tiny", "messages": [user("What is this?", image)]})
    (right,) = engine.answer([Request("request", (Exchange("What is this?", None),), (image,))], DEFAULTS)
    assert status == 200 and told["object"] == "chat.completion" and told["model"] == "tiny"
    assert told["choices"][0]["message"] == {"role": "assistant", "content": right.text}
    assert told["choices"][0]["finish_reason"] == right.finish_reason
    assert told["usage"] == {
        "prompt_tokens": right.prompt_tokens,
        "completion_tokens": right.completion_tokens,
        "total_tokens": right.prompt_tokens + right.completion_tokens,
    }


def test_a_conversation_with_two_images_and_a_system_sentence(server: LlavaServer, engine: Engine, folders: Folders):
    first, second = folders.images / "0.png", folders.images / "1.png"
    messages = [
        {"role": "system", "content": "Be brief."},
        user("What is this?", first),
        {"role": "assistant", "content": "A nine."},
        user("And this?", second),
    ]
    status, told = ask(server, {"messages": messages, "max_tokens": 5, "temperature": 1, "seed": 3, "top_p": 0.9})
    turns = (Exchange("<image>\nWhat is this?", "A nine."), Exchange("<image>\nAnd this?", None))
    request = Request("request", turns, (first, second), "Be brief.")
    (right,) = engine.answer([request], Sampling(5, 1.0, 0.9, 3))
    assert status == 200 and told["choices"][0]["message"]["content"] == right.text
    assert told["usage"]["completion_tokens"] == 5


def test_a_stream_joined_is_the_answer(server: LlavaServer, folders: Folders):
    body = {"messages": [user("What is this?", folders.images / "0.png")], "max_completion_tokens": 10}
    _, whole = ask(server, body)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    status, kind, text = call(server, "POST", "/v1/chat/completions", body)
    assert status == 200 and kind == "text/event-stream"
    *events, done, end = text.split("\n\n")
    assert done == "data: [DONE]" and end == ""
    events = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    *deltas, last, of_usage = events
    assert deltas[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0]["delta"]["content"] for event in deltas]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"] and len(pieces) > 3
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"
    assert of_usage["choices"] == [] and of_usage["usage"] == whole["usage"]


def test_many_at_once_get_their_own_answers(server: LlavaServer, folders: Folders):
    bodies = [{"messages": [user(f"What is {number}?", folders.images / f"{number % 4}.png")]} for number in range(8)]
    alone = [ask(server, body)[1]["choices"] for body in bodies]
    assert len({choices[0]["message"]["content"] for choices in alone}) > 1
    found: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda n=number: found.update({n: ask(server, bodies[n])[1]["choices"]}))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(8)] == alone


def test_page_models_and_health(server: LlavaServer):
    status, kind, page = call(server, "GET", "/")
    assert status == 200 and kind.startswith("text/html") and page == PAGE.read_text()
    assert "://" not in page and "src=" not in page, "the page asks others for something"
    models = json.loads(call(server, "GET", "/v1/models")[2])
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert call(server, "GET", "/health")[::2] == (200, '{"status": "ok"}\n')


HELLO = [{"role": "user", "content": "hello"}]
URL = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.org/cat.png"}}]}
NO_DATA_URL = {"type": "image_url", "image_url": {"url": "http://example.org/cat;base64,aGVsbG8="}}
BAD_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
TEXT = {"type": "text", "text": "What is this?"}
NO_BASE64 = {"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        ([], 400, "the body is list"),
        ({}, 400, "at least one message"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "user"}]}, 400, "a content is NoneType"),
        ({"messages": [{"role": "tool", "content": ""}]}, 400, "wants a role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "assistant stands where user"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "the last one must be of user"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "the last one must be of user"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "1 <image> marks, 0 images"),
        ({"messages": [{"role": "user", "content": "long " * 600}]}, 400, "wanted fewer than 512"),
        ({"messages": [URL]}, 400, "not fetched from elsewhere"),
        ({"messages": [{"role": "user", "content": [NO_DATA_URL, TEXT]}]}, 400, "not fetched from elsewhere"),
        ({"messages": [{"role": "user", "content": [BAD_IMAGE, TEXT]}]}, 400, "not an image"),
        ({"messages": [{"role": "user", "content": [NO_BASE64, TEXT]}]}, 400, "no base64"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "a part is neither"),
        ({"messages": HELLO, "model": "gpt"}, 404, "model 'gpt' is not here; wanted 'tiny'"),
        ({"messages": HELLO, "n": 2}, 400, "n is not supported"),
        ({"messages": HELLO, "stop": ["x"]}, 400, "stop is not supported"),
        ({"messages": HELLO, "beams": 2}, 400, "beams: not supported"),
        ({"messages": HELLO, "max_tokens": 0}, 400, "max_new_tokens is 0"),
        ({"messages": HELLO, "max_tokens": "5"}, 400, "max_tokens is str, wanted int"),
        ({"messages": HELLO, "temperature": True}, 400, "temperature is bool"),
        ({"messages": HELLO, "temperature": -1}, 400, "temperature is -1"),
        ({"messages": HELLO, "top_p": 0}, 400, "top_p is 0"),
        ({"messages": HELLO, "stream": "yes"}, 400, "stream is str"),
        (b" " * (MOST_BYTES + 1), 413, f"wanted at most {MOST_BYTES}"),
    ],
    ids=str,
)
def test_what_is_refused(server: LlavaServer, body: object, status: int, said: str):
    got, told = ask(server, body)
    assert got == status and said in told["error"]["message"], told
    assert set(told["error"]) == {"message", "type", "param", "code"}


def test_other_ways_of_asking_are_refused(server: LlavaServer):
    path = "/v1/chat/completions"
    for status, method, where, headers in (
        (404, "GET", "/v2", {}),
        (404, "POST", "/v1/completions", {}),
        (404, "GET", path, {}),
        (501, "PUT", path, {}),
        (415, "POST", path, {"Content-Type": "text/plain"}),  # what another site's page can send unasked
    ):
        got, kind, text = call(server, method, where, {} if method == "POST" else None, **headers)
        assert got == status and kind == "application/json" and json.loads(text)["error"]["message"]
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 411 ")


def test_a_client_that_hangs_up_stops_its_answer(server: LlavaServer, engine: Engine, monkeypatch):
    """The next one is answered at once."""
    taken = []
    original = engine._take

    def slow(row, token):
        taken.append(token)
        time.sleep(0.02)
        original(row, token)

    monkeypatch.setattr(engine, "_take", slow)
    body = json.dumps({"messages": HELLO, "stream": True, "max_tokens": 400}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        client.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        assert b"200" in client.recv(40)
    assert ask(server, {"messages": HELLO, "max_tokens": 2})[0] == 200
    assert len(taken) < 100
