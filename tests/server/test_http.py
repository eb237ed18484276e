"""What comes over the wire that no client library would send: each gets its status, in OpenAI's shape, in time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from support.serving import Server
from support.wire import error_of, head, told, wire

CHAT = "/v1/chat/completions"
JSON_ROUTES = (CHAT, "/v1/completions", "/tokenize", "/detokenize")


@pytest.fixture(autouse=True)
def _nothing_left(narrow: Server) -> Iterator[None]:
    """Whatever was sent: a sane call is served after it, and nothing of it is left."""
    yield
    with narrow.http() as client:
        reply = client.post("/tokenize", json={"prompt": "still here"})
    assert reply.status_code == 200
    deadline = time.monotonic() + 5.0
    while (gate := narrow.stats()["gate"])["calls"] > 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (gate["calls"], gate["running"], gate["waiting"], gate["bytes_held"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",  # a TLS hello
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_what_is_no_http(narrow, data):
    assert error_of(told(narrow, data))[0] in (400, 501)


@pytest.mark.parametrize(
    "lines",
    [
        b"POST /tokenize HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"POST /tokenize HTTP/1.0\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_bodies_whose_end_is_told_in_two_ways(narrow, lines):
    """RFC 9112, 6.1: a proxy may have read the length. What comes behind must not be answered."""
    with wire(narrow) as connection:
        connection.send(lines + b"Host: localhost\r\nContent-Type: application/json\r\n\r\n0\r\n\r\n")
        connection.send(head("GET", "/health"))
        assert error_of(connection.reply()) == (400, "invalid_http")
        assert connection.rest() == b""


def test_what_is_no_http_writes_no_log(narrow):
    told(narrow, b"nonsense\r\n\r\n")
    with narrow.http() as client:
        client.get("/nowhere", headers={"X-Request-Id": "after-nonsense"})
    assert not [line for line in narrow.wait_for_lines("after-nonsense") if "uvicorn" in line]


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/nowhere", "GET", 404, "not_found"),
        ("/v1/chat/completions/", "POST", 404, "not_found"),
        ("/v1", "GET", 404, "not_found"),
        ("/v1/models/none", "GET", 404, "model_not_found"),
        (CHAT, "GET", 405, "method_not_allowed"),
        (CHAT, "OPTIONS", 405, "method_not_allowed"),
        (CHAT, "DELETE", 405, "method_not_allowed"),
        (CHAT, "NONSENSE", 405, "method_not_allowed"),
        ("/health", "POST", 405, "method_not_allowed"),
        ("*", "OPTIONS", 404, "not_found"),
        ("http://elsewhere/health", "GET", 404, "not_found"),
        ("elsewhere:443", "CONNECT", 404, "not_found"),
    ],
)
def test_unknown_routes_and_methods(narrow, path, method, status, code):
    reply = told(narrow, head(method, path, "Content-Length: 0"))
    assert error_of(reply) == (status, code)
    if status == 405:
        assert ("POST" if path == CHAT else "GET, HEAD") == reply[1]["allow"]


def test_head_has_the_head_of_get(narrow):
    with wire(narrow) as connection:
        connection.send(head("HEAD", "/health") + head("GET", "/health"))
        status, headers, body = connection.reply("HEAD")
        assert (status, body) == (200, None)
        assert int(headers["content-length"]) > 0
        assert connection.reply()[0] == 200  # nothing of a body was sent before it


@pytest.mark.parametrize(
    "lines",
    [
        ["X-Long: " + "a" * 40_000],
        ["X-Long: " + "a" * 1_000_000],
        [f"X-{n}: {n}" for n in range(10_000)],
        [f"X-{n}: {n}" for n in range(200)],
    ],
    ids=["40 kB", "1 MB", "10000 headers", "200 headers"],
)
def test_heads_that_are_too_large(narrow, lines):
    assert error_of(told(narrow, head("GET", "/health", *lines))) == (431, "headers_too_large")


def test_a_long_address_is_part_of_the_head(narrow):
    assert error_of(told(narrow, head("GET", "/health?" + "a" * 40_000))) == (431, "headers_too_large")


def test_a_head_that_does_not_end(narrow):
    start = time.monotonic()
    with wire(narrow) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for _ in range(3):
            time.sleep(0.1)
            connection.send(b"X-Slow: 1\r\n")
        assert error_of(connection.reply()) == (408, "request_timeout")
        assert connection.closed()
    assert 0.5 < time.monotonic() - start < 5.0


def test_a_connection_without_a_call_is_closed(narrow):
    with wire(narrow) as connection:
        assert connection.closed()
    with wire(narrow) as connection:  # and one that was used and is no more
        connection.send(head("GET", "/health"))
        assert connection.reply()[0] == 200
        assert connection.closed()


def test_a_body_that_does_not_end_in_time(narrow):
    start = time.monotonic()
    with wire(narrow) as connection:
        connection.send(head("POST", CHAT, "Content-Type: application/json", "Content-Length: 1000") + b'{"model": ')
        assert error_of(connection.reply()) == (408, "request_timeout")
        assert connection.closed()
    assert 0.5 < time.monotonic() - start < 5.0


def test_a_body_that_is_declared_too_large_is_not_waited_for(narrow):
    with wire(narrow) as connection:
        connection.send(head("POST", CHAT, "Content-Type: application/json", "Content-Length: 999999999999"))
        start = time.monotonic()
        assert error_of(connection.reply()) == (413, "body_too_large")
        assert time.monotonic() - start < 0.5


def test_an_endless_body(narrow):
    before = narrow.stats()["process"]["rss_bytes"]
    chunk = b"10000\r\n" + b"[" * 0x10000 + b"\r\n"
    with wire(narrow) as connection:
        connection.send(head("POST", CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked"))
        sent = 0
        try:
            while sent < 200 * len(chunk):
                connection.send(chunk)
                sent += len(chunk)
        except OSError:
            pass  # the server has had enough
        assert error_of(connection.reply()) == (413, "body_too_large")
    assert narrow.stats()["process"]["rss_bytes"] - before < 20 * 2**20


def test_a_body_that_nobody_wants_holds_no_connection(narrow):
    """Open routes read no body: whoever drips one would keep its connection for ever."""
    with wire(narrow) as connection:
        connection.send(head("GET", "/health", "Transfer-Encoding: chunked"))
        assert connection.reply("GET")[0] == 200
        start = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - start < 10.0:
                connection.send(b"1\r\na\r\n")
                time.sleep(0.05)
        assert time.monotonic() - start < 5.0


def test_clients_learn_that_their_body_is_too_large(narrow):
    with narrow.http() as client:
        reply = client.post(CHAT, content=b" " * 5_000_000, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_a_chunk_that_is_none(narrow):
    with wire(narrow) as connection:
        connection.send(head("POST", CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked"))
        connection.send(b"zz\r\n")
        assert error_of(connection.reply()) == (400, "invalid_http")


def test_more_body_than_declared_is_another_call(narrow):
    body = b'{"prompt": "a"}'
    with wire(narrow) as connection:
        connection.send(head("POST", "/tokenize", "Content-Type: application/json", f"Content-Length: {len(body)}"))
        connection.send(body + b"smuggled\r\n\r\n")
        assert connection.reply()[0] == 200
        assert error_of(connection.reply())[0] == 400


def test_a_client_that_leaves_inside_its_body(narrow):
    for _ in range(5):
        with wire(narrow) as connection:
            connection.send(head("POST", CHAT, "Content-Type: application/json", "Content-Length: 1000") + b"{")


def test_too_many_connections(narrow):
    with ExitStack() as stack:
        wires = [stack.enter_context(wire(narrow)) for _ in range(40)]
        refused = 0
        for connection in wires[32:]:
            status, code = error_of(connection.reply())
            assert (status, code) == (503, "overloaded")
            refused += 1
        assert refused == 8
    time.sleep(0.1)


def test_a_connection_outlives_errors(narrow):
    with wire(narrow) as connection:
        for _ in range(3):
            connection.send(head("POST", CHAT, "Content-Type: application/json", "Content-Length: 1") + b"{")
            assert error_of(connection.reply())[0] == 400
        connection.send(head("GET", "/health"))
        assert connection.reply()[0] == 200


BAD_JSON = [
    b"",
    b"{",
    b"nope",
    b'{"a": "\xff"}',
    b'{"a": NaN}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    b"[" * 100_000,
    b'{"model": 1, "prompt": 1, "messages": 1, "tokens": 1}',
    b'{"model": NaN, "prompt": {"a": NaN}, "messages": [NaN], "tokens": NaN}',
    b'{"model": "m", "model": "m"}',
    b'{"model": "\\ud800"}',
    b'{"\\udc00": 1}',
    b"[]",
    b"null",
]


@pytest.mark.parametrize("path", JSON_ROUTES)
def test_bodies_that_are_no_json_of_the_route(narrow, path):
    with narrow.http() as client:
        for body in BAD_JSON:
            reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert reply.status_code == 400, body[:80]
            assert_error(reply)
            wanted = "invalid_unicode" if b"\\ud" in body else "invalid_body"
            assert reply.json()["error"]["code"] == wanted, body[:80]


def assert_error(reply: httpx.Response) -> None:
    body = reply.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    assert "Traceback" not in reply.text
    assert "pydantic" not in reply.text


WRONG: dict[str, list[Any]] = {
    "model": [1, None, [], {}, True, "", "x" * 300],
    "messages": [1, "a", {}, [], [1], [None], [{}], [{"role": "user"}], [{"role": "x", "content": "a"}]],
    "n": [0, -1, 1.5, "1", True, 10**30],
    "stream": [1, "true", []],
    "stream_options": [1, [], {"x": 1}],
    "temperature": ["0", True, [], -1],
    "stop": [1, {}, [1], [""], ""],
    "seed": ["1", 1.5, -1, 2**70],
    "logit_bias": [[], "a", {"a": 1}, {"1": "x"}],
    "response_format": [1, "json", [], {"type": "x"}],
    "cache_salt": [1, "", "a b", "x" * 200, "\u00e9", "a\u0000"],
    "nobody_knows": [1],
}


def test_wrong_types_at_every_field(narrow):
    good = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with narrow.http() as client:
        assert client.post(CHAT, json=good).status_code == 200
        for name, values in WRONG.items():
            for value in values:
                reply = client.post(CHAT, json={**good, name: value})
                assert reply.status_code == 400, (name, value, reply.text)
                assert_error(reply)
                assert str(reply.json()["error"]["param"]).startswith(name), (name, value, reply.text)


PARTS: list[Any] = [
    {"type": "nothing"},
    {"type": 1},
    {},
    {"type": "text"},
    {"type": "text", "text": 1},
    {"type": "image_url"},
    {"type": "image_url", "image_url": None},
    {"type": "image_url", "image_url": "data:,"},
    {"type": "image_url", "image_url": ["data:,"]},
    {"type": "image_url", "image_url": {}},
    {"type": "image_url", "image_url": {"url": 1}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}, "video_url": {"url": "data:,"}},
    {"type": "input_audio", "input_audio": {"data": 1, "format": "wav"}},
    "text",
    1,
    None,
]


def test_parts_that_are_none(narrow):
    with narrow.http() as client:
        for part in PARTS:
            message = {"role": "user", "content": [{"type": "text", "text": "a"}, part]}
            reply = client.post(CHAT, json={"model": "qwen2vl-nano", "messages": [message]})
            assert reply.status_code == 400, (part, reply.text)
            assert_error(reply)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_other_kinds_of_bodies(narrow, kind):
    with narrow.http() as client:
        headers = {} if kind is None else {"Content-Type": kind}
        reply = client.post("/tokenize", content=b'{"prompt": "a"}', headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "Content-Type"


def test_pages_of_others_cannot_use_a_server_without_keys(narrow):
    """A form of any page may send this to 127.0.0.1, and the browser of whoever looks at it says where it is from."""
    with narrow.http() as client:
        other = {"Sec-Fetch-Site": "cross-site", "Origin": "https://elsewhere.example"}
        for path in ("/v1/models", "/metrics"):
            reply = client.get(path, headers=other)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "permission_denied")
        assert client.post("/v1/audio/transcriptions", data={"model": "m"}, headers=other).status_code == 403
        for own in ({"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {}):
            assert client.get("/v1/models", headers=own).status_code == 200
        assert client.get("/health", headers=other).status_code == 200


OTHERS = [
    # DNS rebinding: a page's own name now resolves to 127.0.0.1, so its browser calls it same-origin.
    {"Host": "page.example:8000", "Origin": "http://page.example:8000", "Sec-Fetch-Site": "same-origin"},
    {"Host": "page.example:8000"},
    {"Host": "127.0.0.1.page.example"},
    {"Host": "localhost.page.example:8000"},
    {"Host": "user@localhost"},
    # localhost:3000 is the same site as localhost:8000, and another origin.
    {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
    {"Host": "10.1.2.3:8000", "Origin": "http://10.1.2.3:3000"},  # to which browsers do not tell the site
    {"Origin": "null"},
]


@pytest.mark.parametrize("headers", OTHERS)
def test_names_and_pages_that_a_server_without_keys_does_not_know(narrow, headers):
    with narrow.http() as client:
        reply = client.get("/v1/models", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "permission_denied")


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]:8000", "10.1.2.3"])
def test_names_that_a_server_without_keys_has(narrow, host):
    with narrow.http() as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        page = {"Host": host, "Origin": f"http://{host}"}
        assert client.get("/v1/models", headers=page).status_code == 200


def test_a_large_body_does_not_stop_the_loop(server):
    """120 MB of JSON with escapes: what reads it keeps the interpreter's lock for longer than here, every time."""
    body = b'{"model":"x","messages":[{"role":"user","content":"' + b"\\n" * (60 * 2**20) + b'"}]}'
    start = time.perf_counter()
    json.loads(body)
    read = time.perf_counter() - start
    assert any(slowest_health_during(server, body) < 0.8 * read for _ in range(3))  # others may use the machine too


def slowest_health_during(server: Server, body: bytes) -> float:
    """The longest that /health took, in seconds, while that body was sent and refused."""
    slowest, stop = 0.0, threading.Event()

    def look() -> None:
        nonlocal slowest
        with server.http() as client:
            while not stop.is_set():
                start = time.perf_counter()
                client.get("/health")
                slowest = max(slowest, time.perf_counter() - start)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with server.http() as client:
            reply = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    finally:
        stop.set()
        looking.join()
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    return slowest


def test_ids_are_ours_and_the_clients_are_only_logged(narrow):
    with narrow.http() as client:
        replies = [client.get("/v1/models", headers={"X-Request-Id": "mine\\n forged=1"}) for _ in range(2)]
    ids = {reply.headers["x-request-id"] for reply in replies}
    assert len(ids) == 2
    assert all(one.startswith("req-") for one in ids)
    for one in ids:
        (line,) = [line for line in narrow.wait_for_lines(one) if one in line]
        assert 'client_request_id="mine' in line
        assert " forged=1" in line


def test_replies_cannot_be_taken_for_something_else(narrow):
    with narrow.http() as client:
        for path in ("/health", "/nowhere", "/v1/models"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "server" not in headers
            assert "access-control-allow-origin" not in headers
