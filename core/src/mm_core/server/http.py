"""HTTP/1.1 of our own manners: uvicorn's protocol with a clock on heads, a bound on connections, and our errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mm_core.server.config import ServerConfig
from mm_core.server.failures import error_body

_LINGER_S = 2.0
_LINGER_BYTES = 32 * 2**20


class _Transport:
    """A connection whose close() goes through its protocol: see `HttpProtocol.part`."""

    def __init__(self, real: asyncio.Transport, protocol: HttpProtocol) -> None:
        self.real = real
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def is_closing(self) -> bool:
        return self._protocol.parting or self.real.is_closing()

    def close(self) -> None:
        self._protocol.part()


class _Connection(h11.Connection):
    """h11's reader, less heads that a proxy before us may have read as having another end (RFC 9112, 6.1)."""

    def next_event(self) -> Any:
        """As h11's; RemoteProtocolError where a head gives the body's length in two ways, or chunks in HTTP/1.0."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
        return event


class HttpProtocol(H11Protocol):
    """One connection. `limits` is set by `protocol_of`."""

    limits: ServerConfig
    parting = False
    _clock: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse what is above the bound; else the head must come in time."""
        self._real = transport
        self.conn = _Connection(h11.SERVER, self.limits.max_header_bytes)
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.limits.max_connections:
            self._answer(503, "overloaded", "The server has as many connections as it takes.", retry=True)
        else:
            self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is waited for any more."""
        self._stop_clock()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As uvicorn does; a head that has begun must be complete in time."""
        if self.parting:
            self._discarded += len(data)
            if self._discarded > _LINGER_BYTES:
                self._real.abort()
            return
        if self._real.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_clock()
        elif self.conn.trailing_data[0]:
            self._start_clock()

    def on_response_complete(self) -> None:
        """A call whose body nobody wanted to read to its end: the rest of it is not waited for."""
        if self.conn.their_state is h11.SEND_BODY:
            self.part()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read. It may for a while; then its call ends, as if it had left."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.body_timeout_s, self._real.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def eof_received(self) -> None:
        """The client has nothing more to say: uvicorn closes then, and so do we."""
        if self.parting:
            self._real.close()

    def part(self) -> None:
        """Close the connection. A client that is still sending would not see the reply: its kernel forgets it once we
        refuse what comes. So we read and drop for a while, until it is told and gone."""
        if self.parting or self._real.is_closing():
            return
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) or not self._real.can_write_eof():
            self._real.close()
            return
        self.parting = True
        self._stop_clock()
        self._unset_keepalive_if_required()
        self.loop.call_later(_LINGER_S, self._real.abort)
        with contextlib.suppress(OSError, RuntimeError):
            self._real.write_eof()
            self._real.resume_reading()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Called for what h11 cannot read; its error says which status fits."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        if self.cycle is not None and not self.cycle.response_complete:  # its app is at work
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        if status == 431:
            self._answer(431, "headers_too_large", "The call's address and headers are larger than this server takes.")
        else:
            self._answer(400, "invalid_http", "The call is not valid HTTP/1.1.")

    def _unsupported_upgrade_warning(self) -> None:
        """Upgrades are ignored; a line in the log for each would be the client's to write."""

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(self.limits.header_timeout_s, self._on_late)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _on_late(self) -> None:
        self._clock = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            return
        if self.conn.trailing_data[0]:
            self._answer(408, "request_timeout", "The call's headers did not arrive in time.")
        else:
            self.transport.close()

    def _answer(self, status: int, code: str, message: str, *, retry: bool = False) -> None:
        """Write a whole reply and close. h11 has no say: its state may be past repair."""
        body = json.dumps(error_body(message, code, status)).encode("ascii")
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "X-Content-Type-Options: nosniff",
            *(["Retry-After: 5"] if retry else []),
            "Connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        self.transport.close()


def protocol_of(config: ServerConfig) -> type[HttpProtocol]:
    """The protocol with a server's limits, as uvicorn wants it: a class."""
    members: dict[str, Any] = {"limits": config}
    return type("BoundHttpProtocol", (HttpProtocol,), members)
