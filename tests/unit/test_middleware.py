"""What every call passes, with routes that fail in every way."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mm_core.errors import (
    ContextLengthError,
    EngineClosedError,
    EngineDiedError,
    EngineError,
    MediaTooLargeError,
    MMError,
    OutOfMemoryError,
    OverloadedError,
    PluginError,
    RequestTimeoutError,
)
from mm_core.server.app import build_app
from mm_core.server.config import ServerConfig
from mm_core.server.context import Call, ServerContext, call_of
from mm_core.server.desk import Desk
from mm_core.server.failures import json_reply
from mm_core.server.gate import Gate
from mm_core.server.routing import Route

SECRET = "at 0x7f25637d7a10 in /etc/secret: Traceback"


class Counters:
    def __init__(self) -> None:
        self.ends: list[tuple[Call, int, str | None]] = []

    def on_call_begin(self, call: Call) -> None:
        pass

    def on_call_end(self, call: Call, status: int, error: str | None) -> None:
        self.ends.append((call, status, error))


def app_of(handler: Any, *, method: str = "POST", **config: Any) -> tuple[Starlette, ServerContext, Counters]:
    counters = Counters()
    parts: dict[str, Any] = {"engine": None, "intake": None, "metrics": counters, "model_name": "m"}
    context = ServerContext(config=ServerConfig(**config), desk=Desk(), gate=Gate(2, 2), **parts)
    routes = [Route("/x", method, handler), Route("/health", "GET", fine, access="open", essential=True)]
    return build_app(context, routes), context, counters


async def fine(_: Request) -> Response:
    return json_reply({"fine": True})


def ask(app: Starlette, path: str = "/x", method: str = "POST", **more: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **more)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextLengthError("too long", param="messages"), 400, "context_length_exceeded"),
        (MediaTooLargeError("too large"), 413, "media_too_large"),
        (OverloadedError("later", retry_after=7), 429, "overloaded"),
        (EngineDiedError("gone"), 503, "engine_died"),
        (EngineClosedError("closed"), 503, "engine_closed"),
        (OutOfMemoryError("full"), 503, "out_of_memory"),
        (RequestTimeoutError("late"), 504, "timeout"),
        (PluginError("Plugin 'x' failed."), 500, "plugin_error"),
        (EngineError("failed"), 500, "engine_error"),
        (ContextLengthError("half \ud800 a pair", param="\udc00"), 400, "context_length_exceeded"),
        (RuntimeError(SECRET), 500, "internal_error"),
        (KeyError(SECRET), 500, "internal_error"),
        (RecursionError(), 500, "internal_error"),
        (MemoryError(SECRET), 500, "internal_error"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, SECRET), 500, "internal_error"),
        (ExceptionGroup(SECRET, [ValueError(SECRET)]), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_are_told_in_one_shape(error, status, code, caplog):
    async def fail(_: Request) -> Response:
        raise error

    app, context, counters = app_of(fail)
    with caplog.at_level(logging.ERROR):
        reply = ask(app)
    body = reply.json()["error"]
    assert (reply.status_code, body["code"]) == (status, code)
    assert body["request_id"] == reply.headers["x-request-id"] == counters.ends[0][0].request_id
    assert reply.content.isascii()
    assert SECRET not in reply.text
    assert (SECRET in caplog.text) == (SECRET in repr(error))  # the log has it
    if not isinstance(error, MMError):
        assert body["request_id"] in caplog.text
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert [(each[1], each[2]) for each in counters.ends] == [(status, code)]
    assert context.gate.calls == 0


def test_a_reply_that_breaks_off_does_not_look_whole(caplog):
    async def broken(_: Request) -> Response:
        async def parts() -> Any:
            yield b"begun"
            raise RuntimeError(SECRET)

        return StreamingResponse(parts())

    app, context, counters = app_of(broken)
    with pytest.raises(RuntimeError):  # which the server answers by closing the connection
        ask(app)
    assert counters.ends[0][1:] == (200, "internal_error")
    assert context.gate.calls == 0
    assert "a call failed" in caplog.text


@pytest.mark.parametrize(("path", "method", "names"), [("/x", "GET", "POST"), ("/health", "POST", "GET, HEAD")])
def test_a_method_that_a_route_has_not(path, method, names):
    reply = ask(app_of(fine)[0], path, method)
    assert (reply.status_code, reply.headers["allow"]) == (405, names)
    assert reply.json()["error"]["message"] == f"The route has other methods: {names}."


def test_a_drain_refuses_all_but_what_tells_of_it():
    app, context, _ = app_of(fine)
    assert ask(app).status_code == 200
    context.gate.drain()
    reply = ask(app)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
    assert ask(app, "/health", "GET").status_code == 200


def test_the_log_has_a_line_a_call_but_none_for_each_look_at_health(caplog):
    app, _, counters = app_of(fine, api_keys=(SecretStr("k"),))
    with caplog.at_level(logging.INFO, "mm_core.server.access"):
        ask(app, "/health", "GET")
        assert not caplog.records
        ask(app, headers={"X-Request-Id": b"\xe9\x07 " + b"x" * 500})
        ask(app, headers={"Authorization": "Bearer k"})
    refused, answered = (record.fields for record in caplog.records)
    assert (refused["status"], refused["caller"], refused["code"]) == (401, "anybody", "invalid_api_key")
    assert refused["client_request_id"].isascii()
    assert len(refused["client_request_id"]) < 1000
    assert (answered["status"], answered["route"], answered["method"]) == (200, "/x", "POST")
    assert answered["caller"].startswith("key-")
    assert answered["request_id"] == counters.ends[-1][0].request_id


def scope_of(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": "/x", "raw_path": b"/x", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost"), *headers], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip


def test_a_handler_learns_that_its_client_left():
    left = asyncio.Event()
    seen: dict[str, Any] = {}

    async def wait(request: Request) -> Response:
        call = call_of(request)
        seen["body"] = await request.body()
        seen["before"] = call.disconnected.is_set()
        left.set()
        await asyncio.wait_for(call.disconnected.wait(), 5.0)
        seen["again"] = (await request.receive())["type"]  # as often as it is asked for
        return json_reply({})

    app, context, counters = app_of(wait)

    async def main() -> None:
        messages = iter([b"a", b"b"])

        async def receive() -> dict[str, Any]:
            body = next(messages, None)
            if body is None:
                await left.wait()
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": body, "more_body": body == b"a"}

        async def send(_: Any) -> None:
            return None

        before = asyncio.all_tasks()
        await app(scope_of((b"content-length", b"2")), receive, send)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before  # nobody watches any more

    asyncio.run(main())
    assert seen == {"body": b"ab", "before": False, "again": "http.disconnect"}
    assert counters.ends[0][1] == 499
    assert (context.gate.calls, context.gate.bytes_held) == (0, 0)


@pytest.mark.parametrize("read", [True, False])
def test_a_connection_is_closed_only_where_a_body_was_left_unread(read):
    async def fail(request: Request) -> Response:
        if read:
            await request.body()
        raise ContextLengthError("no")

    app, _, _ = app_of(fail)
    assert (ask(app, content=b"body").headers.get("connection") == "close") == (not read)
    assert "connection" not in ask(app, "/nowhere", "GET").headers


def test_other_protocols_are_not_spoken():
    app, _, counters = app_of(fine)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({**scope_of(), "type": "websocket"}, SimpleNamespace(), send))  # type: ignore[arg-type]
    assert (sent, counters.ends) == ([], [])


def test_error_bodies_are_json_whatever_the_text():
    async def fail(_: Request) -> Response:
        raise ContextLengthError("a\u2028b\x00c\ud800" + "é" * 10)

    app, _, _ = app_of(fail)
    assert "é" in json.loads(ask(app).content)["error"]["message"]
