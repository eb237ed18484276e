"""What every call passes: its id, who calls, whether it may, the access log, and errors in one shape."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from contextlib import nullcontext
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_core.errors import (
    AuthenticationError,
    MethodNotAllowedError,
    NotFoundError,
    PermissionDeniedError,
    ServiceError,
)
from mm_core.server.config import ServerConfig
from mm_core.server.context import ANYBODY, Call, Caller, ServerContext
from mm_core.server.failures import log_unforeseen, reply_to
from mm_core.server.gate import Gate
from mm_core.server.pages import Pages
from mm_core.server.routing import Route, RouteTable
from mm_core.server.salts import caller_of

access_log = logging.getLogger("mm_core.server.access")

_MAX_HEADERS = 128


class HeaderTooLargeError(ServiceError):
    """The head of a call is above a ceiling."""

    code = "headers_too_large"
    status = 431


class Keys:
    """Who may call. Compared by hash and in constant time: how long a look takes says nothing about a key."""

    def __init__(self, config: ServerConfig) -> None:
        self._callers = [
            (_hashed(key.get_secret_value()), caller_of(key.get_secret_value())) for key in config.api_keys
        ]
        self.admin_set = config.admin_key is not None
        if config.admin_key is not None:
            key = config.admin_key.get_secret_value()
            self._callers.append((_hashed(key), caller_of(key, admin=True)))
        self.needed = bool(config.api_keys)

    def find(self, headers: list[tuple[bytes, bytes]]) -> Caller | None:
        """The caller of a call's Authorization header; None: no key, or none of ours."""
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, key = given[0].strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        wanted, found = hashlib.sha256(key.strip()).digest(), None
        for known, caller in self._callers:  # all of them, whichever fits
            if hmac.compare_digest(known, wanted):
                found = caller
        return found

    def check(self, route: Route | None, caller: Caller) -> None:
        """Raises AuthenticationError, PermissionDeniedError, and NotFoundError for an admin route without an admin
        key. A path that no route has is treated as one that needs a key."""
        known = caller is not ANYBODY
        if route is not None and route.access == "open":
            return
        if self.needed and not known:
            raise AuthenticationError("A valid API key is needed: send the header Authorization: Bearer KEY.")
        if route is None or route.access == "key" or caller.admin:
            return
        if not self.admin_set:
            raise NotFoundError("The admin routes are off. Start the server with --admin-key to have them.")
        if not known:
            raise AuthenticationError("The admin key is needed: send the header Authorization: Bearer KEY.")
        raise PermissionDeniedError("This route needs the admin key.")


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class CallMiddleware:
    """Outermost of the app's layers, plain ASGI. Makes the Call, admits it or answers with an error, logs its end."""

    def __init__(self, app: ASGIApp, *, context: ServerContext, table: RouteTable) -> None:
        self.app = app
        self._context = context
        self._table = table
        self._keys = Keys(context.config)
        self._pages = Pages(context.config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One call."""
        if scope["type"] != "http":  # no websockets here, no lifespan
            return
        call = Call(scope["path"], ANYBODY)
        wire = _Wire(scope, call, self._context.gate, receive, send)
        route = self._table.find(scope["path"], scope["method"])
        try:
            call.route = "" if route is None else route.path
            self._check_head(scope)
            call.caller = self._keys.find(scope["headers"]) or ANYBODY
            self._keys.check(route, call.caller)
            if not self._keys.needed and call.caller is ANYBODY and route is not None and route.access != "open":
                self._pages.check(scope["headers"])
            if route is None:
                raise NotFoundError("There is no such route.")
            if route.method != scope["method"] and (route.method, scope["method"]) != ("GET", "HEAD"):
                methods = self._table.methods(scope["path"])
                raise MethodNotAllowedError(f"The route has other methods: {', '.join(methods)}.", allow=methods)
            scope.setdefault("state", {}).update(call=call, route=route)
            self._context.metrics.on_call_begin(call)
            with nullcontext() if route.essential else self._context.gate.present(call):
                await self.app(scope, wire.receive, wire.send)
        except Exception as error:
            call.error_code = getattr(error, "code", "internal_error")
            log_unforeseen(error, {"request_id": call.request_id, "route": call.route})
            if not wire.started:
                await reply_to(error, call.request_id, close=wire.unread)(scope, wire.receive, wire.send)
            else:  # a reply that broke off must not look whole
                raise
        finally:
            wire.close()
            self._context.gate.release(call)
            self._context.metrics.on_call_end(call, wire.status, call.error_code)
            call.phase = "done"
            # Whether all is well is asked every few seconds; the answer is worth a line when it is no.
            if wire.status >= 400 or route is None or not route.essential:
                _log_end(scope, call, wire)

    def _check_head(self, scope: Scope) -> None:
        headers = scope["headers"]
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in headers)
        if len(headers) > _MAX_HEADERS or size > self._context.config.max_header_bytes:
            raise HeaderTooLargeError("The call's address and headers are more, or larger, than this server takes.")


class _Wire:
    """A call's receive and send: notices when the client is gone, and what was answered."""

    def __init__(self, scope: Scope, call: Call, gate: Gate, receive: Receive, send: Send) -> None:
        self.call = call
        self._gate = gate
        self.status = 499  # what the log says of a client that left before its reply
        self.started = False
        self._receive = receive
        self._send = send
        self._watch: asyncio.Task[None] | None = None
        self._read = False
        self._bodiless = not any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])

    @property
    def unread(self) -> bool:
        """Whether there is more of the body on its way, so that the connection cannot be used again."""
        return not (self._read or self._bodiless)

    async def receive(self) -> Message:
        """The next part of the body; behind its end, the disconnect, as often as it is asked for."""
        if self._read:
            await self.call.disconnected.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if body := message.get("body"):
            self._gate.hold(self.call, len(body))
        if message["type"] == "http.disconnect":
            self.call.disconnected.set()
            self._read = True
        elif not message.get("more_body", False):
            self._read = True
            self._watch = asyncio.create_task(self._watch_client())
        return message

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.call.disconnected.set()

    async def send(self, message: Message) -> None:
        """Pass on a part of the reply."""
        if message["type"] == "http.response.start":
            self.started = True
            if not self.call.disconnected.is_set():
                self.status = message["status"]
            own = (b"x-request-id", self.call.request_id.encode())
            message["headers"] = [*message.get("headers", ()), *_HEADERS, own]
        await self._send(message)

    def close(self) -> None:
        """The call is over: nobody watches any more."""
        if self._watch is not None:
            self._watch.cancel()


_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def _log_end(scope: Scope, call: Call, wire: _Wire) -> None:
    fields: dict[str, Any] = {
        "request_id": call.request_id,
        "caller": call.caller.name,
        "method": scope["method"],
        "route": call.route or "(none)",
        "status": wire.status,
        "ms": round(1000 * (time.perf_counter() - call.arrival), 1),
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "code": call.error_code,
        "client_request_id": _client_id(scope),
    }
    access_log.info("call", extra={"fields": {name: value for name, value in fields.items() if value is not None}})


def _client_id(scope: Scope) -> str | None:
    """What the client calls its call: for the log only, escaped and cut off."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
    return None if given is None else given[:128].decode("latin-1").encode("unicode_escape").decode()
